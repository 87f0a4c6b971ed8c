//! The control groups of a gang: nobody who is started in one gets out, one write kills all, and a rank that takes
//! more memory than it asked for is killed alone.
//!
//! ```text
//! <our own group>/muster-<name>/rank0 .. rankN
//! ```
//!
//! In the one hierarchy of version 2; or, where version 1 holds the memory controller, in both at once. What this
//! machine does not let us use is done without: [`Cgroups::lacks`] says it in words.

mod hierarchy;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::write;
use serde::{Deserialize, Serialize};

use hierarchy::Hierarchies;

use super::procfs;

/// What one gang's directory begins with.
const PREFIX: &str = "muster-";
/// Longest name of a gang: file names end at 255 bytes.
const NAME_BYTES_MAX: usize = 200;
/// How often the groups are gone through for those that were forked meanwhile, before that is left to the next call.
const KILL_ROUNDS: u32 = 20;
/// A group is busy for a moment after its last process was waited for: tries, and the first and longest pause between two.
const REMOVE_TRIES: u32 = 40;
const REMOVE_PAUSE: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(5));
/// Deepest groups that ranks made below their own which are looked into.
const DEPTH_MAX: u32 = 16;

/// What this machine lets us use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cgroups {
    /// Directories below which gangs get theirs.
    v2: Option<PathBuf>,
    v1_memory: Option<PathBuf>,
    /// Whether groups of version 2 have the memory controller.
    v2_memory: bool,
    lacks: Vec<String>,
}

/// The groups of one gang. As these are paths, a later daemon can use them as well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GangCgroup {
    v2: Option<PathBuf>,
    v1_memory: Option<PathBuf>,
}

/// The way into a rank's groups, opened beforehand.
#[derive(Debug)]
pub(crate) struct Entrance {
    /// The group of version 2, and what takes a process there.
    v2: Option<(File, File)>,
    v1: Option<File>,
}

impl Entrance {
    /// The group in which a process can be made, open for as long as this is.
    pub fn group(&self) -> Option<RawFd> {
        self.v2.as_ref().map(|(group, _)| group.as_raw_fd())
    }

    /// Moves the calling process. Between fork and exec this is safe: it is one system call for each hierarchy.
    pub fn enter(&self) -> io::Result<()> {
        if let Some((_, procs)) = &self.v2 {
            write(procs, b"0")?;
        }
        self.enter_others()
    }

    /// The same for a process that was made in [`Entrance::group`].
    pub fn enter_others(&self) -> io::Result<()> {
        self.v1.as_ref().map_or(Ok(()), |procs| Ok(write(procs, b"0").map(drop)?))
    }
}

impl Cgroups {
    /// Looks for our own group. Where memory is not yet handed on to groups below it, tries to change that.
    pub fn find() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::of(&Hierarchies::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup")))
    }

    fn of(hierarchies: &Hierarchies) -> Self {
        let (v2, v1_memory) = (hierarchies.v2(), hierarchies.v1("memory"));
        let v2_memory = v2.as_ref().ok().map(|base| hand_on_memory(base));
        let mut lacks = Vec::new();
        if let Err(why) = &v2 {
            lacks.push(why.clone());
        }
        if let (None | Some(Err(_)), Err(why)) = (&v2_memory, &v1_memory) {
            let why_v2 = v2_memory.as_ref().and_then(|tried| tried.as_ref().err());
            let why_v2 = why_v2.map(|why| format!("{why}, and ")).unwrap_or_default();
            lacks.push(format!("ranks have no memory limit of their own: {why_v2}{why}"));
        }
        let v2_memory = matches!(v2_memory, Some(Ok(())));
        Self { v2: v2.ok(), v1_memory: v1_memory.ok().filter(|_| !v2_memory), v2_memory, lacks }
    }

    /// What cannot be done here, and why. None if all can.
    pub fn lacks(&self) -> Option<String> {
        (!self.lacks.is_empty()).then(|| self.lacks.join("; "))
    }

