//! The programs that tests run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// How a program ended, and what it wrote.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its exit code, or -1 if a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Outcome {
    /// Runs a program to its end.
    pub fn of(command: &mut Command) -> Self {
        command.output().unwrap_or_else(|error| panic!("failed to run {command:?}: {error}")).into()
    }

    /// The standard output, once the program has succeeded.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// The standard output as JSON values, one after the other.
    pub fn json(self) -> Vec<Value> {
        let text = self.ok();
        let values = serde_json::Deserializer::from_str(&text).into_iter();
        values.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// A binary of this workspace, built into the same directory as the test that runs.
pub fn binary(name: &str) -> PathBuf {
    let path = beside_test(name);
    assert!(path.is_file(), "{} is not built; run `cargo build --workspace` first", path.display());
    path
}

/// `muster-trainer`, if it was built: that needs libtorch.
pub fn trainer() -> Option<PathBuf> {
    Some(beside_test("muster-trainer")).filter(|path| path.is_file())
}

fn beside_test(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // target/debug/deps/test-… and target/debug/bench-program alike.
    let dir = test.parent().unwrap();
    let dir = if dir.ends_with("deps") { dir.parent().unwrap() } else { dir };
    dir.join(name)
}

/// Returns a file of what `cargo xtask test` brings, if it is there.
pub fn brought(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps").join(name).canonicalize().ok()?;
    path.is_file().then_some(path)
}

/// Returns the real grpcurl, if it was brought.
pub fn grpcurl_path() -> Option<PathBuf> {
    brought("bin/grpcurl")
}

/// Returns libfaketime, if it was brought.
pub fn faketime_path() -> Option<PathBuf> {
    brought("lib/libfaketimeMT.so.1")
}

/// Returns ibstat, if it was brought.
pub fn ibstat_path() -> Option<PathBuf> {
    brought("ibstat/usr/sbin/ibstat")
}

/// Returns `prometheus` or `promtool`, if they were brought.
pub fn prometheus_path(name: &str) -> Option<PathBuf> {
    brought(&format!("prometheus/usr/bin/{name}"))
}

/// Returns a command of iproute2, as it was brought or else as it is installed.
pub fn ip_path() -> PathBuf {
    brought("iproute2/usr/bin/ip").unwrap_or_else(|| "ip".into())
}

/// A file or folder of `deploy/`.
pub fn deployed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// The processors that this process may use.
pub fn processors() -> Vec<usize> {
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).collect()
}

/// Calls `method` on `address` with grpcurl. Its exit code is 64 plus gRPC's on an error of the server.
pub fn grpcurl(address: &str, args: &[&str]) -> Outcome {
    let (options, rest): (Vec<&str>, Vec<&str>) = match args.iter().position(|arg| *arg == "--") {
        Some(at) => (args[..at].to_vec(), args[at + 1..].to_vec()),
        None => (Vec::new(), args.to_vec()),
    };
    let program = grpcurl_path().unwrap();
    Outcome::of(Command::new(program).arg("-plaintext").args(options).arg(address).args(rest))
}

/// Python, which the project needs anyway.
pub fn python() -> &'static str {
    "python3"
}

/// A Python with torch, if there is one here: `cargo xtask bench` brings one.
pub fn torch_python() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/python/bin/python3");
    path.is_file().then_some(path)
}

/// The same with the plug-in of deploy/torchrun. None, and said so, if there is none here.
pub fn torchrun_python(what: &str) -> Option<PathBuf> {
    let has_plug_in = |python: &PathBuf| {
        let loads =
            Command::new(python).args(["-c", "import muster_torchrun"]).stderr(Stdio::null()).status();
        loads.unwrap().success()
    };
    let found = torch_python().filter(has_plug_in);
    if found.is_none() {
        skip(
            what,
            "there is no Python with torch and deploy/torchrun; `cargo xtask test --python` brings them",
        );
    }
    found
}

/// Returns what the user who runs the tests is called where jobs have owners.
pub fn user() -> String {
    let uid = nix::unistd::geteuid();
    let user = nix::unistd::User::from_uid(uid).ok().flatten();
    user.map_or_else(|| format!("uid:{uid}"), |user| user.name)
}

/// Says visibly that something is not tested here, and why.
pub fn skip(what: &str, why: &str) {
    // Written to the stream itself, past the test runner's capture, so that it is seen.
    writeln!(std::io::stderr(), "SKIPPED: {what}: {why}").ok();
}
