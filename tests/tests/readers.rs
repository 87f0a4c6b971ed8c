//! Readers of what the commands print: some pause, some go, some never come. Neither ranks nor commands wait for them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use muster_tests::{Cluster, Nodes, Outcome, Place, Settings, eventually, files, free_port, lines, run_dir};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A pipe into which nothing more fits, and its end that is not read.
fn full_pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe().unwrap();
    let mut write = File::from(write);
    let flags = OFlag::from_bits_retain(fcntl(&write, FcntlArg::F_GETFL).unwrap());
    fcntl(&write, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    while write.write(&[b'.'; 4096]).is_ok() {}
    while write.write(b".").is_ok() {}
    fcntl(&write, FcntlArg::F_SETFL(flags)).unwrap();
    (write, read)
}

/// A pipe whose reader has gone.
fn closed_pipe() -> File {
    let (_, write) = nix::unistd::pipe().unwrap();
    File::from(write)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

#[test]
fn ranks_have_their_grace_though_nobody_reads_what_the_command_says() {
    let place = Place::new();
    let script = place
        .script("trap 'echo saved >> saved; exit 0' INT; echo ready > ready; while :; do sleep 0.05; done");
    let (full, _unread) = full_pipe();
    let null = || File::open("/dev/null").unwrap();
    for (name, out, err) in [
        ("closed", closed_pipe(), closed_pipe()),
        ("full", full.try_clone().unwrap(), full),
        ("a full disk", File::create("/dev/full").unwrap(), File::create("/dev/full").unwrap()),
        ("not for writing", null(), null()),
    ] {
        let mut command = place.command(&["--no-python", "-r", "3", &script]);
        let mut run = Nodes(vec![command.stdout(out).stderr(err).spawn().unwrap()]);
        eventually("the rank", || place.path("ready").metadata());
        kill(pid(&run.0[0]), Signal::SIGINT).unwrap();
        let code = eventually(name, || run.0[0].try_wait().unwrap().ok_or("it runs")).code();
        assert_eq!(code, Some(1), "{name}: as after any signal, not that of a panic");
        assert_eq!(std::fs::read_to_string(place.path("saved")).unwrap(), "saved\n", "{name}");
        for file in ["ready", "saved"] {
            std::fs::remove_file(place.path(file)).unwrap();
        }
        place.nothing_is_left();
    }
}

#[test]
fn a_run_without_any_output_succeeds() {
    let place = Place::new();
    for redirection in ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "> /dev/full 2>&1"] {
        let muster = muster_tests::binary("muster");
        let line = format!("exec {} run --tee 3 --no-python echo x {redirection}", muster.display());
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &line]).current_dir(place.path("")).env("TMPDIR", place.path("tmp"));
        assert_eq!(Outcome::of(&mut command).code, 0, "{redirection}");
    }
    place.nothing_is_left();
}

/// Its reader takes nothing until the ranks have ended, on both nodes of a run whose lease is ten seconds.
#[test]
fn a_reader_that_pauses_holds_up_no_rank() {
    let place = Place::new();
    // 4 MiB, far beyond what pipes and queues hold; then longer than a lease.
    let script = place.script(
        "i=0; while [ $i -lt 64 ]; do head -c 65536 /dev/zero | tr '\\0' x; echo; i=$((i+1)); done; \
         sleep 12; echo done $RANK > done.$RANK",
    );
    let logs = place.path("logs");
    let endpoint = format!("127.0.0.1:{}", free_port());
    let start = |number: usize| {
        let logs = logs.join(number.to_string());
        let mut command = place.command(&["--nnodes=2", "--rdzv-backend=c10d", "--tee=3"]);
        command.args(["--rdzv-endpoint", &endpoint, "--log-dir", logs.to_str().unwrap()]);
        command.args(["--no-python", &script]).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut nodes = Nodes(vec![start(0), start(1)]);
    for rank in [0, 1] {
        eventually("the rank's end", || place.path(&format!("done.{rank}")).metadata());
    }
    // Their readers are still there, and read nothing.
    for node in &mut nodes.0 {
        let ended = eventually("the end of the command", || node.try_wait().unwrap().ok_or("it runs"));
        assert_eq!(ended.code(), Some(0));
        let mut said = String::new();
        node.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains("bytes were not shown, for nothing read them in time; they are in"), "{said}");
    }
    for number in [0, 1] {
        let found = files(&run_dir(&logs.join(number.to_string())));
        let out = found.iter().find(|(name, _)| name.ends_with("stdout.log")).unwrap().1;
        assert_eq!(out.len(), 64 * 65537, "the file has all of it");
    }
}