    /// Makes the groups of a gang. None where this machine lets us have none. `name` is unique among all daemons of
    /// the machine. A limit is kept where there is a memory controller.
    pub fn create(
        &self,
        name: &str,
        ranks: u32,
        memory_bytes_per_rank: Option<u64>,
    ) -> io::Result<Option<GangCgroup>> {
        if self.v2.is_none() && self.v1_memory.is_none() {
            return Ok(None);
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(['/', '\n', '\0']) {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("{name:?} cannot be a group's name"),
            ));
        }
        let at = |base: &Option<PathBuf>| Some(base.as_ref()?.join(format!("{PREFIX}{name}")));
        // Into a group of version 1 a process can only be moved, which takes long: it is worth that for a limit alone, or where
        // there is no other.
        let v1_memory = at(&self.v1_memory).filter(|_| memory_bytes_per_rank.is_some() || self.v2.is_none());
        let gang = GangCgroup { v2: at(&self.v2), v1_memory };
        // What an earlier gang of that name left, if anything.
        gang.remove()?;
        let made = gang.make(self.v2_memory, ranks, memory_bytes_per_rank);
        if made.is_err() {
            gang.remove().ok();
        }
        made.map(|()| Some(gang))
    }
}

impl GangCgroup {
    fn make(&self, v2_memory: bool, ranks: u32, memory_bytes: Option<u64>) -> io::Result<()> {
        for dir in self.dirs() {
            fs::create_dir(dir)?;
        }
        if let (Some(dir), true) = (&self.v2, v2_memory) {
            hand_on_memory(dir)?;
        }
        for rank in 0..ranks {
            for dir in self.dirs() {
                fs::create_dir(dir.join(rank_name(rank)))?;
            }
            let Some(bytes) = memory_bytes else { continue };
            // A limit that swap space extends is none. It is no error not to have swap.
            if let (Some(dir), true) = (&self.v2, v2_memory) {
                let dir = dir.join(rank_name(rank));
                set(&dir, "memory.max", &bytes.to_string())?;
                set(&dir, "memory.swap.max", "0").ok();
                // A rank whose data loader was killed alone waits for it for ever.
                set(&dir, "memory.oom.group", "1").ok();
            }
            if let Some(dir) = &self.v1_memory {
                let dir = dir.join(rank_name(rank));
                set(&dir, "memory.limit_in_bytes", &bytes.to_string())?;
                set(&dir, "memory.memsw.limit_in_bytes", &bytes.to_string()).ok();
            }
        }
        Ok(())
    }

    fn dirs(&self) -> impl Iterator<Item = &Path> {
        [&self.v2, &self.v1_memory].into_iter().flatten().map(PathBuf::as_path)
    }

    /// Opens what takes a process into the groups of a local rank.
    pub fn entrance(&self, rank: u32) -> io::Result<Entrance> {
        let procs = |dir: &Path| OpenOptions::new().write(true).open(dir.join("cgroup.procs"));
        let of_rank = |dir: &PathBuf| dir.join(rank_name(rank));
        let v2 =
            self.v2.as_ref().map(of_rank).map(|dir| Ok::<_, io::Error>((File::open(&dir)?, procs(&dir)?)));
        let v1 = self.v1_memory.as_ref().map(of_rank).map(|dir| procs(&dir));
        Ok(Entrance { v2: v2.transpose()?, v1: v1.transpose()? })
    }

