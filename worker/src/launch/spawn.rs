//! Fork and exec, with the child in its control group from its first instant.
//!
//! The standard library's way would be a child that moves itself there. To move a process the kernel waits until every
//! processor has passed a quiet state, 10 to 30 ms; a child that is made there waits for nothing.

#![expect(unsafe_code, reason = "between clone and exec there is no safe interface")]

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use nix::libc;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::cgroup::Entrance;
use super::files;
use super::user::User;

/// `CLONE_CLEAR_SIGHAND` and `CLONE_INTO_CGROUP` of linux/sched.h, Linux 5.7.
const CLEAR_HANDLERS: u64 = 0x1_0000_0000;
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// A program as the kernel takes it.
pub(super) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    dir: CString,
    /// Standard input, output and error: none of them is 0, 1 or 2.
    stdio: [OwnedFd; 3],
    /// Processors that it may use, if not all.
    cpus: Option<CpuSet>,
    /// As whom it runs, if not as whom this process does.
    user: Option<User>,
}

impl Program {
    /// Fails where anything holds a NUL byte.
    pub fn new(
        path: &Path,
        args: &[OsString],
        env: BTreeMap<OsString, OsString>,
        dir: &Path,
        stdio: [OwnedFd; 3],
    ) -> io::Result<Self> {
        let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
        let pair = |(mut key, value): (OsString, OsString)| {
            key.push("=");
            key.push(value);
            text(&key)
        };
        // By its path: programs that look for what belongs to them begin there.
        let args = [path.as_os_str()].into_iter().chain(args.iter().skip(1).map(OsString::as_os_str));
        Ok(Self {
            path: text(path.as_os_str())?,
            args: args.map(text).collect::<Result<_, _>>()?,
            env: env.into_iter().map(pair).collect::<Result<_, _>>()?,
            dir: text(dir.as_os_str())?,
            stdio,
            cpus: None,
            user: None,
        })
    }

    /// The same, on some processors alone.
    pub fn bound_to(self, cpus: Option<CpuSet>) -> Self {
        Self { cpus, ..self }
    }

    /// The same, as another user.
    pub fn run_by(self, user: Option<&User>) -> Self {
        Self { user: user.cloned(), ..self }
    }

    /// Runs it as a child in a session of its own, which dies with the calling thread. Returns once it runs; an error
    /// in between is the caller's.
    pub fn spawn(&self, entrance: Option<&Entrance>) -> io::Result<i32> {
        let (mut failed, failing) = io::pipe()?;
        let argv = pointers(&self.args);
        let envp = pointers(&self.env);
        let child = Child {
            program: self,
            argv: &argv,
            envp: &envp,
            parent: std::process::id() as i32,
            failing: failing.as_raw_fd(),
        };
        let pid = child.make(entrance)?;
        drop(failing);
        let mut errno = [0; 4];
        // The pipe is closed by exec.
        let read = failed.read(&mut errno);
        if matches!(read, Ok(0)) {
            return Ok(pid);
        }
        // It has ended, or ends now: nobody else shall find it among the children.
        while nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None) == Err(nix::errno::Errno::EINTR)
        {
        }
        Err(read.err().unwrap_or_else(|| io::Error::from_raw_os_error(i32::from_ne_bytes(errno))))
    }
}

fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
}

/// What the child needs, made before it is: it may allocate nothing.
struct Child<'a> {
    program: &'a Program,
    argv: &'a [*const libc::c_char],
    envp: &'a [*const libc::c_char],
    parent: i32,
    failing: RawFd,
}

