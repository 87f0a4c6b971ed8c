//! Torch's own client against this server, and against torch's.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "tests wait on the clock of the machine")]

mod hostile;
mod raw;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use muster_tcpstore::{Limits, Running, Server};
use serde_json::Value;

/// Ranks of the gang.
const SIZE: u32 = 4;

fn store(limits: Limits) -> Running {
    Server::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), limits).unwrap().start().unwrap()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A Python that has torch, if there is one here.
fn python() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.deps/python/bin/python3");
    let path = std::env::var_os("MUSTER_TORCH_PYTHON").map_or(path, PathBuf::from);
    if path.is_file() {
        return Some(path);
    }
    // Written to the stream itself, past the test runner's capture, so that it is seen.
    let why = "there is no Python with torch; `cargo xtask bench` brings one";
    writeln!(std::io::stderr(), "SKIPPED: torch's own client against the store: {why}").ok();
    None
}

fn script(python: &Path, name: &str) -> Command {
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance").join(name));
    command.stdin(Stdio::piped()).env("TORCH_CPP_LOG_LEVEL", "ERROR").env("OMP_NUM_THREADS", "1");
    command
}

/// What the script printed.
fn run(python: &Path, port: u16) -> Vec<Value> {
    let output = script(python, "script.py").arg(port.to_string()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn torchs_client_cannot_tell_this_server_from_torchs() {
    let Some(python) = python() else { return };
    let mut theirs = script(&python, "server.py").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(theirs.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let expected = run(&python, line.trim().parse().unwrap());
    drop(theirs.stdin.take());
    theirs.wait().unwrap();
    let ours = store(Limits::default());
    let answers = run(&python, ours.address().port());
    assert!(expected.len() > 50, "{expected:?}");
    for (ours, theirs) in answers.iter().zip(&expected) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(answers.len(), expected.len());
    eventually("the end of all connections", || ours.observe().clients.is_empty());
    let snapshot = ours.observe();
    assert_eq!((snapshot.joined, snapshot.refused), (1, 2), "{snapshot:?}");
}

fn rank(python: &Path, address: SocketAddr, rank: u32) -> Child {
    let env = [
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", SIZE.to_string()),
        ("MASTER_ADDR", address.ip().to_string()),
        ("MASTER_PORT", address.port().to_string()),
        ("TORCHELASTIC_USE_AGENT_STORE", "True".to_owned()),
        ("GLOO_SOCKET_IFNAME", "lo".to_owned()),
    ];
    script(python, "gang.py").envs(env).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn ranks_meet_here_and_whoever_looks_sees_who_is_missing() {
    let Some(python) = python() else { return };
    let store = store(Limits::default());
    let mut ranks: Vec<Child> = [0, 1, 3].map(|number| rank(&python, store.address(), number)).into();
    let present: BTreeSet<u32> = [0, 1, 3].into();
    eventually("three ranks wait for the fourth", || {
        let seen = store.observe();
        seen.ranks() == present && seen.awaited_ranks() == [2].into()
    });
    let seen = store.observe();
    assert_eq!(seen.joined, 3);
    let processes: BTreeSet<u32> = ranks.iter().map(Child::id).collect();
    assert_eq!(seen.clients.iter().filter_map(|client| client.process).collect::<BTreeSet<_>>(), processes);
    assert_eq!(seen.awaited().keys().copied().collect::<Vec<_>>(), ["default_pg/0//cpu//0/2"]);
    ranks.push(rank(&python, store.address(), 2));
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    eventually("the end of all connections", || store.observe().clients.is_empty());
    // Each rank has opened two stores.
    assert_eq!((store.observe().joined, store.observe().refused), (u64::from(2 * SIZE), 0));
}
