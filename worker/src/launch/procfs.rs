//! What the kernel says of a process: who it is and how it is; and SIGKILL for that process or for nobody.

use std::cmp::Reverse;
use std::fs;

use nix::errno::Errno;
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process, told from a later one with the same number by when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Process {
    pub pid: i32,
    /// In clock ticks since the machine started: field 22 of /proc/PID/stat.
    pub start_time: u64,
}

impl Process {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|stat| stat.process)
    }

    pub fn this() -> Option<Self> {
        Self::of(Pid::this().as_raw())
    }

    #[cfg(test)]
    /// Whether it still has user instructions to run. One that waits to be reaped has none.
    pub fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|stat| stat.process == self && !has_ended(&stat))
    }

    pub fn kill(self) {
        kill_if(self.pid, || start_time(self.pid) == Some(self.start_time));
    }
}

/// What /proc/PID/stat says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub process: Process,
    pub name: String,
    /// R, S, D, T, Z and so on.
    pub state: char,
    pub parent: i32,
}

pub(crate) fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&read(&format!("/proc/{pid}/stat"))?)
}

pub(crate) fn start_time(pid: i32) -> Option<u64> {
    Some(stat(pid)?.process.start_time)
}

pub(crate) fn state(pid: i32) -> Option<char> {
    Some(stat(pid)?.state)
}

/// Text of a file of /proc. A process may give itself a name that is no text.
/// The user of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProcessUser {
    pub uid: u32,
    pub gid: u32,
}

/// Returns as whom a process runs: its real ids.
pub(super) fn user(pid: i32) -> Option<ProcessUser> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let id = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    };
    Some(ProcessUser { uid: id("Uid:")?, gid: id("Gid:")? })
}

pub(super) fn read(path: &str) -> Option<String> {
    Some(String::from_utf8_lossy(&fs::read(path).ok()?).into_owned())
}

pub(super) fn parse_stat(text: &str) -> Option<Stat> {
    let (pid, rest) = text.split_once(" (")?;
    // The name may contain spaces and parentheses itself.
    let (name, rest) = rest.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    // State and parent were fields 3 and 4.
    let start_time = fields.nth(22 - 5)?.parse().ok()?;
    Some(Stat {
        process: Process { pid: pid.parse().ok()?, start_time },
        name: name.to_owned(),
        state,
        parent,
    })
}

/// Every process there is, the newest first: one that goes on as another all the time is only met before it ends.
pub(super) fn pids() -> Vec<i32> {
    let mut pids: Vec<i32> = numbers("/proc").collect();
    let last = read("/proc/loadavg").and_then(|text| text.split_ascii_whitespace().last()?.parse().ok());
    newest_first(&mut pids, last.unwrap_or(i32::MAX));
    pids
}

/// Numbers are given out in turn, and from the beginning again after the highest.
fn newest_first(pids: &mut [i32], last: i32) {
    pids.sort_unstable_by_key(|pid| (*pid > last, Reverse(*pid)));
}

/// The threads of a process, its first one before the others.
pub(super) fn threads(pid: i32) -> Vec<i32> {
    let mut threads: Vec<i32> = numbers(&format!("/proc/{pid}/task")).collect();
    threads.sort_unstable_by_key(|thread| (*thread != pid, *thread));
    threads
}

fn numbers(dir: &str) -> impl Iterator<Item = i32> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether no user instruction of it will run any more, as it was when it was looked at.
pub(super) fn has_ended(stat: &Stat) -> bool {
    // Its first thread may end before the others do.
    matches!(stat.state, 'Z' | 'X') && is_dead(stat.process.pid)
}

fn is_dead(pid: i32) -> bool {
    threads(pid).into_iter().all(|thread| {
        let stat = read(&format!("/proc/{pid}/task/{thread}/stat"));
        stat.and_then(|text| parse_stat(&text)).is_none_or(|stat| matches!(stat.state, 'Z' | 'X'))
    })
}

/// Sends SIGKILL to the process with this number if `still` holds once it can no longer be mistaken for another.
pub(super) fn kill_if(pid: i32, still: impl FnOnce() -> bool) {
    let Some(id) = rustix::process::Pid::from_raw(pid) else { return };
    // Whoever has the number from here on, the handle is of the one that had it now.
    let handle = match pidfd_open(id, PidfdFlags::empty()) {
        Err(error) if error.raw_os_error() == Errno::ESRCH as i32 => return,
        handle => handle.ok(),
    };
    if !still() {
        return;
    }
    // It may have ended by itself in this moment.
    match handle {
        Some(handle) => pidfd_send_signal(handle, Signal::KILL).ok(),
        // No more files can be opened, or this is a sandbox that does not know the call.
        None => rustix::process::kill_process(id, Signal::KILL).ok(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_may_look_like_fields() {
        let tail = "1 17 17 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 8675309 1 2 3";
        let table = [
            (format!("17 (sleep) S {tail}"), Some(("sleep", 'S', 1, 8_675_309))),
            (format!("17 (a) R 9 (b) D {tail}"), Some(("a) R 9 (b", 'D', 1, 8_675_309))),
            (format!("17 (a\nb c) Z {tail}"), Some(("a\nb c", 'Z', 1, 8_675_309))),
            ("17 (sleep) S 1 17".to_owned(), None),
            ("17 sleep S".to_owned(), None),
            (String::new(), None),
        ];
        for (text, expected) in table {
            let stat = parse_stat(&text);
            let told = stat.as_ref().map(|s| (s.name.as_str(), s.state, s.parent, s.process.start_time));
            assert_eq!(told, expected, "{text:?}");
        }
    }

    #[test]
    fn the_newest_comes_first_also_after_the_highest_number() {
        let mut pids = [1, 2, 5, 300, 400];
        newest_first(&mut pids, 7);
        assert_eq!(pids, [5, 2, 1, 400, 300]);
        newest_first(&mut pids, i32::MAX);
        assert_eq!(pids, [400, 300, 5, 2, 1]);
        assert!(super::pids().contains(&Pid::this().as_raw()));
    }

    #[test]
    fn only_the_process_that_was_meant_is_killed() {
        assert_eq!(Process::this().unwrap().pid, Pid::this().as_raw());
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::of(pid).unwrap();
        assert_eq!(stat(pid).unwrap().parent, Pid::this().as_raw());
        Process { start_time: process.start_time - 1, ..process }.kill();
        assert!(process.is_alive() && child.try_wait().unwrap().is_none(), "an earlier one was meant");
        process.kill();
        while process.is_alive() {
            std::thread::yield_now();
        }
        assert_eq!(state(pid), Some('Z'), "it is dead, if not yet reaped");
        child.wait().unwrap();
        process.kill();
        assert!(!process.is_alive() && start_time(pid) != Some(process.start_time));
    }
}