impl Child<'_> {
    fn make(&self, entrance: Option<&Entrance>) -> io::Result<i32> {
        if let Some(entrance) = entrance
            && let Some(group) = entrance.group()
        {
            // SAFETY: all zeroes is a valid clone_args; it asks for nothing.
            let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
            args.flags = CLEAR_HANDLERS | INTO_CGROUP;
            args.exit_signal = libc::SIGCHLD as u64;
            args.cgroup = group as u64;
            // SAFETY: without CLONE_VM this is fork: the child has its own copy of everything, and calls nothing but
            // what is safe in a signal handler until it is another program.
            let pid =
                unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
            match pid {
                0 => self.run(|| entrance.enter_others()),
                1.. => return Ok(pid as i32),
                // An old kernel, or a container that does not allow it.
                _ => {}
            }
        }
        // SAFETY: as above.
        match unsafe { libc::fork() } {
            0 => self.run(|| entrance.map_or(Ok(()), Entrance::enter)),
            -1 => Err(io::Error::last_os_error()),
            pid => Ok(pid),
        }
    }

    /// In the child.
    fn run(&self, enter: impl FnOnce() -> io::Result<()>) -> ! {
        let Err(error) = enter().and_then(|()| self.become_program());
        let errno = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
        // SAFETY: the pipe is open, and the buffer lives for the call. Nothing of the parent's is run at the end.
        unsafe {
            libc::write(self.failing, errno.as_ptr().cast(), errno.len());
            libc::_exit(127)
        }
    }

    fn become_program(&self) -> io::Result<std::convert::Infallible> {
        let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        for (to, from) in (0..).zip(&self.program.stdio) {
            // SAFETY: system calls on descriptors that are open, and are not those that are replaced.
            check(unsafe { libc::dup2(from.as_raw_fd(), to) })?;
        }
        if let Some(cpus) = &self.program.cpus {
            // A plain wrapper of its system call.
            sched_setaffinity(Pid::from_raw(0), cpus)?;
        }
        if let Some(user) = &self.program.user {
            become_user(user)?;
        }
        // SAFETY: system calls on texts and sets that live through them. SIGPIPE is ignored in a
        // program of Rust, and SIGHUP under nohup; no rank expects the one, and torchrun's ranks
        // have the default of the other.
        unsafe {
            // As the user that it is by now: nobody starts where he may not go.
            check(libc::chdir(self.program.dir.as_ptr()))?;
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()))?;
            for ignored in [libc::SIGPIPE, libc::SIGHUP] {
                if libc::signal(ignored, libc::SIG_DFL) == libc::SIG_ERR {
                    return Err(io::Error::last_os_error());
                }
            }
            check(libc::setsid())?;
            files::as_before()?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // The parent may have died before the line above.
            if libc::getppid() != self.parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            libc::execve(self.program.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr());
        }
        Err(io::Error::last_os_error())
    }
}

/// In the child. The C library's functions are not for here: they make all threads of the process follow, by a list that is the
/// parent's.
fn become_user(user: &User) -> io::Result<()> {
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on numbers, and on a list that lives through its own. First what only root may do.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid))?;
        check(libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid))
    }
}

/// A descriptor of ours as the child's standard input, output or error.
pub(super) fn inherited(descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: it makes a new descriptor, which nobody else has, or fails.
    let copy = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: as above.
    if copy < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(copy) }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::cgroup::Cgroups;
    use std::fs::File;

    fn program(path: &str, args: &[&str], dir: &Path, out: &Path) -> io::Result<Program> {
        let args: Vec<OsString> = [path].iter().chain(args).map(OsString::from).collect();
        let env = [("A".into(), "b c".into())].into();
        let stdio = [File::open("/dev/null")?, File::create(out)?, File::create(out.with_extension("err"))?];
        Program::new(Path::new(path), &args, env, dir, stdio.map(OwnedFd::from))
    }

    fn wait(pid: i32) {
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
    }

    #[test]
    fn a_child_is_in_its_group_before_it_does_anything() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = "echo $A $# $PWD; cat /proc/self/cgroup; cut -d' ' -f6 /proc/$$/stat; echo $$; trap; cat /proc/self/limits | wc -l";
        let program = program("/bin/sh", &["-c", script, "x", "1", "2"], dir.path(), &out).unwrap();
        let name = format!("spawn-{}", std::process::id());
        let groups = Cgroups::find().create(&name, 1, None).unwrap();
        let entrance = groups.as_ref().map(|groups| groups.entrance(0).unwrap());
        let pid = program.spawn(entrance.as_ref()).unwrap();
        wait(pid);
        let said = std::fs::read_to_string(&out).unwrap();
        let lines: Vec<&str> = said.lines().map(str::trim).collect();
        assert_eq!(lines[0], format!("b c 2 {}", dir.path().display()), "{said}");
        assert!(lines.iter().filter(|line| **line == pid.to_string()).count() == 2, "{pid}: {said}");
        if let Some(groups) = groups {
            assert!(lines.iter().any(|line| line.ends_with(&format!("{name}/rank0"))), "{said}");
            groups.remove_soon().unwrap();
        }
    }

    #[test]
    fn what_cannot_be_run_is_an_error_and_no_child() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let fails = |path: &str, at: &Path| program(path, &[], at, &out).unwrap().spawn(None).unwrap_err();
        assert_eq!(fails("/no/such/program", dir.path()).raw_os_error(), Some(libc::ENOENT));
        assert_eq!(fails("/bin/true", &dir.path().join("none")).raw_os_error(), Some(libc::ENOENT));
        assert_eq!(fails("/etc/passwd", dir.path()).raw_os_error(), Some(libc::EACCES));
        assert!(program("/bin/true", &["a\0b"], dir.path(), &out).is_err());
    }
}
