//! What `muster doctor` finds on hosts that have something wrong, and how it says so.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use muster_tests::{
    Cluster, Cut, FakeMachine, Netns, Outcome, Rail, Settings, binary, faketime_path, netns_address, skip,
};
use serde_json::Value;

/// Runs it behind a shell that has set something first.
fn doctor(before: &str, args: &[&str]) -> Outcome {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{before}\nexec \"$@\"")).arg("sh").arg(binary("muster"));
    Outcome::of(command.arg("doctor").args(args).env_remove("MUSTER_COORDINATOR"))
}

/// Check, grade and words of everything that is not as it should be.
fn ill(outcome: &Outcome) -> Vec<(String, String, String)> {
    let all = serde_json::Deserializer::from_str(&outcome.stdout).into_iter::<Value>();
    let text = |one: &Value, name: &str| one[name].as_str().unwrap().to_owned();
    all.map(Result::unwrap)
        .filter(|one| one["grade"] == "warning" || one["grade"] == "wrong")
        .map(|one| (text(&one, "check"), text(&one, "grade"), text(&one, "found")))
        .collect()
}

#[test]
fn what_is_wrong_is_named_with_its_remedy_and_the_exit_code_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut rails = [Rail::Well; 8];
    (rails[3], rails[6]) = (Rail::Down, Rail::Slow);
    let machine = FakeMachine::make(dir.path(), rails, ["0", "1"]);
    let flags = [&machine.flags()[..], &["--output", "json"]].concat();
    // Nobody can raise a hard limit again, and anybody can lower one.
    let outcome = doctor("ulimit -l 64; ulimit -n 4096", &flags);
    let expected = [
        ("memlock", "wrong", "64 KiB of memory can be locked, and RDMA locks all of its buffers"),
        ("open files", "warning", "4096 files may be open; jobs with many ranks need 65536"),
        ("port mlx5_3:1", "wrong", "is DOWN (Disabled): NCCL passes over it without a word"),
        ("port mlx5_6:1", "warning", "has 200 Gb/s (2X NDR), and most have 400"),
    ];
    let found = ill(&outcome);
    let found: Vec<_> = found.iter().map(|(a, b, c)| (a.as_str(), b.as_str(), c.as_str())).collect();
    // The rest depends on this very machine.
    let found: Vec<_> =
        found.into_iter().filter(|(check, ..)| *check != "address" && *check != "disk").collect();
    assert_eq!((outcome.code, found), (1, expected.to_vec()), "{outcome:?}");
    let text = doctor("ulimit -l 64", &machine.flags());
    assert!(
        text.stdout.contains("to mend:\n  memlock: LimitMEMLOCK=infinity in the daemon's unit"),
        "{text:?}"
    );
    assert_eq!((text.code, text.stderr.as_str()), (1, ""));
}

#[test]
fn a_coordinator_that_is_not_there_and_a_clock_that_is_off_are_found() {
    let outcome = doctor("", &["--coordinator", "http://127.0.0.1:1", "--output", "json"]);
    let found = ill(&outcome).into_iter().find(|(check, ..)| check == "coordinator").unwrap();
    assert_eq!((outcome.code, found.1.as_str()), (1, "wrong"));
    assert!(found.2.starts_with("http://127.0.0.1:1 cannot be reached"), "{found:?}");

    let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let flags = ["--coordinator", &cluster.url(), "--output", "json"];
    let sound = doctor("", &flags);
    let checks: Vec<String> = ill(&sound).into_iter().map(|(check, ..)| check).collect();
    assert!(
        !checks.contains(&"coordinator".to_owned()) && !checks.contains(&"clock".to_owned()),
        "{sound:?}"
    );
    let Some(faketime) = faketime_path() else {
        return skip("a clock that is off", "`cargo xtask setup` has brought no libfaketime");
    };
    let before =
        format!("export LD_PRELOAD={} FAKETIME=-3600 FAKETIME_DONT_FAKE_MONOTONIC=1", faketime.display());
    let (_, grade, found) =
        ill(&doctor(&before, &flags)).into_iter().find(|(check, ..)| check == "clock").unwrap();
    assert_eq!(grade, "warning");
    let seconds: u64 = found.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
    assert!(
        found.starts_with("it differs from the coordinator's by ") && seconds.abs_diff(3600) < 60,
        "{found}"
    );
}

#[test]
fn a_host_whose_ports_are_blocked_is_found() {
    let Some(netns) = Netns::new(3) else {
        return skip("blocked ports", "this machine lets us make no network namespaces");
    };
    // What the second sends to the first is lost without a word, as behind a firewall.
    netns.cut(1, Cut::Up);
    let prefix = netns.prefix(1);
    let (open, blocked) = (netns_address(2), netns_address(0));
    let mut command = Command::new(&prefix[0]);
    command.args(&prefix[1..]).arg(binary("muster")).arg("doctor").env_remove("MUSTER_COORDINATOR");
    let outcome = Outcome::of(command.args(["--peer", &open, "--peer", &blocked, "--output", "json"]));
    let found = ill(&outcome);
    let of = |peer: &str| found.iter().find(|(check, ..)| *check == format!("peer {peer}"));
    assert_eq!(of(&open), None, "nothing listens there, and it is reached: {outcome:?}");
    let (_, grade, why) = of(&blocked).unwrap_or_else(|| panic!("{outcome:?}"));
    assert_eq!((outcome.code, grade.as_str()), (1, "wrong"));
    assert!(why.contains("does not answer: a firewall drops what is sent there"), "{why}");
}
