//! Finds and kills what is left of a gang.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::environment::MARK;

/// Kills every descendant of this process that is there now. One that forks may leave a child: call it until
/// none is left.
pub(crate) fn kill_descendants() {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for pid in processes() {
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut open = children.remove(&Pid::this().as_raw()).unwrap_or_default();
    while let Some(pid) = open.pop() {
        kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        open.extend(children.remove(&pid).unwrap_or_default());
    }
}

/// Kills every process that has the mark in its environment, and says whether there was any.
pub(crate) fn kill_marked(mark: &str) -> bool {
    let entry = format!("{MARK}={mark}");
    let is_marked = |pid: &i32| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|variable| variable == entry.as_bytes())
    };
    let marked: Vec<i32> = processes().filter(is_marked).collect();
    for pid in &marked {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).ok();
    }
    !marked.is_empty()
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}
