//! `muster run`: torchrun's command line, with nothing else running.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use muster_tests::{
    Outcome, Place, binary, eventually, files, free_port, is_running, lines, run_dir, skip, torch_python,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

#[test]
fn ranks_have_the_terminal_of_the_command() {
    let place = Place::new();
    let script = place.script("echo out $RANK $LOCAL_RANK $WORLD_SIZE $*; echo err $RANK >&2; pwd");
    let outcome = place.run(&["--standalone", "--nproc-per-node", "2", "--no-python", &script, "--x", "y z"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let dir = place.path("").canonicalize().unwrap();
    let dir = dir.to_str().unwrap();
    assert_eq!(lines(&outcome.stdout), [dir, dir, "out 0 0 2 --x y z", "out 1 1 2 --x y z"]);
    assert_eq!(lines(&outcome.stderr), ["err 0", "err 1"]);

    let mut cat = place.command(&["--no-python", "cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    cat.stdin.take().unwrap().write_all(b"what comes in\n").unwrap();
    let mut said = String::new();
    cat.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((said.as_str(), cat.wait().unwrap().code()), ("what comes in\n", Some(0)));
}

#[test]
fn the_first_failure_is_reported() {
    let place = Place::new();
    let script = place.script(
        r#"[ $RANK = 0 ] && exec sleep 60
        printf %s '{"message":{"message":"E: x","extraInfo":{"py_callstack":"Traceback (most recent call last):\n  line 7\nE: x\n"}}}' \
            > $TORCHELASTIC_ERROR_FILE
        exit 3"#,
    );
    let outcome = place.run(&["--nproc-per-node", "2", "--no-python", &script]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    for words in [
        "ended with exit code 3: E: x",
        "  line 7",
        "first to fail: rank 1 of 2, here (local rank 1, attempt 0)",
    ] {
        assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
    }
    let outcome = place.run(&["--nproc-per-node", "2", "nothing.py"]);
    assert_eq!(outcome.code, 2, "{outcome:?}");
    assert!(outcome.stderr.contains("there is no nothing.py in"), "{outcome:?}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let outcome = place.run(&["--master-port", &port, "--no-python", "true"]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains(&format!("port {port} of 127.0.0.1 is taken")), "{outcome:?}");
    let outcome = place.run(&["--no-python", "no-such-program"]);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains(r#"program "no-such-program" was not found"#), "{outcome:?}");
}

#[test]
fn every_attempt_keeps_its_logs_and_only_faults_are_counted() {
    let place = Place::new();
    let script = place.script(
        "echo attempt $TORCHELASTIC_RESTART_COUNT of $TORCHELASTIC_MAX_RESTARTS\n\
         [ $TORCHELASTIC_RESTART_COUNT = 2 ] && exit 0; [ $RANK = 1 ] && kill -9 $$; exec sleep 60",
    );
    let logs = place.path("logs");
    let logs_arg = logs.to_str().unwrap();
    let args =
        ["--nproc-per-node=2", "--max_restarts=2", "--log_dir", logs_arg, "-r", "1", "--rdzv-id", "a/b"];
    // Each attempt has its own store at the same port.
    let port = free_port();
    let outcome = place.run(&[&args[..], &["--master-port", &port, "--no-python", &script]].concat());
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""), "{outcome:?}");
    assert!(outcome.stderr.contains("was ended by signal 9 (SIGKILL); restart 1 of 2"), "{outcome:?}");
    let dir = run_dir(&logs);
    assert!(dir.file_name().unwrap().to_str().unwrap().starts_with("a_b_"));
    let expected: BTreeMap<String, String> = (0..3)
        .flat_map(|attempt| [0, 1].map(|rank| (attempt, rank)))
        .map(|(attempt, rank)| {
            (format!("attempt_{attempt}/{rank}/stdout.log"), format!("attempt {attempt} of 2\n"))
        })
        .collect();
    assert_eq!(files(&dir), expected);
}

#[test]
fn streams_go_where_they_are_sent() {
    let place = Place::new();
    let script = place.script("echo apple $RANK; echo pear, $RANK >&2; printf half");
    let logs = place.path("logs");
    let args = ["--nproc-per-node", "3", "--log-dir", logs.to_str().unwrap(), "--role", "r"];
    let more = ["-t0:1,1:3", "-r=2:2", "--local-ranks-filter", "0,2", "--duplicate-stdout-filters", "apple"];
    let outcome = place.run(&[&args[..], &more, &["--no-python", &script]].concat());
    assert_eq!(outcome.code, 0, "{outcome:?}");
    // Rank 0: teed out, its own err. Rank 1: not shown, in its files. Rank 2: out shown, err in its file.
    let mut shown = outcome.stdout.replace("[r0]:half", "").replace("half", "");
    shown.push('\n');
    assert_eq!(lines(shown.trim_end()), ["[r0]:apple 0", "apple 2"], "{outcome:?}");
    assert_eq!(lines(&outcome.stderr), ["pear, 0"]);
    let found = files(&run_dir(&logs));
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    let expected = ["0/stdout.log", "1/stderr.log", "1/stdout.log", "2/stderr.log", "filtered_stdout.log"];
    assert_eq!(names, expected.map(|name| format!("attempt_0/{name}")));
    assert_eq!(found["attempt_0/1/stdout.log"], "apple 1\nhalf");
    assert_eq!(lines(&found["attempt_0/filtered_stdout.log"]), ["[1]:apple 1", "[r0]:apple 0"]);
}

#[test]
fn signals_are_passed_on_and_a_second_one_waits_for_nothing() {
    let place = Place::new();
    let polite =
        place.script("trap 'echo got INT $RANK; exit 0' INT; echo ready; while :; do sleep 0.05; done");
    let mut run = place.start(&["--nproc-per-node", "2", "--no-python", &polite]);
    let pid = Pid::from_raw(run.id().cast_signed());
    let mut out = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!([out.next().unwrap(), out.next().unwrap()], ["ready", "ready"]);
    kill(pid, Signal::SIGINT).unwrap();
    let mut said: Vec<String> = out.collect();
    said.sort();
    assert_eq!((said, run.wait().unwrap().code()), (vec!["got INT 0".into(), "got INT 1".into()], Some(1)));
    place.nothing_is_left();

    let deaf = place.script("trap '' INT TERM; echo ready; while :; do sleep 0.05; done");
    let mut run = place.start(&["--nproc-per-node", "2", "--no-python", &deaf]);
    let pid = Pid::from_raw(run.id().cast_signed());
    let mut out = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!([out.next().unwrap(), out.next().unwrap()], ["ready", "ready"]);
    kill(pid, Signal::SIGTERM).unwrap();
    let mut errors = BufReader::new(run.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(errors.next().unwrap().contains("again ends them at once"));
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(1));
    place.nothing_is_left();
}

#[test]
fn ranks_end_with_the_command() {
    let place = Place::new();
    let script =
        place.script("trap '' TERM HUP; (sleep 1000 & echo $!); echo $$; while :; do sleep 0.05; done");
    let mut run = place.start(&["--nproc-per-node", "1", "--no-python", &script]);
    let out = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    let pids: Vec<i32> = out.take(2).map(|line| line.parse().unwrap()).collect();
    run.kill().unwrap();
    run.wait().unwrap();
    eventually("the end of the ranks", || {
        let left: Vec<_> = pids.iter().filter(|pid| is_running(**pid)).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    place.nothing_is_left();
}

#[test]
fn a_rank_sees_what_torchrun_would_show_it() {
    const OWN: [&str; 2] = ["MUSTER_", "PYTHONFAULTHANDLER"];
    // Chosen anew by each run.
    const CHOSEN: [&str; 5] =
        ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "_", "MASTER_ADDR", "MASTER_PORT"];
    let Some(python) = torch_python() else {
        return skip(
            "the comparison with torchrun",
            "there is no Python with torch; `cargo xtask bench` brings one",
        );
    };
    let place = Place::new();
    let probe = "import json, os, sys\n\
         print(json.dumps({'argv': sys.argv, 'cwd': os.getcwd(), 'env': dict(os.environ), 'name': __name__,\n\
         'leads': os.getsid(0) == os.getpid(), 'unbuffered': sys.stdout.write_through, 'prefix': sys.prefix}))\n";
    std::fs::write(place.path("probe.py"), probe).unwrap();
    let path =
        std::env::join_paths([python.parent().unwrap(), Path::new("/usr/bin"), Path::new("/bin")]).unwrap();
    let port = free_port();
    for flags in [
        &["--standalone", "--nproc-per-node", "2"][..],
        &["-m", "--max-restarts", "3", "--role", "trainer"],
        &["--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port", &port],
    ] {
        let chosen = if flags.contains(&"--master-port") { &CHOSEN[..3] } else { &CHOSEN };
        let program = if flags.contains(&"-m") { "probe" } else { "probe.py" };
        let ranks = |command: &mut Command, logs: &str| -> BTreeMap<String, Value> {
            let logs = place.path(logs);
            command
                .args(["-r", "3", "--log-dir", logs.to_str().unwrap()])
                .args(flags)
                .args([program, "a", "--b=c"]);
            command.current_dir(place.path("")).env("PATH", &path).env_remove("OMP_NUM_THREADS");
            let outcome = Outcome::of(command);
            assert_eq!(outcome.code, 0, "{outcome:?}");
            let dir = run_dir(&logs);
            let said: BTreeMap<_, _> = files(&dir)
                .into_iter()
                .filter(|(name, _)| name.ends_with("stdout.log"))
                .map(|(name, text)| (name, serde_json::from_str(&text).unwrap()))
                .collect();
            std::fs::remove_dir_all(logs).unwrap();
            said
        };
        let mut torchrun = Command::new(&python);
        torchrun.args(["-m", "torch.distributed.run"]);
        let theirs = ranks(&mut torchrun, "theirs");
        let mut muster = Command::new(binary("muster"));
        muster.arg("run");
        let ours = ranks(&mut muster, "ours");
        assert_eq!(
            ours.keys().collect::<Vec<_>>(),
            theirs.keys().collect::<Vec<_>>(),
            "the layout of the logs"
        );
        for (mut ours, mut theirs) in ours.into_values().zip(theirs.into_values()) {
            for (name, value) in ours["env"].as_object_mut().unwrap() {
                if chosen.contains(&name.as_str()) {
                    assert!(!value.as_str().unwrap().is_empty(), "{name}");
                    *value = Value::Null;
                }
            }
            for (name, value) in theirs["env"].as_object_mut().unwrap() {
                if chosen.contains(&name.as_str()) {
                    *value = Value::Null;
                }
            }
            let env = ours["env"].as_object_mut().unwrap();
            env.retain(|name, _| !OWN.iter().any(|own| name.starts_with(own)));
            assert_eq!(ours, theirs, "{flags:?}");
        }
    }
}
