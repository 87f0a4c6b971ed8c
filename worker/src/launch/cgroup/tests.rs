//! Groups of this machine, where it has them, and copies of what version 2 shows.

#![expect(unsafe_code, reason = "pre_exec runs between fork and exec")]

use std::collections::BTreeSet;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use super::*;
use crate::launch::oom::{Counts, OutOfMemory, judge};
use crate::launch::procfs::Process;
use crate::launch::sweep::Gang;
use crate::launch::sweep::tests::{Hopper, eventually};

const BOUND: Duration = Duration::from_secs(20);

/// A group of one test, removed with all that is in it.
struct Scratch(GangCgroup);

impl Scratch {
    /// None, visibly, where this machine has no groups for us.
    fn new(ranks: u32, memory_bytes: Option<u64>) -> Option<Self> {
        let cgroups = Cgroups::find();
        let lacks = cgroups.lacks().unwrap_or_default();
        let name = format!("test.{}", uuid::Uuid::new_v4());
        let made = cgroups.create(&name, ranks, memory_bytes).unwrap();
        if made.is_none() || memory_bytes.is_some() && !lacks.is_empty() {
            eprintln!("SKIPPED: {lacks}");
        }
        made.map(Self).filter(|_| memory_bytes.is_none() || lacks.is_empty())
    }

    fn spawn(&self, rank: u32, script: &str) -> Child {
        let entrance = self.0.entrance(rank).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        // SAFETY: it makes system calls only, and allocates nothing.
        unsafe { command.pre_exec(move || entrance.enter()) };
        command.spawn().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        Gang { cgroup: Some(&self.0), ..Gang::default() }.kill_all(BOUND);
        eventually("it is removed", || self.0.remove().is_ok());
    }
}

#[test]
fn nobody_gets_out_and_all_are_killed() {
    let Some(scratch) = Scratch::new(2, None) else { return };
    let group = &scratch.0;
    assert!(group.is_empty());
    let mut first = scratch.spawn(0, "(setsid sh -c 'sleep 1000; true' &) ; exec env -i sleep 1000");
    let mut second = scratch.spawn(1, "exec sleep 1000");
    eventually("four are there", || group.pids().len() == 4 && !group.is_empty());
    assert!(group.remove().is_err(), "it is in use");
    let told = serde_json::to_string(group).unwrap();
    let later: GangCgroup = serde_json::from_str(&told).unwrap();
    assert_eq!(later, *group, "a later daemon finds the same");
    let before: BTreeSet<Process> = group.pids().into_iter().filter_map(Process::of).collect();
    assert_eq!(Gang { cgroup: Some(&later), ..Gang::default() }.kill_all(BOUND), BTreeSet::new());
    assert!(before.iter().all(|process| !process.is_alive()) && group.is_empty());
    assert_eq!(first.wait().unwrap().signal(), Some(9));
    assert_eq!(second.wait().unwrap().signal(), Some(9));
    let below = group.dirs().next().unwrap().join("rank0").join("made-by-the-rank");
    fs::create_dir(&below).unwrap();
    eventually("it is removed with what ranks made", || group.remove().is_ok());
    assert!(group.dirs().all(|dir| !dir.exists()) && group.remove().is_ok() && group.is_empty());
}

#[test]
fn version_1_alone_kills_those_that_fork_as_well() {
    let Some(scratch) = Scratch::new(1, None) else { return };
    let v1 = GangCgroup { v2: None, ..scratch.0.clone() };
    if v1.v1_memory.is_none() {
        return eprintln!("SKIPPED: no memory controller of version 1 is ours to use");
    }
    let hopper = Hopper::new();
    let mut child = scratch.spawn(0, &format!("{} exec sleep 1000", hopper.command()));
    hopper.await_hops();
    assert_eq!(Gang { cgroup: Some(&v1), ..Gang::default() }.kill_all(BOUND), BTreeSet::new());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    hopper.assert_gone();
    assert!(v1.is_empty());
}

