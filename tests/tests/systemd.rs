//! The units of `deploy/systemd`, as far as systemd's own tools can judge them without a systemd that runs, and what the
//! daemons say to one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use muster_tests::{
    Cluster, Daemon, Outcome, PATIENCE, Settings, binary, brought, deployed, eventually, faketime_path, skip,
};
use nix::sys::signal::Signal;

const UNITS: [&str; 2] = ["muster-coordinator.service", "muster-worker.service"];

/// Returns one of systemd's tools, as it was brought.
fn tool(name: &str) -> Option<Command> {
    let found = brought(&format!("systemd/usr/bin/{name}"));
    if found.is_none() {
        skip(name, "`cargo xtask setup --tools` has brought no systemd");
    }
    let mut command = Command::new(found?);
    // The units of systemd itself are with its tools: this machine may have none.
    command.env("SYSTEMD_UNIT_PATH", brought_units());
    Some(command)
}

fn brought_units() -> PathBuf {
    let one = brought("systemd/usr/lib/systemd/system/basic.target").unwrap();
    one.parent().unwrap().to_owned()
}

fn unit(name: &str) -> String {
    std::fs::read_to_string(deployed("systemd").join(name)).unwrap()
}

/// Keys that systemd knows only since a later version than some that are in use, and may be passed over.
fn is_expected(warning: &str) -> bool {
    warning.contains("Unknown key") && warning.contains("'DelegateSubgroup'")
}

#[test]
fn units_are_valid() {
    let Some(mut analyze) = tool("systemd-analyze") else { return };
    let dir = tempfile::tempdir().unwrap();
    for name in UNITS {
        let text = unit(name).replace("/usr/bin/muster", binary("muster").to_str().unwrap());
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let paths = UNITS.map(|name| dir.path().join(name));
    let verified = Outcome::of(analyze.args(["verify", "--man=no"]).args(paths));
    let wrong: Vec<&str> = verified.stderr.lines().filter(|line| !is_expected(line)).collect();
    assert!(wrong.is_empty() && verified.code == 0, "{verified:?}");
}

/// A line that takes a protection away would be noticed here. systemd's measure is from 0 to 10.
#[test]
fn units_are_as_closed_as_they_can_be() {
    for (name, exposure_max) in UNITS.into_iter().zip([16, 55]) {
        let Some(mut analyze) = tool("systemd-analyze") else { return };
        analyze.args(["security", "--offline=yes", "--no-pager", &format!("--threshold={exposure_max}")]);
        let judged = Outcome::of(analyze.arg(deployed("systemd").join(name)));
        if judged.stderr.contains("unrecognized option") {
            return skip("systemd-analyze security --offline", "this systemd is older than 250");
        }
        assert_eq!(judged.code, 0, "{judged:?}");
    }
}

#[test]
fn users_and_directories_are_made_and_old_logs_go() {
    let Some(mut sysusers) = tool("systemd-sysusers") else { return };
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    let at_root = format!("--root={}", root.path().display());
    let conf = |name: &str| std::fs::canonicalize(deployed("systemd").join(name)).unwrap();
    Outcome::of(sysusers.arg(&at_root).arg(conf("muster.sysusers.conf"))).ok();
    let users = std::fs::read_to_string(root.path().join("etc/passwd")).unwrap();
    for name in UNITS {
        let text = unit(name);
        let user = text.lines().find_map(|line| line.strip_prefix("User=")).unwrap();
        assert!(users.lines().any(|line| line.starts_with(&format!("{user}:"))), "{user}: {users}");
    }

    if !nix::unistd::geteuid().is_root() {
        return skip("the units' directories", "only root can give them to their users");
    }
    let tmpfiles = |what: &str| {
        let mut command = tool("systemd-tmpfiles").unwrap();
        command.args([what, &at_root]).arg(conf("muster.tmpfiles.conf"));
        command
    };
    Outcome::of(&mut tmpfiles("--create")).ok();
    assert!(root.path().join("etc/muster/checks").is_dir());

    let log = root.path().join("var/lib/muster/logs/job/attempt_1/stdout.log");
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "words\n").unwrap();
    let Some(faketime) = faketime_path() else {
        return skip("the age of logs", "libfaketime could not be brought");
    };
    for (later, is_kept) in [("+20d", true), ("+40d", false)] {
        let mut clean = tmpfiles("--clean");
        clean.env("LD_PRELOAD", &faketime).env("FAKETIME", later);
        Outcome::of(&mut clean).ok();
        assert_eq!(log.exists(), is_kept, "{later}");
    }
}

