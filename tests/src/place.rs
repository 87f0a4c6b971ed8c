//! Where `muster run` is run, and what it leaves there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{Outcome, binary, eventually, processes_with};

/// A directory to run in, and one for what is temporary.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// Makes them.
    #[expect(clippy::new_without_default, reason = "it makes directories")]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tmp")).unwrap();
        Self { dir }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A shell script that can be run with --no-python.
    pub fn script(&self, text: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path("program");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        "./program".to_owned()
    }

    /// `muster run` with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary("muster"));
        command.arg("run").args(args).current_dir(self.dir.path()).env("TMPDIR", self.path("tmp"));
        command
    }

    /// The same, run to its end, with nothing left of it.
    pub fn run(&self, args: &[&str]) -> Outcome {
        let outcome = Outcome::of(&mut self.command(args));
        self.nothing_is_left();
        outcome
    }

    /// The same, started.
    pub fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// No process of this place, and nothing temporary.
    pub fn nothing_is_left(&self) {
        let mark = self.dir.path().to_str().unwrap();
        eventually("the end of all processes", || {
            let left = processes_with(mark);
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
        eventually("the end of what is temporary", || {
            let left: Vec<_> =
                self.path("tmp").read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
    }
}

/// The lines of a text, sorted.
pub fn lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

/// Every file below a directory, by its path from there.
pub fn files(dir: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in next.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                dirs.push(entry);
            } else {
                let name = entry.strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, std::fs::read_to_string(entry).unwrap());
            }
        }
    }
    found
}

/// The one directory that a run has made in its --log-dir.
pub fn run_dir(logs: &Path) -> PathBuf {
    let dirs: Vec<_> = logs.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(dirs.len(), 1, "{dirs:?}");
    dirs[0].clone()
}

/// Commands that meet, each with its own end. They are killed if the test fails.
pub struct Nodes(pub Vec<Child>);

impl Nodes {
    /// Their exit codes and outputs, in order.
    pub fn ends(mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.0).into_iter().map(|node| node.wait_with_output().unwrap().into()).collect()
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &mut self.0 {
            node.kill().ok();
            node.wait().ok();
        }
    }
}

/// Ports that no connection gets by itself: Linux takes those from 32768 on. A port that a test was given for a server it
/// has yet to start would otherwise be gone, now and then, before the server takes it.
const PORTS: std::ops::Range<u16> = 16_384..32_768;

/// A port of the loopback that is free now, and that this process is not given again soon.
pub fn free_port() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Test programs that run side by side begin far from one another.
    let begin = std::process::id().wrapping_mul(509);
    let ports = u32::from(PORTS.end - PORTS.start);
    let free = (0..ports).find_map(|_| {
        let offset = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % ports;
        let port = PORTS.start + u16::try_from(offset).unwrap();
        std::net::TcpListener::bind(("127.0.0.1", port)).is_ok().then_some(port)
    });
    free.unwrap().to_string()
}
