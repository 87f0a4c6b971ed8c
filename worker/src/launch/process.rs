//! One rank's process: started in its own session, signalled with everything it started, and reaped.

#![expect(unsafe_code, reason = "pre_exec runs between fork and exec")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    group: Group,
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
    let id = id.ok_or_else(|| format!("{} ended before it ran", program.display()))?;
    let group = Group { id: Pid::from_raw(id), ended: Arc::default() };
    Ok(RankProcess { rank, child, group, stderr })
}

impl RankProcess {
    /// A handle that signals the rank and everything it started.
    pub fn group(&self) -> Group {
        self.group.clone()
    }

    /// Waits for the rank, ends whatever it left behind in its session, and says how it ended.
    pub async fn wait(mut self) -> RankExit {
        let status = self.child.wait().await;
        // The leader is gone, its group may not be. The kernel keeps the number of a group that has members, and
        // gives out that of an empty one only after all others have had their turn: this hits the group or nothing.
        self.group.kill();
        // Later that would not hold any more.
        self.group.ended.store(true, Ordering::Relaxed);
        let (code, signal) = match status {
            Ok(status) => ended(status),
            Err(_) => (Some(-1), None),
        };
        let stderr_tail = tail(&self.stderr).unwrap_or_default();
        let (out_of_memory, error) = (false, None);
        RankExit { rank: self.rank, code, signal, time: unix_now(), stderr_tail, out_of_memory, error }
    }
}

/// The process group of a rank. Signals nothing once the rank has been reaped: its number may then be another's.
/// Reaping and signalling both happen on the launcher's thread, so that neither comes between the other's steps.
#[derive(Clone, Debug)]
pub(super) struct Group {
    id: Pid,
    ended: Arc<AtomicBool>,
}

impl Group {
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
        // A stopped process acts on SIGTERM only when it goes on.
        self.signal(Signal::SIGCONT);
    }

    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&self, signal: Signal) {
        if !self.ended.load(Ordering::Relaxed) {
            // It may have ended by itself in this moment.
            killpg(self.id, signal).ok();
        }
    }
}

fn ended(status: ExitStatus) -> (Option<i32>, Option<i32>) {
    use std::os::unix::process::ExitStatusExt;
    match status.signal() {
        Some(signal) => (None, Some(signal)),
        None => (Some(status.code().unwrap_or(-1)), None),
    }
}

/// The end of a file as text, in at most [`STDERR_TAIL_BYTES`].
fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(STDERR_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(STDERR_TAIL_BYTES).read_to_end(&mut bytes)?;
    // The cut may fall inside a character.
    let first = if start == 0 { 0 } else { bytes.iter().position(|b| (b & 0xC0) != 0x80).unwrap_or(0) };
    let mut text = String::from_utf8_lossy(&bytes[first..]).into_owned();
    // What stands for a byte that is no text takes three.
    let over = text.len().saturating_sub(STDERR_TAIL_BYTES as usize);
    text.drain(..text.ceil_char_boundary(over));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_text_and_short_whatever_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stderr.log");
        let table: [(Vec<u8>, usize, &str); 5] = [
            (b"".to_vec(), 0, ""),
            (b"cannot read shard 7\n".to_vec(), 20, "shard 7\n"),
            ([vec![b'x'; 5000], b"end\n".to_vec()].concat(), 2048, "xend\n"),
            ("\u{e9}".repeat(3000).into_bytes(), 2048, "\u{e9}"),
            ([vec![0xFF; 5000], b"end\n".to_vec()].concat(), 2047, "\u{fffd}end\n"),
        ];
        for (written, length, ends) in table {
            std::fs::write(&path, &written).unwrap();
            let text = tail(&path).unwrap();
            assert!(text.ends_with(ends) && text.len() == length, "{} bytes: {text:?}", text.len());
        }
    }

    #[tokio::test]
    async fn a_group_is_left_alone_once_its_rank_was_reaped() {
        let dir = tempfile::tempdir().unwrap();
        let command = ["true".to_owned()];
        let env = BTreeMap::new();
        let rank = start(Rank(3), Path::new("/bin/true"), &command, dir.path(), dir.path(), env).unwrap();
        let group = rank.group();
        let exit = rank.wait().await;
        assert_eq!((exit.rank, exit.code, exit.signal), (Rank(3), Some(0), None));
        assert!(group.ended.load(Ordering::Relaxed), "its number may be another's now");
    }
}
