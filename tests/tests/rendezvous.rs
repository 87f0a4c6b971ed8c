//! `muster run` on several nodes: how they meet, and who is where.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use muster_tests::{
    Cluster, Nodes, Outcome, Place, Settings, binary, eventually, free_port, lines, skip, torch_python,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn static_nodes_have_the_places_that_they_are_given() {
    let place = Place::new();
    let script = place
        .script("echo $1: $GROUP_RANK $RANK of $WORLD_SIZE, $TORCHELASTIC_RUN_ID, $MASTER_ADDR:$MASTER_PORT");
    let port = free_port();
    let start = |rank: &&str| {
        let args = ["--nnodes=3", "--nproc-per-node=2", "--master-port", &port, "--node-rank", rank];
        place.start(&[&args[..], &["--no-python", &script, rank]].concat())
    };
    // The first comes last.
    let nodes = Nodes(["2", "1", "0"].iter().map(start).collect());
    for (rank, end) in [2, 1, 0].into_iter().zip(nodes.ends()) {
        assert_eq!(end.code, 0, "{end:?}");
        let expected =
            [0, 1].map(|local| format!("{rank}: {rank} {} of 6, none, 127.0.0.1:{port}", 2 * rank + local));
        assert_eq!(lines(&end.stdout), expected, "{end:?}");
    }
    place.nothing_is_left();
}

#[test]
fn c10d_nodes_meet_where_one_of_them_is_and_all_hear_of_the_end() {
    let place = Place::new();
    let endpoint = format!("localhost:{}", free_port());
    let start = |script: &str| {
        let args = [
            "--nnodes",
            "3",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint",
            &endpoint,
            "--rdzv-id=r1",
            "--no-python",
        ];
        Nodes((0..3).map(|_| place.start(&[&args[..], &[script]].concat())).collect())
    };
    let mut ranks: Vec<String> = Vec::new();
    for end in start(&place.script("echo $RANK of $WORLD_SIZE in $TORCHELASTIC_RUN_ID")).ends() {
        assert_eq!(end.code, 0, "{end:?}");
        ranks.push(end.stdout.trim().to_owned());
    }
    ranks.sort();
    assert_eq!(ranks, [0, 1, 2].map(|rank| format!("{rank} of 3 in r1")));
    for end in start(&place.script("[ $RANK = 1 ] && exit 7; exec sleep 100")).ends() {
        assert_eq!(end.code, 1, "{end:?}");
        assert!(end.stderr.contains("ended with exit code 7"), "{end:?}");
    }
    place.nothing_is_left();
}

#[test]
fn a_node_that_waits_in_vain_says_for_whom() {
    let place = Place::new();
    let port = free_port();
    let args = ["--nnodes=2", "--master-port", &port, "--rdzv-conf", "join_timeout=1", "--no-python", "true"];
    let alone = place.run(&args);
    assert_eq!(alone.code, 1, "{alone:?}");
    assert!(
        alone.stderr.contains("not all nodes came within 1 s (join_timeout): waiting: 1 of 2 nodes"),
        "{alone:?}"
    );
    let follower = place.run(&[&["--node-rank=1"][..], &args].concat());
    assert_eq!(follower.code, 1, "{follower:?}");
    assert!(follower.stderr.contains("nobody serves the run at http://127.0.0.1:"), "{follower:?}");
}