    /// Every process of the gang, but for those that only wait to be reaped.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids: Vec<i32> = self.dirs().flat_map(groups).flat_map(|group| numbers(&group)).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    pub fn is_empty(&self) -> bool {
        // Of groups whose threads live in different ones no processes can be listed; this counts them.
        let populated = self.v2.as_ref().and_then(|dir| value(&dir.join("cgroup.events"), "populated"));
        match populated {
            Some(0) if self.v1_memory.is_none() => true,
            Some(0) | None => self.pids().is_empty(),
            Some(_) => false,
        }
    }

    /// SIGKILL for all, also for those that are forked meanwhile. Returns before they have ended.
    pub fn kill(&self) {
        let killed = self.v2.as_ref().is_some_and(|dir| set(dir, "cgroup.kill", "1").is_ok());
        self.kill_in_rounds(!killed);
    }

    /// For version 1, for Linux before 5.14, and for those that root moved within version 2.
    fn kill_in_rounds(&self, freeze: bool) {
        // Who is frozen forks no more, and can be killed. Version 1 has no such state.
        let set_frozen = |value| match &self.v2 {
            Some(dir) if freeze => set(dir, "cgroup.freeze", value).ok(),
            Some(_) | None => None,
        };
        set_frozen("1");
        for _ in 0..KILL_ROUNDS {
            if !self.kill_each() {
                break;
            }
        }
        set_frozen("0");
    }

    /// Says whether there was any.
    fn kill_each(&self) -> bool {
        let Some(name) = self.dirs().find_map(|dir| dir.file_name()?.to_str()) else { return false };
        let pids = self.pids();
        for pid in &pids {
            procfs::kill_if(*pid, || is_member(*pid, name));
        }
        !pids.is_empty()
    }

    /// How many processes of a local rank the kernel has killed for want of memory, its own limit or the machine's.
    /// None if there is no memory controller to tell.
    pub fn oom_kills(&self, rank: u32) -> Option<u64> {
        let file = |dir: &Option<PathBuf>, name| Some(dir.as_ref()?.join(rank_name(rank)).join(name));
        let v2 = file(&self.v2, "memory.events").and_then(|path| value(&path, "oom_kill"));
        v2.or_else(|| value(&file(&self.v1_memory, "memory.oom_control")?, "oom_kill"))
    }

    /// Removes the groups, once the last of those that have ended has left them.
    pub fn remove_soon(&self) -> io::Result<()> {
        let mut tried = self.remove();
        let mut pause = REMOVE_PAUSE.0;
        for _ in 0..REMOVE_TRIES {
            if tried.is_ok() {
                break;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(REMOVE_PAUSE.1);
            tried = self.remove();
        }
        tried
    }

    /// Removes the groups, with those that ranks made below theirs. Fails while anybody is in them.
    pub fn remove(&self) -> io::Result<()> {
        for dir in self.dirs() {
            // Those below come after those above.
            for group in groups(dir).iter().rev() {
                match fs::remove_dir(group) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        let why = format!("failed to remove the group {}: {error}", group.display());
                        return Err(io::Error::new(error.kind(), why));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn rank_name(rank: u32) -> String {
    format!("rank{rank}")
}

/// Gives the groups below this one a memory controller.
fn hand_on_memory(dir: &Path) -> io::Result<()> {
    let has = |name| {
        let text = fs::read_to_string(dir.join(name))?;
        Ok::<_, io::Error>(text.split_ascii_whitespace().any(|controller| controller == "memory"))
    };
    if !has("cgroup.controllers")? {
        let why = format!("{} has no memory controller", dir.display());
        return Err(io::Error::new(ErrorKind::Unsupported, why));
    }
    if has("cgroup.subtree_control")? {
        return Ok(());
    }
    // The kernel does not let a group hand on controllers while processes are in it.
    set(dir, "cgroup.subtree_control", "+memory").map_err(|error| {
        io::Error::new(error.kind(), format!("{error} (under systemd, DelegateSubgroup=daemon helps)"))
    })
}

/// This group and all below it, each before those below itself.
fn groups(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![dir.to_owned()];
    let mut level = 0;
    for _ in 0..DEPTH_MAX {
        let end = found.len();
        for at in level..end {
            let entries = fs::read_dir(&found[at]).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            found.extend(below.map(|entry| entry.path()));
        }
        level = end;
    }
    found
}

fn numbers(group: &Path) -> Vec<i32> {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    // A process outside of our namespace is shown as 0.
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect()
}

fn is_member(pid: i32, name: &str) -> bool {
    let groups = procfs::read(&format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.split(['/', '\n']).any(|part| part == name)
}

/// The number beside a word in a file of such lines.
fn value(path: &Path, word: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Writes to a file of a group, which must be there: elsewhere than in a control group it would be made.
fn set(dir: &Path, name: &str, value: &str) -> io::Result<()> {
    let path = dir.join(name);
    let failed =
        |error: io::Error| io::Error::new(error.kind(), format!("failed to set {}: {error}", path.display()));
    let mut file = OpenOptions::new().write(true).open(&path).map_err(failed)?;
    io::Write::write_all(&mut file, value.as_bytes()).map_err(failed)
}

#[cfg(test)]
mod tests;