#[test]
fn a_kernel_that_knows_no_kill_freezes_first() {
    let Some(scratch) = Scratch::new(1, None) else { return };
    if scratch.0.v2.is_none() {
        return eprintln!("SKIPPED: no groups of version 2 are ours to use");
    }
    let hopper = Hopper::new();
    let mut child = scratch.spawn(0, &format!("{} exec sleep 1000", hopper.command()));
    hopper.await_hops();
    scratch.0.kill_in_rounds(true);
    eventually("all are gone", || scratch.0.is_empty());
    hopper.assert_gone();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

#[test]
fn who_takes_too_much_memory_is_told_from_who_was_killed() {
    let Some(scratch) = Scratch::new(2, Some(32 << 20)) else { return };
    let table = [
        ("exec dd if=/dev/zero of=/dev/null bs=256M count=1 status=none", false, OutOfMemory::Certain),
        (
            "dd if=/dev/zero of=/dev/null bs=256M count=1 status=none; sleep 0; exit 1",
            false,
            OutOfMemory::Probably,
        ),
        ("kill -9 $$", false, OutOfMemory::No),
        ("kill -9 $$", true, OutOfMemory::No),
        ("exec dd if=/dev/zero of=/dev/null bs=1M count=8 status=none", false, OutOfMemory::No),
    ];
    let end = |rank, script: &str| -> ExitStatus { scratch.spawn(rank, script).wait().unwrap() };
    for (script, sent, expected) in table {
        let before = Counts::now(Some((&scratch.0, 0)));
        let status = end(0, script);
        let after = Counts::now(Some((&scratch.0, 0)));
        let verdict = judge(before, after, status.code(), status.signal(), sent);
        // Where a whole group is killed at once, as in version 2, there is no more to tell.
        assert!(
            verdict == expected || verdict == OutOfMemory::Certain && expected == OutOfMemory::Probably,
            "{script}: {status:?} {verdict:?}"
        );
    }
    assert_eq!(scratch.0.oom_kills(1), Some(0), "the other rank has its own count");
    let before = Counts::now(None);
    let status = end(1, table[0].0);
    let verdict = judge(before, Counts::now(None), status.code(), status.signal(), false);
    assert_eq!(verdict, OutOfMemory::Probably, "all that the machine's own count can tell");
}

#[test]
fn who_is_frozen_is_reported_and_ends_when_thawed() {
    let read = |path| fs::read_to_string(path).unwrap();
    let hierarchies = Hierarchies::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
    let base = match hierarchies.v1("freezer") {
        Ok(base) => base,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let Some(scratch) = Scratch::new(1, None) else { return };
    let freezer = base.join(format!("muster-test.{}", uuid::Uuid::new_v4()));
    fs::create_dir(&freezer).unwrap();
    let mut child = scratch.spawn(0, "exec sleep 1000");
    let process = Process::of(i32::try_from(child.id()).unwrap()).unwrap();
    set(&freezer, "cgroup.procs", &process.pid.to_string()).unwrap();
    set(&freezer, "freezer.state", "FROZEN").unwrap();
    eventually("it is frozen", || fs::read_to_string(freezer.join("freezer.state")).unwrap() == "FROZEN\n");
    let gang = Gang { cgroup: Some(&scratch.0), ..Gang::default() };
    let left = gang.kill_all(Duration::from_millis(300));
    let still_there = process.is_alive();
    set(&freezer, "freezer.state", "THAWED").unwrap();
    assert!(still_there);
    assert_eq!(left, BTreeSet::from([process]));
    assert_eq!(gang.kill_all(BOUND), BTreeSet::new());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    eventually("the freezer is empty", || fs::remove_dir(&freezer).is_ok());
}

/// Groups as version 2 shows them, in plain files.
fn fixture(files: &[(&str, &str)]) -> (tempfile::TempDir, GangCgroup) {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = root.path().join("muster-a.1").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let gang = GangCgroup { v2: Some(root.path().join("muster-a.1")), v1_memory: None };
    (root, gang)
}

#[test]
fn what_version_2_shows_is_read() {
    let events = "low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 1\n";
    let (_root, gang) = fixture(&[
        ("cgroup.events", "populated 1\nfrozen 0\n"),
        ("cgroup.procs", ""),
        ("rank0/cgroup.procs", "70\n71\n"),
        ("rank0/memory.events", events),
        ("rank0/a/b/cgroup.procs", "0\n72\nx\n"),
        ("rank1/cgroup.procs", "71\n5\n"),
        ("rank1/memory.events", "oom_kill 0\n"),
        ("rank2/memory.events", "oom_kill many\n"),
    ]);
    assert_eq!(gang.pids(), [5, 70, 71, 72]);
    assert!(!gang.is_empty());
    let counts: Vec<Option<u64>> = (0..4).map(|rank| gang.oom_kills(rank)).collect();
    assert_eq!(counts, [Some(3), Some(0), None, None]);
    let (_root, threaded) = fixture(&[("cgroup.events", "populated 1\nfrozen 0\n")]);
    assert!(threaded.pids().is_empty() && !threaded.is_empty());
    let (_root, ended) = fixture(&[("cgroup.events", "populated 0\nfrozen 0\n")]);
    assert!(ended.is_empty());
    let (_root, killed) = fixture(&[("cgroup.kill", "")]);
    killed.kill();
    assert_eq!(fs::read_to_string(killed.v2.unwrap().join("cgroup.kill")).unwrap(), "1");
}

#[test]
fn memory_is_handed_on_where_it_is_there() {
    let table = [
        ("cpu memory pids\n", "", Some("+memory")),
        ("cpu memory pids\n", "cpu memory\n", Some("cpu memory\n")),
        ("cpu pids\n", "", None),
    ];
    for (controllers, handed_on, expected) in table {
        let files = [("cgroup.controllers", controllers), ("cgroup.subtree_control", handed_on)];
        let (_root, gang) = fixture(&files);
        let dir = gang.v2.unwrap();
        let handed = hand_on_memory(&dir)
            .ok()
            .map(|()| fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap());
        assert_eq!(handed.as_deref(), expected, "{controllers:?} {handed_on:?}");
    }
}

#[test]
fn a_machine_without_groups_says_so_once_and_goes_on() {
    let none = Cgroups::of(&Hierarchies::parse("", ""));
    assert!(none.create("a.1", 2, Some(1)).unwrap().is_none());
    let lacks = none.lacks().unwrap();
    assert!(lacks.contains("version 2 are not mounted") && lacks.contains("no memory limit"), "{lacks}");
    let root = tempfile::tempdir().unwrap();
    let some = Cgroups { v2: Some(root.path().to_owned()), ..Cgroups::default() };
    for name in ["", "a/b", "a\nb", &"x".repeat(300)] {
        assert_eq!(some.create(name, 1, None).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
    }
    let made = some.create("a.1@b", 2, None).unwrap().unwrap();
    assert!(root.path().join("muster-a.1@b/rank1").is_dir());
    some.create("a.1@b", 3, None).unwrap();
    assert!(root.path().join("muster-a.1@b/rank2").is_dir(), "what an earlier one left is made anew");
    made.remove().unwrap();
    assert!(fs::read_dir(root.path()).unwrap().next().is_none());
}
