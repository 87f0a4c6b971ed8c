//! What a rank that shows no progress is doing, as far as the kernel and py-spy can tell: for the end of its log.
//!
//! Everything here is best effort. Neither a process that hangs in the kernel nor a debugger may hold us up.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, Instant};

use nix::libc;
use nix::unistd::geteuid;

use super::procfs::{self, Process};

/// Longest description: a log is read by people.
const BYTES_MAX: usize = 64 << 10;
/// Of that, what the kernel tells: hundreds of threads must leave room for what Python tells.
const KERNEL_BYTES_MAX: usize = 32 << 10;
/// Longest time for all of it; who asks stops the gang next.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Longest time for py-spy, which waits for a process that hangs in the kernel.
const PY_SPY_MAX: Duration = Duration::from_secs(3);
const PY_SPY_POLL: Duration = Duration::from_millis(20);
/// Children that are listed: data loaders, as a rule one for each core.
const CHILDREN_MAX: usize = 64;
/// Pieces of text on their way to the log. Who gathers them waits for who writes.
const PIECES_MAX: usize = 4;
/// Where a py-spy that is a script finds its interpreter.
const SYSTEM_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
const CUT: &str = "\n(cut: there is more)\n";

/// Writes what the process does, after `header`, which says why. The rest is dropped when the time is up.
pub(crate) fn write(log: &mut dyn Write, pid: i32, header: &str) -> io::Result<()> {
    write_with(log, pid, header, std::env::var_os("PATH").and_then(|path| find_on(&path, "py-spy")))
}

#[expect(clippy::disallowed_methods, reason = "the kernel may take for ever over a process that hangs")]
fn write_with(log: &mut dyn Write, pid: i32, header: &str, py_spy: Option<PathBuf>) -> io::Result<()> {
    let end = Instant::now() + TIME_MAX;
    let (sender, pieces) = mpsc::sync_channel(PIECES_MAX);
    // It may be left behind in a read that never returns, and ends with what it waits for.
    std::thread::Builder::new().name("stacks".to_owned()).spawn(move || {
        kernel(pid, &sender);
        if let Some(program) = py_spy {
            sender.send(Piece::Python(run_py_spy(program, pid))).ok();
        }
    })?;
    let mut room = Room { log, left: BYTES_MAX - CUT.len(), kernel_left: KERNEL_BYTES_MAX };
    room.put(&format!("\n=== muster: {header} ===\n"))?;
    gather(&mut room, &pieces, end)?;
    room.log.write_all(b"=== muster: end ===\n")?;
    room.log.flush()
}

enum Piece {
    Kernel(String),
    Python(String),
}

#[expect(clippy::disallowed_methods, reason = "the kernel may take for ever over a process that hangs")]
fn gather(room: &mut Room<'_>, pieces: &Receiver<Piece>, end: Instant) -> io::Result<()> {
    loop {
        match pieces.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Piece::Kernel(text)) => room.put_kernel(&text)?,
            Ok(Piece::Python(text)) => room.put(&text)?,
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return room.put("(no answer in time: the process holds up who asks about it)\n");
            }
        }
    }
}

/// The log, with the bytes that may still be written to it.
struct Room<'a> {
    log: &'a mut dyn Write,
    left: usize,
    kernel_left: usize,
}

impl Room<'_> {
    fn put(&mut self, text: &str) -> io::Result<()> {
        let fits = text.floor_char_boundary(self.left);
        self.log.write_all(&text.as_bytes()[..fits])?;
        if fits < text.len() && self.left > 0 {
            self.left = 0;
            return self.log.write_all(CUT.as_bytes());
        }
        self.left -= fits;
        Ok(())
    }

    fn put_kernel(&mut self, text: &str) -> io::Result<()> {
        if self.kernel_left == 0 {
            return Ok(());
        }
        if text.len() > self.kernel_left {
            self.kernel_left = 0;
            return self.put("(cut: there are more threads)\n");
        }
        self.kernel_left -= text.len();
        self.put(text)
    }
}

/// The process, its children, and each of its threads.
fn kernel(pid: i32, pieces: &SyncSender<Piece>) {
    let send = |text: String| pieces.send(Piece::Kernel(text)).is_ok();
    let Some(stat) = procfs::stat(pid) else {
        send(format!("process {pid} is not there any more\n"));
        return;
    };
    let mut text = String::new();
    let children: Vec<_> = procfs::pids()
        .into_iter()
        .filter_map(procfs::stat)
        .filter(|s| s.parent == pid)
        .take(CHILDREN_MAX)
        .collect();
    for child in children {
        let (id, waits) = (child.process.pid, waits_in(&format!("/proc/{}", child.process.pid)));
        writeln!(text, "  child {id} {:?}: {}{waits}", child.name, in_words(child.state)).ok();
    }
    let header = format!("process {pid} {:?}, child of {}\n", stat.name, stat.parent);
    if !send(header + &text) {
        return;
    }
    for thread in procfs::threads(pid) {
        if thread_text(pid, thread).is_some_and(|text| !send(text)) {
            return;
        }
    }
}

/// None of a thread that has ended.
fn thread_text(pid: i32, thread: i32) -> Option<String> {
    let dir = format!("/proc/{pid}/task/{thread}");
    let stat = procfs::parse_stat(&procfs::read(&format!("{dir}/stat"))?)?;
    let mut text = format!("thread {thread} {:?}: {}{}", stat.name, in_words(stat.state), waits_in(&dir));
    if let Some(call) = procfs::read(&format!("{dir}/syscall")).and_then(|text| system_call(&text)) {
        write!(text, ", {call}").ok();
    }
    text.push('\n');
    for frame in procfs::read(&format!("{dir}/stack")).unwrap_or_default().lines() {
        writeln!(text, "    {}", frame.trim_start_matches("[<0>] ")).ok();
    }
    Some(text)
}

