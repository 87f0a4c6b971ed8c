//! One rank's process: started in its own session, signalled with everything it started, and reaped.

#![expect(unsafe_code, reason = "pre_exec runs between fork and exec")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use muster_core::types::{Rank, RankExit};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getppid, setsid};
use tokio::process::{Child, Command};

use crate::clock::unix_now;

/// Bytes of standard error that an exit carries.
const STDERR_TAIL_BYTES: u64 = 2048;

/// A rank that runs.
#[derive(Debug)]
pub(super) struct RankProcess {
    pub rank: Rank,
    child: Child,
    group: Pid,
    stderr: PathBuf,
}

/// Starts one rank. Must be called on the launcher's thread: the rank dies with the calling thread.
pub(super) fn start(
    rank: Rank,
    program: &Path,
    command: &[String],
    working_dir: &Path,
    log_dir: &Path,
    env: BTreeMap<OsString, OsString>,
) -> Result<RankProcess, String> {
    let stderr = log_dir.join("stderr.log");
    // Straight into the file: the daemon is not in the way of a program that prints much. Appending, so that
    // what an earlier life of the daemon left is never lost.
    let open = |path: &Path| -> Result<File, String> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.map_err(|error| format!("failed to open {}: {error}", path.display()))
    };
    let mut process = Command::new(program);
    process
        .args(&command[1..])
        .env_clear()
        .envs(env)
        .current_dir(working_dir)
        .stdin(Stdio::null())
        .stdout(open(&log_dir.join("stdout.log"))?)
        .stderr(open(&stderr)?);
    let daemon = Pid::this();
    // SAFETY: between fork and exec only these async-signal-safe system calls are made, and nothing is
    // allocated: each function of nix used here is a plain wrapper of its system call.
    unsafe {
        process.pre_exec(move || {
            setsid()?;
            set_pdeathsig(Signal::SIGKILL)?;
            // The daemon may have died before the line above.
            if getppid() == daemon { Ok(()) } else { Err(nix::errno::Errno::ESRCH.into()) }
        });
    }
    let child = process.spawn().map_err(|error| format!("failed to start {}: {error}", program.display()))?;
    let id = child.id().and_then(|id| i32::try_from(id).ok());
    let group = Pid::from_raw(id.ok_or_else(|| format!("{} ended before it ran", program.display()))?);
    Ok(RankProcess { rank, child, group, stderr })
}

impl RankProcess {
    /// A handle that signals the rank and everything it started.
    pub fn group(&self) -> Group {
        Group(self.group)
    }

    /// Waits for the rank, ends whatever it left behind in its session, and says how it ended.
    pub async fn wait(mut self) -> RankExit {
        let status = self.child.wait().await;
        // The leader is gone, its group may not be. A group that is empty has no such id any more.
        killpg(self.group, Signal::SIGKILL).ok();
        let (code, signal) = match status {
            Ok(status) => ended(status),
            Err(_) => (Some(-1), None),
        };
        let stderr_tail = tail(&self.stderr).unwrap_or_default();
        RankExit { rank: self.rank, code, signal, time: unix_now(), stderr_tail }
    }
}

/// The process group of a rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group(Pid);

impl Group {
    pub fn terminate(self) {
        killpg(self.0, Signal::SIGTERM).ok();
        // A stopped process acts on SIGTERM only when it goes on.
        killpg(self.0, Signal::SIGCONT).ok();
    }

    pub fn kill(self) {
        killpg(self.0, Signal::SIGKILL).ok();
    }
}

fn ended(status: ExitStatus) -> (Option<i32>, Option<i32>) {
    use std::os::unix::process::ExitStatusExt;
    match status.signal() {
        Some(signal) => (None, Some(signal)),
        None => (Some(status.code().unwrap_or(-1)), None),
    }
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(STDERR_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(STDERR_TAIL_BYTES).read_to_end(&mut bytes)?;
    // The cut may fall inside a character.
    let first = if start == 0 { 0 } else { bytes.iter().position(|b| (b & 0xC0) != 0x80).unwrap_or(0) };
    Ok(String::from_utf8_lossy(&bytes[first..]).into_owned())
}
