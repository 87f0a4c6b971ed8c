//! The command line of `muster run` in torchrun's odd corners: what is empty, given twice, misspelt, or another
//! backend's.

use std::process::{Child, Command, Stdio};

use muster_tests::{Cluster, Nodes, Outcome, Place, Settings, binary, free_port, lines};

fn with_env(place: &Place, env: &[(&str, &str)], args: &[&str]) -> Outcome {
    Outcome::of(place.command(args).envs(env.iter().copied()))
}

#[test]
fn what_is_empty_is_as_if_it_were_not_there() {
    let place = Place::new();
    let script = place.script("echo \"[$TORCHELASTIC_RUN_ID]\" $WORLD_SIZE");
    let empty = ["--rdzv-id=", "--rdzv-endpoint=", "--rdzv-conf=", "--log-dir=", "--local-addr="];
    let outcome = place.run(&[&empty[..], &["--local-ranks-filter=", "--no-python", &script]].concat());
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    assert!(outcome.stdout.len() > "[] 1\n".len(), "the run has a made-up name: {outcome:?}");
    let variables =
        ["RDZV_ID", "RDZV_ENDPOINT", "RDZV_CONF", "LOG_DIR", "LOCAL_ADDR", "STANDALONE", "MODULE"];
    let variables = variables.map(|name| format!("PET_{name}"));
    let env: Vec<(&str, &str)> = variables.iter().map(|name| (name.as_str(), "")).collect();
    let outcome = with_env(&place, &env, &["--no-python", &script]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");

    // Nodes that all have no name for their run meet.
    let endpoint = format!("127.0.0.1:{}", free_port());
    let start = || -> Child {
        let mut node = place.command(&["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id", ""]);
        node.args(["--rdzv-endpoint", &endpoint, "--no-python", &script]);
        node.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for node in Nodes(vec![start(), start()]).ends() {
        assert_eq!((node.code, node.stdout.as_str()), (0, "[none] 2\n"), "{node:?}");
        assert!(node.stderr.contains("--rdzv-id is empty; the nodes meet as the run \"none\""), "{node:?}");
    }
}

#[test]
fn what_is_wrong_is_named_as_it_was_given() {
    let place = Place::new();
    for (variable, value, words) in [
        ("PET_NNODES", "two", "the variable PET_NNODES has the value \"two\", which is none for --nnodes"),
        ("PET_MAX_RESTARTS", "", "the variable PET_MAX_RESTARTS has the value \"\""),
        ("PET_TEE", "7", "\"7\" is neither 0, 1, 2 or 3"),
        ("PET_NPROC_PER_NODE", "100000000", "is more than a node may have, 1024"),
    ] {
        let outcome = with_env(&place, &[(variable, value)], &["--no-python", "true"]);
        assert_eq!(outcome.code, 2, "{outcome:?}");
        assert!(outcome.stderr.contains(words) && outcome.stderr.contains(variable), "{outcome:?}");
    }
    // The command line wins, and is what is wrong.
    let outcome = with_env(&place, &[("PET_NNODES", "x")], &["--nnodes", "x", "--no-python", "true"]);
    assert!(!outcome.stderr.contains("PET_NNODES has"), "{outcome:?}");
    for (args, words) in [
        (
            &["--nprocs-per-node", "2", "true"][..],
            "no flag --nprocs-per-node, and a script comes after the flags; did you mean --nproc-per-node?",
        ),
        (&["--nproc-per-node", "100000000", "true"], "100000000 is more than a node may have, 1024"),
        (&["--logs-specs", "mine", "true"], "--logs-specs mine is a Python class"),
    ] {
        let outcome = place.run(args);
        assert_eq!(outcome.code, 2, "{outcome:?}");
        assert!(outcome.stderr.contains(words), "{outcome:?}");
    }
}

#[test]
fn flags_that_change_nothing_are_taken_and_said() {
    let place = Place::new();
    let script = place.script("echo rank $RANK of $WORLD_SIZE");
    let endpoint = format!("127.0.0.1:{}", free_port());
    // As torch's own tests of its launcher write them.
    let outcome = place.run(&[
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        &format!("--rdzv-endpoint={endpoint}"),
        "--rdzv-conf='join_timeout=60,last_call_timeout=0.1,timeout=5'",
        "--logs-specs=default",
        "--event-log-handler=console",
        "--start-method=spawn",
        "--monitor-interval=1",
        "--signals-to-handle=TERM,SIGINT",
        "--node-rank=3",
        "--master-addr=h",
        "--master-port=1",
        "--no-python",
        &script,
    ]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(lines(&outcome.stdout), ["rank 0 of 2", "rank 1 of 2"]);
    for words in [
        "--rdzv-conf timeout has no effect with c10d",
        "--event-log-handler has no effect",
        "--start-method has no effect",
        "--monitor-interval has no effect",
        "--signals-to-handle: TERM is no signal, and is passed over; SIGTERM is one",
        "--node-rank has no effect with --rdzv-backend c10d",
        "--master-addr has no effect with --rdzv-backend c10d",
        "--master-port has no effect with --rdzv-backend c10d",
    ] {
        assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
    }
}

#[test]
fn prefixes_are_made_by_the_template() {
    let place = Place::new();
    let script = place.script("echo x");
    let template = ("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "$role_name ${rank}/$local_rank $$ $other: ");
    let args = ["--nproc-per-node=2", "--tee=1", "--role=r", "--no-python", &script];
    let outcome = with_env(&place, &[template], &args);
    assert_eq!(lines(&outcome.stdout), ["r 0/0 $ $other: x", "r 1/1 $ $other: x"], "{outcome:?}");
}

#[test]
fn line_ends_of_windows_are_explained() {
    let place = Place::new();
    let script = place.script("");
    std::fs::write(place.path("program"), "#!/bin/sh\r\necho x\r\n").unwrap();
    let outcome = place.run(&["--no-python", &script]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("its lines end with carriage returns, as on Windows"), "{outcome:?}");
}

#[test]
fn jobs_have_as_many_ranks_as_their_nodes_have_cores() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let node = cluster.muster(&["node", "n1", "--output", "json"]).json().remove(0);
    let cores = (node["inventory"]["total"]["cpuMillis"].as_u64().unwrap() / 1000).max(1);
    let job = |kind: &str| {
        let args = ["submit", "--follow", "--output", "json", "--nproc-per-node", kind, "--", "true"];
        cluster.muster(&args).json().remove(0)["worldSize"].as_u64()
    };
    assert_eq!(job("cpu"), Some(cores));
    assert!(job("auto").is_some());
    let wrong = cluster.muster(&["submit", "--nproc-per-node", "many", "--", "true"]);
    assert_eq!(wrong.code, 2, "{wrong:?}");
}

#[test]
fn a_script_may_be_named_like_a_flag_after_two_dashes() {
    let muster = binary("muster");
    let outcome = Outcome::of(Command::new(muster).args(["run", "--no-python", "--", "-no-program"]));
    assert!(outcome.stderr.contains("\"-no-program\" was not found"), "{outcome:?}");
}