fn in_words(state: char) -> String {
    let words = match state {
        'R' => "running",
        'S' => "sleeping",
        'I' => "idle",
        'D' => "uninterruptible (hangs in the kernel, or frozen; SIGKILL has to wait as well)",
        'T' => "stopped (SIGSTOP; SIGCONT makes it go on)",
        't' => "stopped by a debugger",
        'Z' => "ended, not yet reaped",
        'X' => "ended",
        other => return format!("in state {other}"),
    };
    words.to_owned()
}

/// The kernel's function in which it waits.
fn waits_in(dir: &str) -> String {
    match procfs::read(&format!("{dir}/wchan")) {
        Some(function) if !matches!(function.as_str(), "" | "0") => format!(", waits in {function}"),
        _ => String::new(),
    }
}

/// Of /proc/PID/syscall. None if it runs in user space, or is stopped outside of any call.
fn system_call(text: &str) -> Option<String> {
    let number: i64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    let name = SYSTEM_CALLS.iter().find(|(known, _)| *known == number).map_or("", |(_, name)| name);
    (number >= 0).then(|| format!("in system call {number} {name}").trim_end().to_owned())
}

/// Those in which training hangs.
const SYSTEM_CALLS: &[(i64, &str)] = &[
    (libc::SYS_read, "read"),
    (libc::SYS_write, "write"),
    (libc::SYS_readv, "readv"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_close, "close"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_flock, "flock"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_futex, "futex"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_accept, "accept"),
    (libc::SYS_accept4, "accept4"),
    (libc::SYS_recvfrom, "recvfrom"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_ppoll, "ppoll"),
    (libc::SYS_pselect6, "pselect6"),
    (libc::SYS_epoll_pwait, "epoll_pwait"),
    (libc::SYS_nanosleep, "nanosleep"),
    (libc::SYS_clock_nanosleep, "clock_nanosleep"),
    (libc::SYS_restart_syscall, "restart_syscall"),
    (libc::SYS_wait4, "wait4"),
    (libc::SYS_waitid, "waitid"),
    (libc::SYS_rt_sigtimedwait, "rt_sigtimedwait"),
    (libc::SYS_rt_sigsuspend, "rt_sigsuspend"),
    (libc::SYS_sched_yield, "sched_yield"),
    (libc::SYS_exit_group, "exit_group"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, "open"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, "poll"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_select, "select"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_epoll_wait, "epoll_wait"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_pause, "pause"),
];

fn find_on(path: &OsStr, name: &str) -> Option<PathBuf> {
    std::env::split_paths(path).map(|dir| dir.join(name)).find(|file| file.is_absolute() && file.is_file())
}

/// Has a command run as the user of a process, where this process is root and that one is not. It reads memory that the
/// user has filled, and must not be worth an attack. Its environment is a login's. The error says why it is not run.
fn as_its_user(command: &mut Command, pid: i32) -> Result<(), String> {
    if !geteuid().is_root() {
        return Ok(());
    }
    match procfs::user(pid) {
        Some(user) if user.uid == 0 => Ok(()),
        Some(user) => {
            command.uid(user.uid).gid(user.gid).current_dir("/").env_clear().env("PATH", SYSTEM_PATH);
            Ok(())
        }
        None => Err("py-spy is not run: the kernel does not say whose the process is\n".to_owned()),
    }
}

/// What py-spy says, or why it says nothing.
#[expect(clippy::disallowed_methods, reason = "py-spy waits for a process that hangs")]
fn run_py_spy(program: PathBuf, pid: i32) -> String {
    let mut command = Command::new(program);
    command.args(["dump", "--pid", &pid.to_string()]);
    if let Err(why) = as_its_user(&mut command, pid) {
        return why;
    }
    // One pipe for both, so that they come in the order in which they were written.
    let started = io::pipe().and_then(|(output, input)| {
        command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
        Ok((command.spawn()?, output))
    });
    // The command holds its own end of the pipe open.
    drop(command);
    let (mut child, output) = match started {
        Ok(started) => started,
        Err(error) => return format!("py-spy cannot be run: {error}\n"),
    };
    // Its parent may reap all its children: then the number is not enough to tell it from another process.
    let process = i32::try_from(child.id()).ok().and_then(Process::of);
    let (sender, text) = mpsc::channel();
    let read = move || {
        let mut bytes = Vec::new();
        output.take(BYTES_MAX as u64).read_to_end(&mut bytes).ok();
        sender.send(String::from_utf8_lossy(&bytes).into_owned()).ok();
    };
    let end = Instant::now() + PY_SPY_MAX;
    if std::thread::Builder::new().name("py-spy".to_owned()).spawn(read).is_err() {
        return "py-spy cannot be read\n".to_owned();
    }
    let told = text.recv_timeout(PY_SPY_MAX);
    // Its output is closed, too long, or late: in each case it has nothing more to do.
    while matches!(child.try_wait(), Ok(None)) {
        if told.is_err() || Instant::now() >= end {
            if let Some(process) = process {
                process.kill();
            }
            child.wait().ok();
            break;
        }
        std::thread::sleep(PY_SPY_POLL);
    }
    told.map_or_else(|_| "py-spy did not answer in time\n".to_owned(), |text| text + "\n")
}

#[cfg(test)]
#[path = "stacks_tests.rs"]
mod tests;
