//! What surrounds a command: deep directories, names that are no text, and signals that were
//! ignored before it began.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use muster_tests::{Cluster, Nodes, Outcome, Place, Settings, binary, eventually, files, run_dir};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Bytes that are no UTF-8, with a line's end and a space.
const ODD: &[u8] = b"a\xff\xfe \nb";

/// A command that is started with SIGHUP ignored, as nohup does it.
fn under_nohup(words: &[&str]) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(binary("muster")).args(words);
    shell
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

#[test]
fn sockets_find_a_place_however_deep_the_temporary_one_is() {
    let place = Place::new();
    let deep = place.path("tmp").join("x".repeat(90));
    std::fs::create_dir(&deep).unwrap();
    // A rank reports a point, which needs the socket.
    let script = place.script("echo $MUSTER_TELEMETRY; [ -S \"$MUSTER_TELEMETRY\" ]");
    let args = ["--nproc-per-node=2", "--no-python", &script];
    let outcome = Outcome::of(place.command(&args).env("TMPDIR", &deep));
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let sockets: Vec<&Path> = outcome.stdout.lines().map(Path::new).collect();
    assert_eq!(sockets.len(), 2, "{outcome:?}");
    for socket in sockets {
        let dir = socket.parent().unwrap();
        eventually("the end of the sockets", || if dir.exists() { Err(dir) } else { Ok(()) });
    }
    // The ranks go with the command, and the sockets with them.
    let script = place.script("echo $MUSTER_TELEMETRY; exec sleep 1000");
    let mut run = place.command(&["--no-python", &script]);
    let mut run = run.env("TMPDIR", &deep).stdout(Stdio::piped()).spawn().unwrap();
    let mut socket = String::new();
    BufReader::new(run.stdout.take().unwrap()).read_line(&mut socket).unwrap();
    run.kill().unwrap();
    run.wait().unwrap();
    let dir = Path::new(socket.trim()).parent().unwrap();
    eventually("the end of the sockets", || if dir.exists() { Err(dir) } else { Ok(()) });
    std::fs::remove_dir_all(&deep).unwrap();
    place.nothing_is_left();
}

#[test]
fn what_is_no_text_reaches_the_ranks_as_it_is() {
    let place = Place::new();
    let odd = |text: &str| OsStr::from_bytes(&[text.as_bytes(), ODD].concat()).to_owned();
    let dir = place.path("").join(odd("dir"));
    let tmp = place.path("tmp").join(odd("tmp"));
    let logs = dir.join(odd("logs"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::create_dir(&tmp).unwrap();
    let bytes = "hex() { printf %s \"$1\" | od -An -v -tx1 | tr -d ' \\n'; echo; }\n";
    let script = place
        .script(&format!("{bytes} hex \"$1\"; hex \"$ODD\"; hex \"$PWD\"; [ -S \"$MUSTER_TELEMETRY\" ]"));
    let program = dir.join(odd("program"));
    std::fs::rename(place.path(&script), &program).unwrap();
    let mut command = place.command(&["--nproc-per-node=2", "-r", "1", "--log-dir"]);
    command.arg(&logs).arg("--no-python").arg(Path::new(".").join(program.file_name().unwrap()));
    command.arg(odd("arg")).env("ODD", odd("env")).env("TMPDIR", &tmp).current_dir(&dir);
    let outcome = Outcome::of(&mut command);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let real = dir.canonicalize().unwrap();
    let expected = [odd("arg"), odd("env"), real.into_os_string()].map(|text| hex(text.as_bytes()) + "\n");
    for local_rank in [0, 1] {
        let said = &files(&run_dir(&logs))[&format!("attempt_0/{local_rank}/stdout.log")];
        assert_eq!(*said, expected.concat());
    }
    // A script of Python's, found by its name.
    let script = odd("script.py");
    std::fs::write(dir.join(&script), "import os, sys; os.write(1, os.fsencode(sys.argv[1]))").unwrap();
    for flag in [None, Some("--run-path")] {
        let mut command = place.command(&[]);
        let command = command.args(flag).arg(&script).arg(odd("arg")).current_dir(&dir);
        let said = command.env("PYTHON_EXEC", "python3").output().unwrap();
        assert_eq!(said.stdout, odd("arg").as_bytes(), "{flag:?}: {said:?}");
    }
    // A coordinator takes text alone, and nothing starts before that is said.
    let mut submit = Command::new(binary("muster"));
    let submit = Outcome::of(submit.args(["submit", "--", "echo"]).arg(odd("arg")));
    assert_eq!(submit.code, 2, "{submit:?}");
    assert!(submit.stderr.contains("invalid UTF-8"), "{submit:?}");
    std::fs::remove_dir_all(&tmp).unwrap();
    place.nothing_is_left();
}

#[test]
fn a_hangup_that_was_ignored_ends_no_run() {
    let place = Place::new();
    let script =
        place.script("grep SigIgn /proc/self/status; while [ ! -e go ]; do sleep 0.05; done; echo done");
    let mut command = under_nohup(&["run", "--no-python", &script]);
    command.current_dir(place.path("")).env("TMPDIR", place.path("tmp"));
    let mut run = Nodes(vec![command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()]);
    let mut said = BufReader::new(run.0[0].stdout.take().unwrap()).lines().map(Result::unwrap);
    let mask = said.next().unwrap();
    let mask = u64::from_str_radix(mask.trim_start_matches("SigIgn:").trim(), 16).unwrap();
    assert_eq!(mask & 1, 0, "a rank has the default, as under torchrun: {mask:x}");
    kill(pid(&run.0[0]), Signal::SIGHUP).unwrap();
    std::fs::write(place.path("go"), "").unwrap();
    assert_eq!(said.next().unwrap(), "done");
    let end = run.ends().remove(0);
    assert_eq!((end.code, end.stderr.as_str()), (0, ""), "{end:?}");

    // Others end a run in good order, SIGHUP among them where nobody ignores it.
    std::fs::remove_file(place.path("go")).unwrap();
    let mut run = place.start(&["--no-python", &script]);
    BufReader::new(run.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    kill(pid(&run), Signal::SIGHUP).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(1));
    place.nothing_is_left();
}

#[test]
fn a_hangup_that_was_ignored_ends_no_daemon() {
    let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let data = cluster.dir.path().join("data-nohup");
    let url = cluster.url();
    let args = ["worker", "--name", "n1", "--coordinator", &url, "--data-dir", data.to_str().unwrap()];
    let mut worker = under_nohup(&args);
    let worker = Nodes(vec![worker.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()]);
    let job = || cluster.muster(&["submit", "--follow", "--", "true"]);
    assert_eq!(job().code, 0);
    kill(pid(&worker.0[0]), Signal::SIGHUP).unwrap();
    let after = job();
    assert_eq!(after.code, 0, "{after:?}");
}
