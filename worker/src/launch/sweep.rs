//! Finds and kills every process that is left of a gang: none may hold a device or a port when the next one starts.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::cgroup::GangCgroup;
use super::environment::MARK;
use super::procfs::{self, Process, Stat};

/// What is killed needs a moment to end: the time between two looks, from this ..
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// .. to this: a look costs milliseconds on a machine with thousands of processes.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// A look is not a snapshot: who is forked behind it, by one that ends, is seen by the next or a later one.
const EMPTY_LOOKS: u32 = 5;
/// Largest environment that is read: the kernel takes less from anybody who starts a program.
const ENVIRONMENT_BYTES_MAX: u64 = 8 << 20;
/// Longest wait for the environments of all processes. The kernel makes who reads that of a process that hangs in
/// it wait as well.
const SEARCH_MAX: Duration = Duration::from_secs(2);
/// Deepest tree of processes in which descendants are told: shells in shells, and more than anybody builds.
const ANCESTORS_MAX: u32 = 256;
/// Searches that may wait for such a process at the same time, each in a thread that is left behind.
const SEARCHES_MAX: usize = 32;
static SEARCHES: AtomicUsize = AtomicUsize::new(0);

/// Where the processes of a gang are looked for. This process itself is never one of them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gang<'a> {
    /// The shim, or another subreaper: all its descendants, without itself. Those that are orphaned stay such.
    pub shim: Option<Process>,
    /// Value of [`MARK`]. One that wrote over its environment, or started a program with another, is not found.
    pub mark: Option<&'a str>,
    /// Nobody leaves it who is not made to by root.
    pub cgroup: Option<&'a GangCgroup>,
}

impl Gang<'_> {
    /// Every process that is there now and can still run.
    #[cfg(test)]
    pub fn look(&self) -> BTreeSet<Process> {
        self.each(|_| ())
    }

    /// Kills every process that is there now, and says which these were. What they fork meanwhile takes another call.
    pub fn kill(&self) -> BTreeSet<Process> {
        if let Some(group) = self.cgroup {
            group.kill();
        }
        self.each(Process::kill)
    }

    /// Acts on each process in the moment in which it is found: one that starts another and ends, again and again, is
    /// only there for a millisecond. It was there even if it has ended since.
    fn each(&self, act: fn(Process)) -> BTreeSet<Process> {
        let mut found = BTreeSet::new();
        found.extend(self.shim.into_iter().flat_map(|shim| descendants(shim, act)));
        found.extend(self.mark.into_iter().flat_map(|mark| marked(mark, act)));
        let members = self.cgroup.into_iter().flat_map(GangCgroup::pids).filter_map(other);
        found.extend(members.map(|stat| stat.process).inspect(|process| act(*process)));
        found
    }

    /// Kills until nothing is left, at most for this long. What is returned is still there: SIGKILL takes effect once
    /// the kernel lets go of it (it hangs in a system call, or its group is frozen), before anything else.
    #[expect(clippy::disallowed_methods, reason = "the kernel takes its time over what it kills")]
    pub fn kill_all(&self, bound: Duration) -> BTreeSet<Process> {
        let end = Instant::now() + bound;
        let (mut empty, mut pause) = (0, PAUSE_MIN);
        loop {
            let found = self.kill();
            empty = if found.is_empty() { empty + 1 } else { 0 };
            let left = end.saturating_duration_since(Instant::now());
            if empty == EMPTY_LOOKS || left.is_zero() {
                return found;
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// The process with this number, if it is not this one and has not ended.
fn other(pid: i32) -> Option<Stat> {
    let stat = procfs::stat(pid).filter(|_| pid != Pid::this().as_raw())?;
    (!procfs::has_ended(&stat)).then_some(stat)
}

fn descendants(root: Process, act: fn(Process)) -> Vec<Process> {
    let others = procfs::pids().into_iter().filter_map(other).map(|stat| stat.process);
    others.filter(|process| descends(process.pid, root)).inspect(|process| act(*process)).collect()
}

/// Whether the process with this number descends from the root.
fn descends(pid: i32, root: Process) -> bool {
    let mut at = pid;
    for _ in 0..ANCESTORS_MAX {
        at = match procfs::stat(at) {
            Some(stat) if stat.process == root && at != pid => return true,
            Some(stat) => stat.parent,
            // An ancestor has ended: those below it have another parent now.
            None if at != pid && at != 0 => pid,
            None => return false,
        };
    }
    false
}

#[expect(clippy::disallowed_methods, reason = "the kernel may take for ever over a process that hangs")]
fn marked(mark: &str, act: fn(Process)) -> Vec<Process> {
    let entry = format!("{MARK}={mark}");
    let (sender, found) = mpsc::channel();
    let search = move || {
        let others = procfs::pids().into_iter().filter_map(other);
        let look_at = |process: Process| {
            if has_variable(process.pid, entry.as_bytes()) {
                act(process);
                sender.send(process).ok();
            }
        };
        // Those that hang hold up the search: they are its last.
        let mut hanging = Vec::new();
        for stat in others {
            match stat.state {
                'D' => hanging.push(stat.process),
                _ => look_at(stat.process),
            }
        }
        hanging.into_iter().for_each(look_at);
        SEARCHES.fetch_sub(1, Ordering::Relaxed);
    };
    let is_one_too_many = SEARCHES.fetch_add(1, Ordering::Relaxed) >= SEARCHES_MAX;
    if is_one_too_many || std::thread::Builder::new().name("environments".to_owned()).spawn(search).is_err() {
        SEARCHES.fetch_sub(1, Ordering::Relaxed);
        return Vec::new();
    }
    let end = Instant::now() + SEARCH_MAX;
    let next = || found.recv_timeout(end.saturating_duration_since(Instant::now())).ok();
    std::iter::from_fn(next).collect()
}

fn has_variable(pid: i32, entry: &[u8]) -> bool {
    let mut bytes = Vec::new();
    let file = File::open(format!("/proc/{pid}/environ"));
    // Of a process that has ended it is empty; of another user's it cannot be read.
    let read = file.and_then(|file| file.take(ENVIRONMENT_BYTES_MAX).read_to_end(&mut bytes));
    read.is_ok() && bytes.split(|byte| *byte == 0).any(|variable| variable == entry)
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
pub(super) mod tests;
