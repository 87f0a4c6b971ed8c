//! One rank's process: started in its own session, and signalled with everything it started.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use super::cgroup::Entrance;
use super::interpreter;
use super::spawn::{self, inherited};
use super::user::User;
use crate::attached::{Output, Sink};
use crate::data_dir::private_file;
use muster_core::types::{CpuList, Rank};
use nix::sched::CpuSet;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Bytes of standard error that an exit carries.
const STDERR_TAIL_BYTES: u64 = 2048;
/// What is read from and written to in the place of nothing.
const NOTHING: &str = "/dev/null";

/// A rank that runs, or that has ended and was not waited for yet: until then its process id is no other's.
#[derive(Debug)]
pub(crate) struct RankProcess {
    pub rank: Rank,
    pub pid: i32,
}

/// What is run as each rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program<'a> {
    pub path: &'a Path,
    /// With the name by which it is called.
    pub command: &'a [OsString],
    pub working_dir: &'a Path,
    /// As whom, if not as whom this process is run.
    pub user: Option<&'a User>,
}

/// Starts one rank. It dies with the calling thread.
pub(crate) fn start(
    rank: Rank,
    program: Program<'_>,
    output: &Output,
    env: BTreeMap<OsString, OsString>,
    entrance: Option<&Entrance>,
    cpus: Option<&CpuList>,
) -> Result<RankProcess, String> {
    // Straight into the file: no process of ours is in the way of a program that prints much. Appending, so that
    // what is there is never lost.
    let open = |sink: &Sink, own: RawFd| -> Result<OwnedFd, String> {
        let failed = |what: &dyn Display, error| format!("failed to open {what}: {error}");
        match sink {
            Sink::File(path) => {
                // It is its rank's user's, who may read what was said.
                let file = private_file()
                    .append(true)
                    .open(path)
                    .and_then(|file| program.user.map_or(Ok(()), |user| user.own_file(&file)).map(|()| file));
                Ok(file.map_err(|error| failed(&path.display(), error))?.into())
            }
            Sink::Inherited => inherited(own).map_err(|error| failed(&"the terminal", error)),
            Sink::Nothing => nothing(true).map_err(|error| failed(&NOTHING, error)),
        }
    };
    let stdin = if output.reads_input { inherited(0) } else { nothing(false) };
    let stdin = stdin.map_err(|error| format!("failed to open its standard input: {error}"))?;
    let stdio = [stdin, open(&output.stdout, 1)?, open(&output.stderr, 2)?];
    let cpus = cpus.map(cpu_set).transpose()?;
    let user = program.user;
    let pid = spawn::Program::new(program.path, program.command, env, program.working_dir, stdio)
        .and_then(|program| program.bound_to(cpus).run_by(user).spawn(entrance))
        .map_err(|error| {
            // It may be the directory that is closed to that user.
            let at = |user: &User| format!(" in {} as {}", program.working_dir.display(), user.name);
            let at = user.map(at).unwrap_or_default();
            let behind = interpreter::explain(program.path, &error);
            format!("failed to start {}{at}: {error}{behind}", program.path.display())
        })?;
    Ok(RankProcess { rank, pid })
}

fn nothing(to_write: bool) -> std::io::Result<OwnedFd> {
    OpenOptions::new().read(!to_write).write(to_write).open(NOTHING).map(OwnedFd::from)
}

/// As the kernel takes it. What does not fit is beyond the thousand processors that it is made for, and is left out.
fn cpu_set(cpus: &CpuList) -> Result<CpuSet, String> {
    let mut set = CpuSet::new();
    for cpu in cpus.0.iter().filter(|cpu| (**cpu as usize) < CpuSet::count()) {
        set.set(*cpu as usize)
            .map_err(|error| format!("failed to bind a rank to processor {cpu}: {error}"))?;
    }
    Ok(set)
}

impl RankProcess {
    /// Signals the rank and everything in its session's first group.
    ///
    /// Also right after it was waited for, to end what it left: the kernel keeps the number of a group that has
    /// members, and gives out that of an empty one only after all others have had their turn. Not later.
    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself in this moment.
        killpg(Pid::from_raw(self.pid), signal).ok();
        if signal != Signal::SIGKILL {
            // A stopped process acts on most signals only when it goes on.
            killpg(Pid::from_raw(self.pid), Signal::SIGCONT).ok();
        }
    }
}

/// The end of a file as text, in at most [`STDERR_TAIL_BYTES`].
pub(crate) fn tail(path: &Path) -> std::io::Result<String> {
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
}
