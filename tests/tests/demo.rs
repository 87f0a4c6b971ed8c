//! The demo in its short form: real training on real images, and nothing left behind, however it ends.

use std::process::{Child, Command, Stdio};

use muster_tests::{Outcome, binary, eventually, processes_with, skip, trainer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The demo with a mark in its environment, which every process it starts inherits.
fn demo(mark: &str) -> Option<Command> {
    if trainer().is_none() {
        skip("the demo", "muster-trainer is not built; it needs libtorch, which `cargo xtask test` brings");
        return None;
    }
    let mut command = Command::new(binary("muster"));
    command.args(["demo", "--short"]).env("MUSTER_TEST_MARK", mark);
    Some(command)
}

fn nothing_is_left(mark: &str) {
    eventually("the end of every process", || {
        let left = processes_with(mark);
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
}

#[test]
fn it_trains_and_leaves_nothing() {
    let mark = "demo-to-the-end";
    let Some(mut command) = demo(mark) else { return };
    let outcome = Outcome::of(&mut command);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let accuracy = outcome.stdout.lines().find_map(|line| line.strip_prefix("accuracy on the test images: "));
    let accuracy: f64 = accuracy.and_then(|rest| rest.trim_end_matches(" %").parse().ok()).unwrap();
    assert!(accuracy > 50.0, "ten classes by chance are 10 %: {outcome:?}");
    assert!(
        outcome.stderr.contains("images/s") && outcome.stdout.contains("grpcurl -plaintext"),
        "{outcome:?}"
    );
    nothing_is_left(mark);
}

#[test]
fn interrupted_or_killed_it_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let mark = format!("demo-{signal}");
        let Some(mut command) = demo(&mark) else { return };
        let mut child: Child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        eventually("ranks that train", || {
            let running = processes_with(&mark);
            let ranks = running.iter().filter(|(_, command)| command.contains("muster-trainer")).count();
            if ranks == 4 { Ok(()) } else { Err(running) }
        });
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        let status = child.wait().unwrap();
        let expected = if signal == Signal::SIGKILL { None } else { Some(130) };
        assert_eq!(status.code(), expected, "{signal}");
        nothing_is_left(&mark);
    }
}