#[test]
fn a_reader_that_comes_back_has_everything() {
    let place = Place::new();
    let script = place.script("seq 1 200000; echo ready > ready; while [ ! -e go ]; do sleep 0.05; done");
    let mut run = place.start(&["--tee", "1", "--no-python", &script]);
    eventually("the rank's output", || place.path("ready").metadata());
    std::fs::write(place.path("go"), "").unwrap();
    let mut text = String::new();
    run.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
    let expected: Vec<String> = (1..=200_000).map(|number| format!("[default0]:{number}\n")).collect();
    let expected = expected.concat();
    assert!(text == expected, "{} bytes instead of {}", text.len(), expected.len());
}

/// What is written without the end of a line, on a terminal.
#[test]
fn prompts_and_bars_are_shown_as_they_come() {
    let place = Place::new();
    let script = place.script(
        "[ $RANK = 1 ] && while [ ! -e asked ]; do sleep 0.02; done
         [ $RANK = 1 ] && echo other && exit
         printf 'name? '; while [ ! -e answered ]; do sleep 0.02; done
         printf 'x\\n 10%%\\r 20%%\\r'; printf ' 30%%\\n'",
    );
    let terminal = openpty(None, None).unwrap();
    let mut command = place.command(&["--nproc-per-node=2", "--tee=3", "--no-python", &script]);
    command.stdin(Stdio::null()).stdout(terminal.slave.try_clone().unwrap()).stderr(terminal.slave);
    let mut run = Nodes(vec![command.spawn().unwrap()]);
    drop(command);
    let mut reader = File::from(terminal.master);
    let mut seen = String::new();
    let mut until = |words: &str| {
        while !seen.contains(words) {
            let mut bytes = [0; 1024];
            let read = reader.read(&mut bytes).unwrap_or(0);
            assert!(read > 0, "the end came before {words:?}: {seen:?}");
            seen.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
        seen.clone()
    };
    until("[default0]:name? ");
    std::fs::write(place.path("asked"), "").unwrap();
    // Another rank does not go on with that line.
    let text = until("other");
    assert!(text.contains("[default0]:name? \r\n[default1]:other"), "{text:?}");
    std::fs::write(place.path("answered"), "").unwrap();
    let text = until("30%");
    for line in ["[default0]:x\r\n", "[default0]: 10%\r\n", "[default0]: 20%\r\n", "[default0]: 30%"] {
        assert!(text.contains(line), "{line:?}: {text:?}");
    }
    let code = eventually("the end", || run.0[0].try_wait().unwrap().ok_or(())).code();
    assert_eq!(code, Some(0));
}

#[test]
fn logs_that_are_followed_show_prompts_and_keep_the_streams_apart() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let go = cluster.dir.path().join("go");
    let script = format!(
        "printf 'name? '; echo wrong >&2; while [ ! -e {} ]; do sleep 0.02; done; echo x",
        go.display()
    );
    let id = cluster.submit(&["--nproc-per-node", "2"], &script);
    let mut command = std::process::Command::new(muster_tests::binary("muster"));
    command.args(["logs", "-f", &id, "--stream", "stdout"]).env("MUSTER_COORDINATOR", cluster.url());
    let mut follows = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = follows.stdout.take().unwrap();
    let mut seen = String::new();
    while !(seen.contains("[0]: name? ") && seen.contains("[1]: name? ")) {
        let mut bytes = [0; 256];
        let read = out.read(&mut bytes).unwrap();
        assert!(read > 0, "{seen:?}");
        seen.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    std::fs::write(go, "").unwrap();
    assert_eq!(follows.wait().unwrap().code(), Some(0));
    cluster.wait_for(&id, "SUCCEEDED");
    for (args, out, err) in [
        (&["--stream", "stderr"][..], &[][..], &["[0]: wrong", "[1]: wrong"][..]),
        (&["--stream", "stdout"], &["[0]: name? x", "[1]: name? x"], &[]),
        (&["--stream", "stderr", "--rank", "0"], &[], &["wrong"]),
        (&[], &["[0]: name? x", "[1]: name? x"], &["[0]: wrong", "[1]: wrong"]),
    ] {
        let outcome = cluster.muster(&[&["logs", &id], args].concat());
        assert_eq!(
            (lines(&outcome.stdout), lines(&outcome.stderr)),
            (out.to_vec(), err.to_vec()),
            "{args:?}"
        );
    }
}

/// A coordinator whose log nobody reads goes on, and says how much is missing once somebody does.
#[test]
fn a_log_that_nobody_reads_stops_no_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(muster_tests::binary("muster"));
    command.args(["coordinator", "--listen", "127.0.0.1:0", "--http-listen", "off", "--store", "memory"]);
    command.args(["--log-format", "json"]);
    command.arg("--data-dir").arg(dir.path().join("data")).env("RUST_LOG", "trace");
    let mut daemon = Nodes(vec![command.stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap()]);
    let mut log = BufReader::new(daemon.0[0].stderr.take().unwrap());
    let address = loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "it ended");
        let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        if let Some(address) = json["listening"].as_str() {
            break address.to_owned();
        }
    };
    let ask = || {
        let muster = muster_tests::binary("muster");
        let mut jobs = std::process::Command::new(muster);
        Outcome::of(jobs.args(["jobs", "--coordinator", &format!("http://{address}")])).ok()
    };
    // At this level each call is some kilobytes of log: a pipe and the queue are full after these.
    for _ in 0..100 {
        ask();
    }
    let mut said = String::new();
    while !said.contains("lines were left out here") {
        said.clear();
        assert!(log.read_line(&mut said).unwrap() > 0, "nothing was left out");
    }
    let gap: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(gap["lines"].as_u64().unwrap() > 0, "{gap}");
}

