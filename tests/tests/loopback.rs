//! A port of loopback on which nobody says who he is: other users of the machine are refused, in words.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use muster_tests::{Daemon, Outcome, address_of, binary, eventually, skip};
use nix::unistd::Uid;

/// A user that every machine has.
const NOBODY: &str = "65534";

fn coordinator(dir: &tempfile::TempDir, name: &str, flags: &[&str]) -> (Daemon, String) {
    let data_dir = dir.path().join(name);
    let data_dir = data_dir.to_str().unwrap();
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--http-listen", "off", "--data-dir", data_dir];
    let daemon = Daemon::start(dir.path(), &format!("log-{name}"), &[&args[..], flags].concat());
    let url = format!("http://{}", address_of(&daemon));
    (daemon, url)
}

fn as_nobody(args: &[&str]) -> Outcome {
    let who = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"];
    Outcome::of(Command::new("setpriv").args(who).arg(binary("muster")).args(args))
}

#[test]
fn other_users_of_the_machine_need_to_be_let_in() {
    if !Uid::effective().is_root() || as_nobody(&["--version"]).code != 0 {
        return skip("calls of other users", "only root can make them, and they must reach the binary");
    }
    let dir = tempfile::tempdir().unwrap();
    let (daemon, url) = coordinator(&dir, "own", &[]);
    Outcome::of(Command::new(binary("muster")).args(["nodes", "--coordinator", &url])).ok();
    for args in [&["nodes"][..], &["submit", "--", "true"], &["healthcheck"]] {
        let refused = as_nobody(&[&["--coordinator", &url], args].concat());
        assert!(refused.code != 0, "{refused:?}");
        let words = "takes calls on loopback from that user and root, not from user 65534";
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
    eventually("the refusal's line", || {
        let audit = std::fs::read_to_string(dir.path().join("own/audit.jsonl")).unwrap_or_default();
        if audit.contains("\"job:") {
            return Err("a job was submitted".to_owned());
        }
        if audit.contains("not from user 65534") { Ok(()) } else { Err(audit) }
    });
    drop(daemon);
    for flags in [["--loopback-users", "root,nobody"], ["--loopback-users", "any"]] {
        let (_daemon, url) = coordinator(&dir, flags[1], &flags);
        as_nobody(&["nodes", "--coordinator", &url]).ok();
    }
    let unknown = ["coordinator", "--loopback-users", "no.one"];
    let refused = Outcome::of(Command::new(binary("muster")).args(unknown));
    assert!(refused.code == 2 && refused.stderr.contains("has no user \"no.one\""), "{refused:?}");
}
