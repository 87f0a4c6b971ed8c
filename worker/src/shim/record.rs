//! What is kept of a shim on disk, by which the next daemon finds it: `<data_dir>/run/<job>.<generation>/`.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use muster_core::types::{Assignment, CpuList, GangId, Surroundings, UserName};
use muster_worker_core::ShimRecord;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::protocol::State;
use crate::attached::{Attached, Output};
use crate::launch::cgroup::GangCgroup;
use crate::launch::procfs;

/// What the shim is to run, written before it is started.
const ORDER: &str = "order.json";
/// Who it is, written when it can be spoken to.
const RECORD: &str = "shim.json";
/// Its last state, written when it ends.
const FINAL: &str = "final.json";
/// Where it listens.
const SOCKET: &str = "sock";

/// What a shim is started for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub assignment: Assignment,
    #[serde(with = "crate::os_text")]
    pub data_dir: PathBuf,
    /// Tells this data directory's ranks from those of any other on the machine.
    pub data_id: String,
    /// The ranks end with the daemon, and have its terminal.
    #[serde(default)]
    pub attached: Option<Attached>,
    /// What the machine adds to the environment of the ranks.
    #[serde(default)]
    pub surroundings: Option<Box<Surroundings>>,
    /// As whom ranks run of which the job does not say it.
    #[serde(default)]
    pub run_as: Option<UserName>,
}

impl Order {
    /// What every process of the gang has in its environment, unless it took it out.
    pub fn mark(&self) -> String {
        format!("{}@{}", self.assignment.gang, self.data_id)
    }

    /// Processors to which one rank is bound, if it is.
    pub fn cpus_of(&self, local_rank: u32) -> Option<CpuList> {
        let bindings = &self.surroundings.as_ref()?.bindings;
        let binding = bindings.iter().find(|binding| binding.local_rank == local_rank)?;
        binding.cpus.parse().ok().filter(|cpus: &CpuList| !cpus.0.is_empty())
    }

    /// Returns program and arguments.
    pub fn command(&self) -> Vec<OsString> {
        match &self.attached {
            Some(attached) => attached.command.clone(),
            None => self.assignment.spec.command.iter().map(OsString::from).collect(),
        }
    }

    /// Returns where the ranks start, if somebody has said it.
    pub fn working_dir(&self) -> Option<PathBuf> {
        match &self.attached {
            Some(attached) => Some(attached.working_dir.clone()),
            None => self.assignment.spec.working_dir.as_ref().map(PathBuf::from),
        }
    }

    /// Where one rank writes.
    pub fn output(&self, local_rank: u32, log_dir: &Path) -> Output {
        match &self.attached {
            Some(attached) => Output::attached(attached, self.assignment.gang.generation, local_rank),
            None => Output::in_dir(log_dir),
        }
    }
}

/// Who a shim is, and what it holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub protocol: u32,
    #[serde(flatten)]
    pub process: ShimRecord,
    #[serde(flatten)]
    pub order: Order,
    pub master_port: Option<u16>,
    /// Ranks may have been started.
    pub launched: bool,
    /// Where the ranks' sockets are.
    #[serde(with = "crate::os_text")]
    pub sockets: PathBuf,
    /// The control groups of the ranks, where the machine lets us have any.
    #[serde(default)]
    pub cgroup: Option<GangCgroup>,
}

/// What a process is, which its id alone does not say.
pub(crate) fn this_process(boot_id: String) -> io::Result<ShimRecord> {
    let pid = nix::unistd::getpid().as_raw();
    let start_time = start_time(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
    Ok(ShimRecord { boot_id, pid, start_time })
}

/// Whether it runs; a zombie does not.
pub(crate) fn is_running(process: &ShimRecord, boot_id: &str) -> bool {
    process.boot_id == boot_id && start_time(process.pid) == Some(process.start_time)
}

/// Kills this process and no other: what a pidfd stands for is not replaced by what gets the id later.
pub(crate) fn kill(process: &ShimRecord, boot_id: &str) {
    let Some(pid) = rustix::process::Pid::from_raw(process.pid) else { return };
    if let Ok(handle) = pidfd_open(pid, PidfdFlags::empty())
        && is_running(process, boot_id)
    {
        pidfd_send_signal(handle, Signal::KILL).ok();
    }
}

/// When a process was started, in ticks since the boot. None if it does not run.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    procfs::stat(pid).filter(|stat| !matches!(stat.state, 'Z' | 'X')).map(|stat| stat.process.start_time)
}

/// The directory of one shim, held open: one that was removed and made again under its name is another.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    dir: File,
}

impl StateDir {
    /// Where a gang's is.
    pub fn path_of(data_dir: &Path, gang: &GangId) -> PathBuf {
        data_dir.join("run").join(format!("{}.{}", gang.job, gang.generation))
    }

    /// Makes it, for this user only. What an earlier try left is not taken over.
    pub fn create(path: &Path) -> io::Result<Self> {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        Self::open(path)
    }

    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), dir: File::open(path)? })
    }

    /// What it was opened as.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the shim listens: a path that fits a socket's address (108 bytes), wherever the directory is.
    pub fn socket(&self) -> PathBuf {
        self.held(SOCKET)
    }

    pub fn order(&self) -> io::Result<Order> {
        self.read(ORDER)
    }

    pub fn record(&self) -> io::Result<Record> {
        self.read(RECORD)
    }

    pub fn last_state(&self) -> io::Result<State> {
        self.read(FINAL)
    }

    pub fn write_order(&self, order: &Order) -> io::Result<()> {
        self.write(ORDER, order)
    }

    pub fn write_record(&self, record: &Record) -> io::Result<()> {
        self.write(RECORD, record)
    }

    pub fn write_last_state(&self, state: &State) -> io::Result<()> {
        self.write(FINAL, state)
    }

    /// Removes it with everything in it.
    pub fn remove(&self) {
        if let Ok(record) = self.record()
            && !record.sockets.starts_with(&self.path)
        {
            fs::remove_dir_all(&record.sockets).ok();
        }
        fs::remove_dir_all(&self.path).ok();
    }

    fn held(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> io::Result<T> {
        Ok(serde_json::from_slice(&fs::read(self.held(name))?)?)
    }

    /// There as a whole or not at all, whenever the writer is killed. What a crash of the machine leaves does not
    /// matter: no process outlives that.
    fn write(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        let new = self.held(&format!("{name}.new"));
        fs::write(&new, serde_json::to_vec(value)?)?;
        fs::rename(new, self.held(name))
    }
}
