//! Follows every system call of a process and of its threads by ptrace, and kills it at the one that was asked for.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::How;
use crate::disk::Unsynced;

/// How it went.
pub enum End {
    /// At this call.
    Stopped(String),
    /// By itself, with this exit code, before there were so many writes.
    Ended(u8),
    /// This machine does not let us.
    CannotTrace,
}

/// A call that changes the store.
#[derive(Debug)]
enum Call {
    Write { file: PathBuf, address: u64, len: usize, offset: u64 },
    Resize { file: PathBuf, len: u64 },
    Rename { from: PathBuf, to: PathBuf },
    Sync { file: PathBuf },
}

struct Tracee<'a> {
    pid: Pid,
    store: &'a Path,
    unsynced: Unsynced,
    writes: u64,
}

/// Runs a command until its n-th write to the store.
pub fn run(command: &[String], store: &Path, how: How, nth: u64) -> anyhow::Result<End> {
    // Stopped by itself before it becomes the daemon, so that it is traced from its first call on.
    let mut shell = Command::new("sh");
    shell.args(["-c", "kill -STOP $$; exec \"$@\"", "sh"]).args(command);
    let mut child = shell.spawn().context("failed to start a shell")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    waitpid(pid, Some(WaitPidFlag::WUNTRACED)).context("failed to wait for the shell")?;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    if let Err(Errno::EPERM | Errno::ENOSYS) = ptrace::seize(pid, options) {
        child.kill()?;
        child.wait()?;
        return Ok(End::CannotTrace);
    }
    kill(pid, Signal::SIGCONT)?;
    let mut tracee = Tracee { pid, store, unsynced: Unsynced::default(), writes: 0 };
    let mut stopped = None;
    loop {
        let status = waitpid(None, Some(WaitPidFlag::__WALL)).context("failed to wait for the tracee")?;
        let (thread, signal) = match status {
            WaitStatus::Exited(ended, code) if ended == pid => {
                return end(stopped, tracee.unsynced, how, nth, code);
            }
            WaitStatus::Signaled(ended, signal, _) if ended == pid => {
                return end(stopped, tracee.unsynced, how, nth, 128 + signal as i32);
            }
            WaitStatus::PtraceSyscall(thread) => {
                if stopped.is_none() {
                    stopped = tracee.syscall(thread, how, nth)?;
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::Exited(..)
            | WaitStatus::Signaled(..)
            | WaitStatus::Continued(_)
            | WaitStatus::StillAlive => continue,
        };
        match ptrace::syscall(thread, signal) {
            // It was killed meanwhile; its end is waited for like any other.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).context("failed to let the tracee go on"),
        }
    }
}

fn end(stopped: Option<Call>, unsynced: Unsynced, how: How, nth: u64, code: i32) -> anyhow::Result<End> {
    let Some(call) = stopped else { return Ok(End::Ended(u8::try_from(code).unwrap_or(1))) };
    if how == How::Power {
        unsynced.lose(nth).context("failed to take back what was not synchronised")?;
    }
    Ok(End::Stopped(format!("{call:?}")))
}

impl Tracee<'_> {
    /// A thread enters a call or returns from one. Gives the call at which the process was killed.
    fn syscall(&mut self, thread: Pid, how: How, nth: u64) -> anyhow::Result<Option<Call>> {
        let Ok(regs) = ptrace::getregs(thread) else { return Ok(None) };
        let result = regs.rax.cast_signed();
        // The kernel puts it there before the call; none of ours returns it.
        let enters = result == -i64::from(libc::ENOSYS);
        let Some(call) = self.call(thread, &regs)? else { return Ok(None) };
        if !enters {
            match call {
                Call::Sync { file } if result == 0 => self.unsynced.synced(&file),
                Call::Rename { from, to } if result == 0 => self.unsynced.renamed(&from, &to),
                Call::Write { .. } | Call::Resize { .. } | Call::Sync { .. } | Call::Rename { .. } => {}
            }
            return Ok(None);
        }
        self.writes += 1;
        if self.writes == nth {
            if let (How::Torn, Call::Write { file, address, len, offset }) = (how, &call) {
                let mut bytes = vec![0; (nth as usize).wrapping_mul(37) % (*len).max(1)];
                memory(thread)?
                    .read_exact_at(&mut bytes, *address)
                    .context("failed to read what is written")?;
                OpenOptions::new().write(true).open(file)?.write_all_at(&bytes, *offset)?;
            }
            kill(self.pid, Signal::SIGKILL)?;
            return Ok(Some(call));
        }
        match &call {
            Call::Write { file, len, offset, .. } => self.unsynced.writes(file, *offset, *len)?,
            Call::Resize { file, len } if *len > file.metadata()?.len() => self.unsynced.resizes(file)?,
            Call::Resize { .. } | Call::Rename { .. } | Call::Sync { .. } => {}
        }
        Ok(None)
    }

    fn call(&self, thread: Pid, regs: &libc::user_regs_struct) -> anyhow::Result<Option<Call>> {
        let of_fd = |fd: u64| {
            let path = std::fs::read_link(format!("/proc/{thread}/fd/{fd}")).ok()?;
            self.counts(&path).then_some(path)
        };
        let number = regs.orig_rax.cast_signed();
        Ok(match number {
            libc::SYS_pwrite64 => of_fd(regs.rdi).map(|file| Call::Write {
                file,
                address: regs.rsi,
                len: regs.rdx as usize,
                offset: regs.r10,
            }),
            libc::SYS_ftruncate => of_fd(regs.rdi).map(|file| Call::Resize { file, len: regs.rsi }),
            libc::SYS_fallocate => {
                of_fd(regs.rdi).map(|file| Call::Resize { file, len: regs.rdx + regs.r10 })
            }
            libc::SYS_fsync | libc::SYS_fdatasync => of_fd(regs.rdi).map(|file| Call::Sync { file }),
            libc::SYS_rename => {
                let (from, to) = (text(thread, regs.rdi)?, text(thread, regs.rsi)?);
                self.counts(&to).then_some(Call::Rename { from, to })
            }
            libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_io_submit
                if of_fd(regs.rdi).is_some() =>
            {
                bail!("the store is written by call {number}, which is not followed here")
            }
            _ => None,
        })
    }

    fn counts(&self, path: &Path) -> bool {
        Some(path) == self.store.parent() || path.with_extension("") == self.store.with_extension("")
    }
}

fn memory(thread: Pid) -> anyhow::Result<File> {
    File::open(format!("/proc/{thread}/mem")).context("failed to open the memory of the tracee")
}

/// A path in the tracee's memory.
fn text(thread: Pid, address: u64) -> anyhow::Result<PathBuf> {
    let memory = memory(thread)?;
    let mut bytes = Vec::new();
    let mut byte = [0];
    while bytes.len() < libc::PATH_MAX as usize {
        memory.read_exact_at(&mut byte, address + bytes.len() as u64).context("failed to read a path")?;
        if byte == [0] {
            break;
        }
        bytes.push(byte[0]);
    }
    Ok(PathBuf::from(String::from_utf8(bytes)?))
}
