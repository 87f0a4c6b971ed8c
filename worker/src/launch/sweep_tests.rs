//! Processes that try to outlive their gang do not.

use std::process::{Child, Command, Stdio};

use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::Signal;
use rustix::process::{WaitOptions, wait};

use super::*;

/// What a stand-in for a shim runs.
const SCRIPT: &str = "MUSTER_TEST_SCRIPT";
const BOUND: Duration = Duration::from_secs(20);

/// Not a test: what [`Shim`] is when it is another process.
#[test]
fn stand_in_for_a_shim() {
    let Some(script) = std::env::var_os(SCRIPT) else { return };
    set_pdeathsig(Signal::SIGKILL).unwrap();
    set_child_subreaper(true).unwrap();
    Command::new("sh").arg("-c").arg(script).env_remove(SCRIPT).status().unwrap();
    loop {
        wait(WaitOptions::NOHANG).ok();
        std::thread::sleep(PAUSE_MIN);
    }
}

/// A process that is the subreaper of those that a script starts.
struct Shim {
    child: Child,
    mark: String,
}

impl Shim {
    fn start(script: &str) -> Self {
        let mark = format!("test/{}@{}", uuid::Uuid::new_v4(), std::process::id());
        let child = Command::new("/proc/self/exe")
            .args(["--exact", "launch::sweep::tests::stand_in_for_a_shim", "--nocapture"])
            .env(SCRIPT, script)
            .env(MARK, &mark)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, mark }
    }

    fn process(&self) -> Process {
        Process::of(i32::try_from(self.child.id()).unwrap()).unwrap()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        Gang { mark: Some(&self.mark), ..Gang::default() }.kill_all(BOUND);
    }
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what}");
}

/// Two that are daemons by the book: forked twice, in sessions of their own. Both parents have ended.
const DAEMONS: &str = "(setsid sh -c 'sleep 1000; true' &) ; (setsid sleep 1000 &)";

#[test]
fn daemons_are_found_as_descendants_of_the_subreaper() {
    // Nothing has the mark, whose owner might have cleared its environment.
    let shim = Shim::start(&format!("unset {MARK}; {DAEMONS}"));
    let root = shim.process();
    let gang = Gang { shim: Some(root), ..Gang::default() };
    let names =
        || -> Vec<String> { gang.look().iter().filter_map(|p| Some(procfs::stat(p.pid)?.name)).collect() };
    eventually("three are there, and the shell is not", || {
        names().len() == 3 && names().iter().filter(|name| *name == "sleep").count() == 2
    });
    let before = gang.look();
    assert_eq!(gang.kill_all(BOUND), BTreeSet::new());
    assert!(before.iter().all(|process| !process.is_alive()));
    assert!(root.is_alive(), "the shim itself goes on, to tell the end");
    let other = Process { start_time: root.start_time + 1, ..root };
    assert!(Gang { shim: Some(other), ..gang }.look().is_empty(), "the number is another's now");
}

#[test]
fn daemons_are_found_by_their_mark_when_the_shim_is_dead() {
    let mut shim = Shim::start(DAEMONS);
    let root = shim.process();
    let mark = shim.mark.clone();
    let gang = Gang { shim: Some(root), mark: Some(&mark), cgroup: None };
    eventually("shim and daemons are there", || gang.look().len() == 4);
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    let similar = format!("{mark}0");
    assert!(Gang { mark: Some(&similar), ..gang }.look().is_empty(), "it is another gang's mark");
    let before = gang.look();
    assert_eq!(before.len(), 3, "{before:?}");
    assert_eq!(gang.kill_all(BOUND), BTreeSet::new());
    assert!(before.iter().all(|process| !process.is_alive()));
}

/// A program that is another process all the time: each starts the next in a session of its own, and ends.
pub(in crate::launch) struct Hopper(tempfile::TempDir);

impl Hopper {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // One that escapes must not outlive the tests.
        let script = format!("echo >> $0.hops; kill -0 {} && setsid sh $0 &\n", std::process::id());
        std::fs::write(dir.path().join("hop.sh"), script).unwrap();
        Self(dir)
    }

    pub fn command(&self) -> String {
        format!("sh {}/hop.sh 2>/dev/null &", self.0.path().display())
    }

    fn hops(&self) -> u64 {
        std::fs::metadata(self.0.path().join("hop.sh.hops")).map_or(0, |meta| meta.len())
    }

    pub fn await_hops(&self) {
        let before = self.hops();
        eventually("it hops", || self.hops() > before + 5);
    }

    pub fn assert_gone(&self) {
        let before = self.hops();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(self.hops(), before, "it still hops");
    }
}

impl Drop for Hopper {
    fn drop(&mut self) {
        std::fs::remove_file(self.0.path().join("hop.sh")).ok();
    }
}

#[test]
fn who_is_another_process_all_the_time_is_caught() {
    for by_mark in [false, true] {
        let hopper = Hopper::new();
        let mut shim = Shim::start(&[hopper.command(), hopper.command()].concat());
        hopper.await_hops();
        let (root, mark) = (shim.process(), shim.mark.clone());
        let gang = if by_mark {
            shim.child.kill().unwrap();
            shim.child.wait().unwrap();
            Gang { mark: Some(&mark), ..Gang::default() }
        } else {
            Gang { shim: Some(root), ..Gang::default() }
        };
        assert_eq!(gang.kill_all(BOUND), BTreeSet::new());
        hopper.assert_gone();
    }
}

#[test]
fn what_has_nowhere_to_be_is_nowhere() {
    assert_eq!(Gang::default().kill_all(BOUND), BTreeSet::new());
}