#[test]
fn a_command_line_that_is_wrong_is_said_to_whoever_reads_it() {
    let muster = muster_tests::binary("muster");
    let (full, _unread) = full_pipe();
    let mut wrong = std::process::Command::new(&muster);
    let mut wrong = wrong.arg("nonsense").stderr(full).spawn().unwrap();
    let code = eventually("the end", || wrong.try_wait().unwrap().ok_or("it waits for its reader"));
    assert_eq!(code.code(), Some(2));
    let full = File::create("/dev/full").unwrap();
    let help = std::process::Command::new(&muster).arg("--help").stdout(full).output().unwrap();
    assert_eq!(help.status.code(), Some(1), "{help:?}");
    assert!(String::from_utf8_lossy(&help.stderr).contains("failed to write the output"), "{help:?}");
}

#[test]
fn a_follower_whose_output_is_not_read_can_be_interrupted() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let mut command = std::process::Command::new(muster_tests::binary("muster"));
    command.args(["submit", "--follow", "--", "yes"]).env("MUSTER_COORDINATOR", cluster.url());
    let mut follows = Nodes(vec![command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()]);
    let child = &mut follows.0[0];
    let said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut said = said.skip_while(|line| !line.starts_with("running"));
    said.next().unwrap();
    // The first byte; then the pipe and the queue are soon full.
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    kill(pid(child), Signal::SIGINT).unwrap();
    let code = eventually("the end", || child.try_wait().unwrap().ok_or("it waits for its reader")).code();
    assert_eq!(code, Some(130));
    assert!(said.next().unwrap().contains("runs on; stop it with `muster cancel"));
}
