//! A port of loopback on which nobody says who he is: other users of the machine are refused, in words; and connections
//! on which nothing is said leave room for those of the Unix socket and of probes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpStream;
use std::process::Command;

use muster_tests::{Daemon, Outcome, address_of, binary, eventually, http_address, http_get, skip};
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

/// Returns the value of a metric without labels.
fn metric(page: &str, name: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap()
}

#[test]
fn connections_of_nobody_leave_the_socket_and_the_probes_alone() {
    const FILES: u32 = 256;
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let data_dir = data_dir.to_str().unwrap();
    let args = ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data-dir", data_dir];
    let limited = ["sh", "-c", &format!("ulimit -n {FILES}; exec \"$@\""), "sh"].map(str::to_owned);
    let args = [&["coordinator"][..], &args].concat();
    let daemon = Daemon::start_behind(&limited, dir.path(), "log", &args);
    let (address, http) = (address_of(&daemon), http_address(&daemon));
    let socket = format!("unix:{data_dir}/muster.sock");
    let nodes = ["nodes", "--coordinator", &socket];

    let idle: Vec<_> = (0..FILES * 2).filter_map(|_| TcpStream::connect(&address).ok()).collect();
    let page = eventually("connections beyond the share", || {
        let (code, page) = http_get(&http, "/metrics");
        let refused = (code == 200).then(|| metric(&page, "muster_connections_refused_total"));
        if refused > Some(0) { Ok(page) } else { Err(format!("{code} {refused:?}")) }
    });
    assert_eq!(metric(&page, "muster_accepts_failed_total"), 0, "files are left");
    Outcome::of(Command::new(binary("muster")).args(nodes)).ok();
    assert!(daemon.log().contains("the rest is kept for nodes"), "{}", daemon.log());

    // Now files do run out, as far as the kernel is concerned.
    drop(idle);
    let pid = daemon.pid().to_string();
    let set_limit = |files: u32| {
        let limit = format!("--nofile={files}:{FILES}");
        Outcome::of(Command::new("prlimit").args(["--pid", &pid, &limit])).ok();
    };
    set_limit(3);
    let _one = TcpStream::connect(&address).unwrap();
    eventually("a line of it", || {
        let log = daemon.log();
        if log.contains("failed to take connections") { Ok(()) } else { Err(log) }
    });
    set_limit(FILES);
    let page = eventually("the port of probes", || {
        let (code, page) = http_get(&http, "/metrics");
        if code == 200 { Ok(page) } else { Err(code) }
    });
    let failed = metric(&page, "muster_accepts_failed_total");
    // Ten a second at most: a loop that does not wait makes hundreds of thousands.
    assert!((1..1000).contains(&failed), "{failed}");
    Outcome::of(Command::new(binary("muster")).args(nodes)).ok();
}
