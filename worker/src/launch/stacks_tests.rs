//! Ranks that hang in different ways, and debuggers that do.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Child;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::*;

struct Rank(Child);

impl Rank {
    fn start(script: &str) -> Self {
        Self(Command::new("sh").args(["-c", script]).process_group(0).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // With what it started.
        killpg(Pid::from_raw(self.pid()), Signal::SIGKILL).ok();
        self.0.wait().ok();
    }
}

#[test]
fn a_program_is_found_where_path_says() {
    let dir = tempfile::tempdir().unwrap();
    let made = program(dir.path(), "true");
    let path = format!("relative:/nowhere:{}", dir.path().display());
    assert_eq!(find_on(path.as_ref(), "py-spy"), Some(made));
    assert_eq!(find_on("/nowhere".as_ref(), "py-spy"), None);
    let rank = Rank::start("exec sleep 1000");
    let mut log = Vec::new();
    write(&mut log, rank.pid(), "why").unwrap();
    assert!(String::from_utf8(log).unwrap().starts_with("\n=== muster: why ===\nprocess "));
}

fn told(pid: i32, py_spy: Option<&Path>) -> String {
    let mut log = Vec::new();
    write_with(&mut log, pid, "rank 3 shows no progress", py_spy.map(Path::to_owned)).unwrap();
    assert!(log.len() <= BYTES_MAX + 100, "{} bytes", log.len());
    String::from_utf8(log).unwrap()
}

/// Looks until what is told contains all of these.
fn eventually_told(pid: i32, parts: &[&str]) {
    let mut text = String::new();
    for _ in 0..500 {
        text = told(pid, None);
        if parts.iter().all(|part| text.contains(part)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{parts:?} in {text}");
}

fn program(dir: &Path, script: &str) -> PathBuf {
    let path = dir.join("py-spy");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn what_hangs_is_told_in_words() {
    let rank = Rank::start("exec sleep 1000");
    let pid = rank.pid();
    let calls = if Path::new("/proc/self/syscall").exists() {
        "nanosleep"
    } else {
        eprintln!("SKIPPED: this kernel does not tell system calls");
        ""
    };
    let header = "=== muster: rank 3 shows no progress ===";
    eventually_told(pid, &[header, "\"sleep\"", "sleeping", calls, "=== muster: end ==="]);
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    eventually_told(pid, &["stopped (SIGSTOP"]);
    let parent = Rank::start("sleep 1000 & wait");
    eventually_told(parent.pid(), &["  child ", "\"sleep\": sleeping"]);
    kill(Pid::from_raw(parent.pid()), Signal::SIGKILL).unwrap();
    eventually_told(parent.pid(), &["ended, not yet reaped"]);
}

#[test]
fn who_has_ended_is_not_there() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    child.wait().unwrap();
    assert!(told(pid, None).contains("is not there any more"));
    assert!(told(0, None).contains("is not there any more"));
    assert!(told(-1, None).contains("is not there any more"));
}

#[test]
fn py_spy_is_asked_and_bounded() {
    let rank = Rank::start("exec sleep 1000");
    let dir = tempfile::tempdir().unwrap();
    let asked = program(dir.path(), "echo \"asked: $*\"; echo and why >&2");
    let text = told(rank.pid(), Some(&asked));
    assert!(text.contains(&format!("asked: dump --pid {}\nand why\n", rank.pid())), "{text}");
    let flood = program(dir.path(), "exec yes 'File \"train.py\", line 7'");
    let text = told(rank.pid(), Some(&flood));
    assert!(text.contains("line 7") && text.contains("(cut: there is more)"), "{}", text.len());
    let text = told(rank.pid(), Some(Path::new("/nowhere/py-spy")));
    assert!(text.contains("py-spy cannot be run"), "{text}");
}

#[test]
fn py_spy_runs_as_the_ranks_user() {
    if !geteuid().is_root() {
        eprintln!("SKIPPED: only root has ranks of other users");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let asked = program(dir.path(), "echo \"as $(id -u) $(id -g) [$(id -G)] in $PWD, $SECRET\"");
    for id in [0, 65534] {
        let mut command = Command::new("sleep");
        let rank = Rank(command.arg("1000").uid(id).gid(id).process_group(0).spawn().unwrap());
        let text = told(rank.pid(), Some(&asked));
        assert!(text.contains(&format!("as {id} {id} [")), "{text}");
        let alone = text.contains(&format!("as {id} {id} [{id}] in /, \n"));
        assert!(id == 0 || alone, "no group and no variable of root's: {text}");
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "how long it takes is what is tested")]
fn a_py_spy_that_hangs_is_killed() {
    let rank = Rank::start("exec sleep 1000");
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let hangs = program(dir.path(), &format!("echo $$ > {}; exec sleep 1000", pid_file.display()));
    let start = Instant::now();
    let text = told(rank.pid(), Some(&hangs));
    assert!(text.contains("py-spy did not answer in time"), "{text}");
    assert!(start.elapsed() < TIME_MAX, "{:?}", start.elapsed());
    let pid = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    assert!(Process::of(pid).is_none_or(|process| !process.is_alive()));
}

#[test]
fn the_kernels_part_leaves_room_for_pythons() {
    let mut log = Vec::new();
    let mut room = Room { log: &mut log, left: BYTES_MAX - CUT.len(), kernel_left: KERNEL_BYTES_MAX };
    for _ in 0..100 {
        room.put_kernel(&"k".repeat(1000)).unwrap();
    }
    room.put(&"\u{e9}".repeat(40_000)).unwrap();
    room.put("never").unwrap();
    let text = String::from_utf8(log).unwrap();
    assert!(text.len() <= BYTES_MAX && text.matches('k').count() == 32_000, "{}", text.len());
    assert!(text.contains("more threads") && text.ends_with(CUT));
}

#[test]
fn a_system_call_has_a_name() {
    let table = [
        ("0 0x3 0x7f2c 0x20000 0x7fff 0x7f2c", Some(format!("in system call {} read", libc::SYS_read))),
        ("99999 0x3", Some("in system call 99999".to_owned())),
        ("running\n", None),
        ("-1 0x7fff 0x7f2c\n", None),
        ("", None),
    ];
    for (text, expected) in table {
        if text.starts_with('0') && libc::SYS_read != 0 {
            continue;
        }
        assert_eq!(system_call(text), expected, "{text:?}");
    }
}