#[test]
fn an_elastic_run_takes_in_who_comes_and_goes_on_without_who_goes() {
    let place = Place::new();
    let script = place.script("echo $RANK of $WORLD_SIZE; exec sleep 1000");
    let endpoint = format!("localhost:{}", free_port());
    let args = [
        "--nnodes=1:2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint",
        &endpoint,
        "--max-restarts=1",
        "--rdzv-conf=last_call_timeout=0",
        "--no-python",
    ];
    let start = || place.start(&[&args[..], &[&script]].concat());
    let mut nodes = Nodes(vec![start()]);
    let mut said = BufReader::new(nodes.0[0].stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(said.next().unwrap(), "0 of 1");
    nodes.0.push(start());
    let mut others = BufReader::new(nodes.0[1].stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut both = [said.next().unwrap(), others.next().unwrap()];
    both.sort();
    assert_eq!(both, ["0 of 2", "1 of 2"]);
    // In good order: nobody waits for a lease.
    kill(Pid::from_raw(nodes.0[1].id().cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(said.next().unwrap(), "0 of 1");
    kill(Pid::from_raw(nodes.0[0].id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(nodes.0[0].wait().unwrap().code(), Some(1));
    drop(nodes);
    place.nothing_is_left();
}

#[test]
fn an_elastic_run_begins_with_those_that_come_within_the_last_call() {
    let place = Place::new();
    let script = place.script("echo $RANK of $WORLD_SIZE");
    let start = |conf: &str, nodes: usize| {
        let endpoint = format!("localhost:{}", free_port());
        let args = ["--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint", &endpoint, conf, "--no-python"];
        Nodes((0..nodes).map(|_| place.start(&[&args[..], &[&script]].concat())).collect())
    };
    // torchrun's time, which nobody waits for when all are there.
    let mut said: Vec<String> =
        start("--rdzv-conf=", 2).ends().into_iter().map(|end| end.ok().trim().to_owned()).collect();
    said.sort();
    assert_eq!(said, ["0 of 2", "1 of 2"]);
    let alone = start("--rdzv-conf=last_call_timeout=4", 1).ends().remove(0);
    assert!(alone.stderr.contains("waiting: 1 node can start, and up to 2 may come within 4 s"), "{alone:?}");
    assert_eq!(alone.ok(), "0 of 1\n");
    place.nothing_is_left();
}

#[test]
fn nodes_meet_at_a_coordinator_which_gives_them_no_other_job() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let place = Place::new();
    let script = place.script("while [ ! -e go ]; do sleep 0.05; done; echo $RANK of $WORLD_SIZE");
    let endpoint = cluster.url().replace("http://", "");
    let args =
        ["--nnodes=2", "--rdzv-backend=muster", "--rdzv-endpoint", &endpoint, "--rdzv-id=r2", "--no-python"];
    for _ in 0..2 {
        std::fs::remove_file(place.path("go")).ok();
        let nodes = Nodes((0..2).map(|_| place.start(&[&args[..], &[&script]].concat())).collect());
        eventually("the run", || {
            let jobs = cluster.muster(&["jobs", "--state", "running"]).stdout;
            if jobs.contains("program") { Ok(()) } else { Err(jobs) }
        });
        // It has the coordinator's own node, and would have to wait for a second one.
        let plan = cluster.muster(&["submit", "--dry-run", "--nnodes", "2", "--", "true"]).ok();
        assert!(plan.contains("1 of 2 nodes") && plan.contains("brought by the run (r2)"), "{plan}");
        std::fs::write(place.path("go"), "").unwrap();
        let mut ranks: Vec<String> = Vec::new();
        for end in nodes.ends() {
            assert_eq!(end.code, 0, "{end:?}");
            ranks.push(end.stdout.trim().to_owned());
        }
        ranks.sort();
        assert_eq!(ranks, ["0 of 2", "1 of 2"]);
    }
    place.nothing_is_left();
}

#[test]
fn the_others_end_when_the_node_that_serves_the_run_dies() {
    let place = Place::new();
    let script = place.script("echo ready; exec sleep 1000");
    let port = free_port();
    let start = |rank: &&str| {
        let args = ["--nnodes=2", "--master-port", &port, "--node-rank", rank, "--no-python", &script];
        place.start(&args)
    };
    let mut nodes = Nodes(["0", "1"].iter().map(start).collect());
    for node in &mut nodes.0 {
        let mut said = BufReader::new(node.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert_eq!(said.next().unwrap(), "ready");
    }
    kill(Pid::from_raw(nodes.0[0].id().cast_signed()), Signal::SIGKILL).unwrap();
    let end = nodes.ends().remove(1);
    assert_eq!(end.code, 1, "{end:?}");
    assert!(end.stderr.contains("the node that serves the run at http://127.0.0.1:"), "{end:?}");
    place.nothing_is_left();
}

/// Starts a job whose one rank says where its store is, and stays.
fn job_with_store(place: &Place, launcher: &mut std::process::Command) -> (Nodes, String) {
    let script = place.script("echo $MASTER_ADDR:$MASTER_PORT; exec sleep 1000");
    launcher.args(["--no-python", &script]).current_dir(place.path("")).env("TMPDIR", place.path("tmp"));
    let mut job = Nodes(vec![launcher.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()]);
    let mut said = BufReader::new(job.0[0].stdout.take().unwrap()).lines().map(Result::unwrap);
    let endpoint = said.next().unwrap();
    (job, endpoint)
}

#[test]
fn what_answers_in_the_place_of_a_node_is_said_within_the_time_to_come() {
    let place = Place::new();
    let waits = |endpoint: &str, more: &[&str]| {
        let args = ["--nnodes=2", "--rdzv-conf=join_timeout=1", "--no-python", "true"];
        let end = Outcome::of(&mut place.command(&[&["--rdzv-endpoint", endpoint], more, &args].concat()));
        assert_eq!(end.code, 1, "{end:?}");
        assert!(end.stderr.contains("waited 1 s (join_timeout)"), "{end:?}");
        end.stderr
    };
    let c10d = &["--rdzv-backend=c10d"][..];
    let (job, store) = job_with_store(&place, &mut place.command(&[]));
    let not_first = ["--node-rank=1"];
    for more in [c10d, &not_first, &["--rdzv-backend=muster"]] {
        let said = waits(&store, more);
        assert!(said.contains("a store of torch's answers there"), "{more:?}: {said}");
        assert!(said.contains("MASTER_PORT"), "{more:?}: {said}");
    }
    drop(job);
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let said = waits(&silent.local_addr().unwrap().to_string(), c10d);
    assert!(said.contains("is no `muster run`; name a port that nothing else uses"), "{said}");
    let nobody = format!("127.0.0.1:{}", free_port());
    let said = waits(&nobody, &not_first);
    assert!(said.contains("Connection refused"), "{said}");

    let Some(python) = torch_python() else {
        return skip("a run whose other node has torchrun", "there is no Python with torch");
    };
    let endpoint = format!("127.0.0.1:{}", free_port());
    let torchrun = || {
        let mut torchrun = std::process::Command::new(&python);
        torchrun.args(["-m", "torch.distributed.run", "--rdzv-backend=c10d"]);
        torchrun.args(["--rdzv-endpoint", &endpoint]);
        torchrun
    };
    let (job, _) = job_with_store(&place, torchrun().args(["--nnodes=1", "--rdzv-id=r7"]));
    let said = waits(&endpoint, &[c10d, &["--rdzv-id=r7"]].concat());
    assert!(said.contains("torchrun answers there, with the same run id"), "{said}");
    let said = waits(&endpoint, c10d);
    assert!(said.contains("a store of torch's answers there"), "another run: {said}");
    drop(job);
}

/// As torchrun's nodes do: the ranks of a job that start a launcher each find each other by their
/// own store.
#[test]
fn a_run_within_a_job_meets_over_the_job_s_store() {
    let place = Place::new();
    let muster = binary("muster").display().to_string();
    let inner = "[ $RANK = 0 ] && [ $TORCHELASTIC_RESTART_COUNT = 0 ] && [ \"$1\" = fails ] && exit 3; \
                 echo inner $RANK of $WORLD_SIZE; [ \"$MASTER_PORT\" != $OUTER ]";
    std::fs::write(place.path("inner"), inner).unwrap();
    let run = "run --nnodes=2 --rdzv-endpoint $MASTER_ADDR:$MASTER_PORT --max-restarts=1";
    // Twice, under one name; the second finds what the first has left.
    let script = place.script(&format!(
        "export OUTER=$MASTER_PORT; backend=$(eval echo $1); {muster} {run} $backend --no-python sh inner && \
         {muster} {run} $backend --no-python sh inner fails"
    ));
    let launchers = |backend: &str| {
        let mut launchers = vec![place.command(&["--nproc-per-node=2", "--no-python", &script, backend])];
        if let Some(python) = torch_python() {
            let mut torchrun = std::process::Command::new(python);
            torchrun.args(["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]);
            torchrun.args([&free_port(), "--no-python", &script, backend]);
            // It leaves its own there.
            torchrun.current_dir(place.path("")).env("TMPDIR", place.path(""));
            launchers.push(torchrun);
        }
        launchers
    };
    // Static nodes have their numbers from the job.
    for backend in ["--rdzv-backend=c10d", "--node-rank=$RANK"] {
        for mut launcher in launchers(backend) {
            let end = Outcome::of(&mut launcher);
            assert_eq!(end.code, 0, "{backend}: {launcher:?}: {end:?}");
            let said = lines(&end.stdout);
            assert_eq!(said.iter().filter(|line| **line == "inner 0 of 2").count(), 2, "{said:?}");
            assert!(said.contains(&"inner 1 of 2"), "{said:?}");
        }
    }
    place.nothing_is_left();
}