/// Systemd's end of the socket.
fn listen(dir: &Path, name: &str) -> (UnixDatagram, String) {
    let path = dir.join(name);
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    (socket, format!("NOTIFY_SOCKET={}", path.display()))
}

fn heard(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// The arguments of a unit's ExecStart= as systemd would give them.
fn exec_start(name: &str, variables: &BTreeMap<&str, String>) -> Vec<String> {
    let text = unit(name);
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/muster ")).unwrap();
    let word = |word: &str| match word.strip_prefix('$') {
        Some(variable) => match variable.strip_prefix('{') {
            Some(braced) => vec![variables[braced.trim_end_matches('}')].clone()],
            None => variables[variable].split_whitespace().map(str::to_owned).collect(),
        },
        None => vec![word.to_owned()],
    };
    line.split(' ').flat_map(word).collect()
}

#[test]
fn daemons_started_as_the_units_say_tell_systemd_when_they_are_ready() {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let dir = cluster.dir.path().to_owned();
    let start = |name: &str, unit: &str, flags: &str| {
        let (socket, variable) = listen(&dir, &format!("{name}.socket"));
        let state = dir.join(name).display().to_string();
        let flags_of = if name == "c" { "COORDINATOR_ARGS" } else { "WORKER_ARGS" };
        let variables = BTreeMap::from([("STATE_DIRECTORY", state), (flags_of, flags.to_owned())]);
        let args = exec_start(unit, &variables);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let daemon = Daemon::start_behind(&["env".to_owned(), variable], &dir, name, &args);
        assert_eq!(heard(&socket), "READY=1\n", "{}", daemon.log());
        (daemon, socket)
    };
    let (mut coordinator, of_coordinator) =
        start("c", UNITS[0], "--listen 127.0.0.1:0 --http-listen 127.0.0.1:0");
    coordinator.signal(Signal::SIGTERM);
    assert_eq!(heard(&of_coordinator), "STOPPING=1\n");
    assert_eq!(coordinator.wait(), 0);

    // A worker is ready without a coordinator: what it holds of an earlier one it has taken over by then.
    let flags = format!("--name n1 --coordinator {}", cluster.url());
    let (worker, of_worker) = start("w", UNITS[1], &flags);
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    let id = cluster.submit(&[], "echo ${NOTIFY_SOCKET-none}; sleep 1000");
    cluster.wait_for(&id, "RUNNING");
    eventually("the rank's environment", || match cluster.output(&id, 0).as_str() {
        "none\n" => Ok(()),
        other => Err(other.to_owned()),
    });

    // `systemctl restart`: the rank runs on under the next daemon.
    let text = unit(UNITS[1]);
    assert!(text.contains("\nRestartKillSignal=SIGHUP\n") && text.contains("\nKillMode=process\n"));
    let before = cluster.job(&id);
    cluster.workers[0].signal(Signal::SIGHUP);
    assert_eq!(cluster.workers[0].wait(), 0);
    drop(of_worker);
    std::fs::remove_file(dir.join("w.socket")).unwrap();
    let (worker, of_worker) = start("w", UNITS[1], &flags);
    cluster.workers[0] = worker;
    cluster.wait_for_nodes(1);
    let after = cluster.job(&id);
    assert_eq!((&before["generation"], &before["state"]), (&after["generation"], &after["state"]));

    // `systemctl stop`: it is stopped in good order.
    cluster.workers[0].signal(Signal::SIGTERM);
    assert_eq!(heard(&of_worker), "STOPPING=1\n");
    assert_eq!(cluster.workers[0].wait(), 0);
}
