//! The command line: exit codes, files, JSON.

use std::process::Command;

use muster_tests::{Cluster, Outcome, Settings, binary, user};

fn muster(args: &[&str]) -> Outcome {
    Outcome::of(Command::new(binary("muster")).args(args).env("MUSTER_COORDINATOR", "http://127.0.0.1:1"))
}

#[test]
fn without_a_coordinator_every_command_says_so() {
    for args in [&["jobs"][..], &["nodes"], &["job", "x"], &["logs", "x"], &["submit", "--", "true"]] {
        let outcome = muster(args);
        assert_eq!(outcome.code, 3, "{outcome:?}");
        assert!(outcome.stderr.contains("cannot reach a coordinator at http://127.0.0.1:1"), "{outcome:?}");
        assert!(outcome.stderr.contains("start one with `muster coordinator`"), "{outcome:?}");
    }
}

#[test]
fn usage_errors_are_2_and_help_lists_every_code() {
    for args in
        [&["submit"][..], &["nonsense"], &["submit", "--nnodes", "two", "--", "x"], &["jobs", "--state", "x"]]
    {
        assert_eq!(muster(args).code, 2, "{args:?}");
    }
    let help = muster(&["--help"]).ok();
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "6 ", "130 "] {
        assert!(help.contains(&format!("\n  {code}")), "{code} is not in:\n{help}");
    }
}

#[test]
fn exit_codes_tell_what_happened() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let code = |args: &[&str]| cluster.muster(args).code;
    assert_eq!(code(&["submit", "--follow", "--", "true"]), 0);
    assert_eq!(code(&["submit", "--follow", "--", "false"]), 1);
    assert_eq!(code(&["job", "nope"]), 4);
    assert_eq!(code(&["node", "nope"]), 4);
    let refused = cluster.muster(&["submit", "--nnodes", "0", "--", "true"]);
    assert_eq!((refused.code, refused.stderr.contains("spec.min_nodes: is 0")), (5, true), "{refused:?}");
    let script =
        format!("MUSTER_COORDINATOR={} {} cancel $MUSTER_JOB_ID", cluster.url(), binary("muster").display());
    assert_eq!(code(&["submit", "--follow", "--", "sh", "-c", &format!("{script}; sleep 100")]), 6);
}

#[test]
fn healthcheck_has_two_exit_codes() {
    let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let url = cluster.url();
    let either = format!("http://127.0.0.1:1,{url}");
    for (coordinators, service, code, words) in [
        (url.as_str(), "", 0, ""),
        (&url, "live", 0, ""),
        (&either, "live", 0, ""),
        (&url, "nonsense", 1, "service not registered"),
        ("http://127.0.0.1:1", "", 1, "cannot be reached"),
        ("nonsense", "", 1, "is not the URL of a coordinator"),
    ] {
        let outcome = muster(&["healthcheck", "--coordinator", coordinators, "--service", service]);
        assert_eq!((outcome.code, outcome.stderr.contains(words)), (code, true), "{outcome:?}");
    }
}

#[test]
fn a_followed_failure_shows_its_cause() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let outcome =
        cluster.muster(&["submit", "--follow", "--", "sh", "-c", "echo out; echo broken >&2; exit 4"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, "out\n"), "{outcome:?}");
    assert!(outcome.stderr.contains("rank 0 on node n1 ended with exit code 4: broken"), "{outcome:?}");
}

#[test]
fn files_are_job_specifications() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let write = |name: &str, text: &str| {
        let path = cluster.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let toml = write(
        "job.toml",
        "command = [\"sh\", \"-c\", \"echo $A\"]\nprocsPerNode = 2\n[env]\nA = \"from a file\"\n",
    );
    let job = cluster.muster(&["submit", "--file", &toml, "--follow", "--output", "json"]);
    assert!(job.stderr.contains("from a file\n"), "standard output is for the JSON: {job:?}");
    assert_eq!(job.json()[0]["worldSize"], 2);
    let json = write("job.json", r#"{"command":["true"],"procs_per_nod":2}"#);
    let refused = cluster.muster(&["submit", "--file", &json]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(
        refused.stderr.contains("there is no field procs_per_nod; did you mean procsPerNode?"),
        "{refused:?}"
    );
}

#[test]
fn listings_are_json_with_the_names_of_grpcurl() {
    let cluster = Cluster::start(Settings::default());
    let node = cluster.muster(&["nodes", "--output", "json"]).json().remove(0);
    assert_eq!((&node["name"], &node["state"]), (&"n1".into(), &"NODE_STATE_READY".into()));
    assert!(node["inventory"]["total"]["cpuMillis"].as_u64().unwrap() >= 1000);
    let text = cluster.muster(&["nodes"]).ok();
    assert!(text.starts_with("NODE  ADDRESS") && text.lines().count() == 3, "{text}");
    let cordoned = cluster.muster(&["cordon", "n1", "--reason", "fan"]).ok();
    let by = format!("ready, cordoned by {} (fan)", user());
    assert!(cordoned.contains(&by), "{cordoned}");
    let id = cluster.submit(&["--nnodes", "2"], "true");
    assert_eq!(cluster.job(&id)["reason"], "waiting: 1 of 2 nodes; n1 refused: cordoned (fan)");
    cluster.muster(&["uncordon", "n1"]).ok();
    cluster.wait_for(&id, "SUCCEEDED");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let cluster = Cluster::start(Settings::default());
    let id = cluster.submit(&[], "yes | head -c 5000000");
    cluster.wait_for(&id, "SUCCEEDED");
    let muster = binary("muster");
    for command in [format!("logs {id}"), "nodes".to_owned(), "jobs --output json".to_owned()] {
        let script = format!("set -o pipefail; {} {command} | head -c 1 > /dev/null", muster.display());
        let outcome =
            Outcome::of(Command::new("bash").args(["-c", &script]).env("MUSTER_COORDINATOR", cluster.url()));
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{command}");
    }
}

#[test]
fn a_job_that_fails_at_once_still_shows_what_it_wrote() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let outcome = cluster.muster(&["submit", "--follow", "--", "sh", "-c", "echo first and last; exit 3"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, "first and last\n"), "{outcome:?}");
}
