//! Finds and kills every process that is left of a gang: none may hold a device or a port when the next one starts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::cgroup::GangCgroup;
use super::environment::MARK;
use super::procfs::{self, Process};

/// What is killed needs a moment to end: the time between two looks, from this ..
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// .. to this: a look costs milliseconds on a machine with thousands of processes.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// A look is not a snapshot: who is forked behind it, by one that ends, is only seen by the next.
const EMPTY_LOOKS: u32 = 2;
/// Largest environment that is read: the kernel takes less from anybody who starts a program.
const ENVIRONMENT_BYTES_MAX: u64 = 8 << 20;
/// Longest wait for the environments of all processes. The kernel makes who reads that of a process that hangs in
/// it wait as well.
const SEARCH_MAX: Duration = Duration::from_secs(2);
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
    pub fn look(&self) -> BTreeSet<Process> {
        let mut found = BTreeSet::new();
        found.extend(self.shim.into_iter().flat_map(descendants));
        found.extend(self.mark.into_iter().flat_map(marked));
        found.extend(self.cgroup.into_iter().flat_map(GangCgroup::pids).filter_map(Process::of));
        found.retain(|process| process.pid != Pid::this().as_raw() && process.is_alive());
        found
    }

    /// Kills every process that is there now, and says which these were. What they fork meanwhile takes another call.
    pub fn kill(&self) -> BTreeSet<Process> {
        if let Some(group) = self.cgroup {
            group.kill();
        }
        let found = self.look();
        for process in &found {
            process.kill();
        }
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

fn descendants(root: Process) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    for stat in procfs::pids().filter_map(procfs::stat) {
        children.entry(stat.parent).or_default().push(stat.process);
    }
    // Later, and the number might be another's, with other children.
    if Process::of(root.pid) != Some(root) {
        return Vec::new();
    }
    let mut found = children.remove(&root.pid).unwrap_or_default();
    let mut next = 0;
    while let Some(process) = found.get(next) {
        found.extend(children.remove(&process.pid).unwrap_or_default());
        next += 1;
    }
    found
}

#[expect(clippy::disallowed_methods, reason = "the kernel may take for ever over a process that hangs")]
fn marked(mark: &str) -> Vec<Process> {
    let entry = format!("{MARK}={mark}");
    let (sender, found) = mpsc::channel();
    let search = move || {
        let mut all: Vec<_> = procfs::pids().filter_map(procfs::stat).collect();
        // Those that hang hold up the search: they are its last.
        all.sort_by_key(|stat| stat.state == 'D');
        for stat in all {
            if has_variable(stat.process.pid, entry.as_bytes()) && sender.send(stat.process).is_err() {
                break;
            }
        }
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
mod tests;
