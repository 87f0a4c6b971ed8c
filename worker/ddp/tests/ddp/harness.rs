//! Starts ranks, waits for them with a deadline, and never leaves one behind.

use c10d_sys::Store;
use muster_ddp::{Error, ProcessGroup};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

const CASE: &str = "MUSTER_DDP_TEST_CASE";
const OUT: &str = "MUSTER_DDP_TEST_OUT";
/// Far beyond what any case takes; only a hang meets it.
const DEADLINE: Duration = Duration::from_mins(2);

/// The ranks of one case. Dropping it kills those that still run.
pub struct Ranks {
    children: BTreeMap<usize, Child>,
    dir: tempfile::TempDir,
    _store: Rc<Store>,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _already_gone = child.kill();
            let _status = child.wait();
        }
    }
}

/// The launcher's part: it hosts the store, so no port can be lost between choosing and binding it.
pub fn store(timeout: Duration) -> Rc<Store> {
    Rc::new(Store::tcp_server("127.0.0.1", 0, 0, timeout).unwrap())
}

/// Starts `world_size` ranks of a case, with a process group timeout.
pub fn start(case: &str, world_size: usize, timeout: Duration) -> Ranks {
    start_on(&store(timeout), 1, case, (0..world_size, world_size), timeout)
}

/// Starts some ranks of a generation of a case, out of a world of so many.
pub fn start_on(
    store: &Rc<Store>,
    generation: u32,
    case: &str,
    (ranks, world_size): (Range<usize>, usize),
    timeout: Duration,
) -> Ranks {
    let port = store.port().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let start = |rank| {
        let mut command = child_command(case, rank, world_size, port);
        command.env("TORCHELASTIC_USE_AGENT_STORE", "True");
        command.env("MUSTER_JOB_ID", "job").env("MUSTER_GENERATION", generation.to_string());
        command.env("MUSTER_TIMEOUT_SECONDS", timeout.as_secs_f64().to_string());
        command.env(OUT, dir.path().join(format!("rank-{rank}.json")));
        (rank, command.spawn().unwrap())
    };
    Ranks { children: ranks.map(start).collect(), dir, _store: store.clone() }
}

/// A command for one rank, with the torchrun environment.
pub fn child_command(case: &str, rank: usize, world_size: usize, port: u16) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", world_size.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .env("OMP_NUM_THREADS", "1")
        .env_remove("GLOO_SOCKET_IFNAME")
        .env_remove("MUSTER_TELEMETRY")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// Runs a case to its end and returns what each rank reported.
pub fn run(case: &str, world_size: usize) -> Vec<Value> {
    let mut ranks = start(case, world_size, Duration::from_mins(1));
    (0..world_size).map(|rank| ranks.finish(rank)).collect()
}

impl Ranks {
    /// Waits for a rank's end.
    pub fn end(&mut self, rank: usize) -> ExitStatus {
        let child = self.children.get_mut(&rank).unwrap();
        let mut status = None;
        eventually("the rank ends", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Waits for a rank's orderly end and returns its report.
    pub fn finish(&mut self, rank: usize) -> Value {
        let status = self.end(rank);
        assert!(status.success(), "rank {rank}: {status}");
        let report = std::fs::read(self.report_path(rank)).unwrap();
        serde_json::from_slice(&report).unwrap()
    }

    /// Waits until a rank has called [`ready`].
    pub fn wait_until_ready(&self, rank: usize) {
        let path = self.report_path(rank).with_extension("ready");
        eventually("the rank is ready", || path.exists());
    }

    /// SIGKILL.
    pub fn kill(&mut self, rank: usize) {
        self.children.get_mut(&rank).unwrap().kill().unwrap();
    }

    fn report_path(&self, rank: usize) -> PathBuf {
        self.dir.path().join(format!("rank-{rank}.json"))
    }
}

/// In a child: tells [`Ranks::wait_until_ready`].
pub fn ready() {
    let path = PathBuf::from(std::env::var_os(OUT).unwrap());
    std::fs::write(path.with_extension("ready"), b"").unwrap();
}

/// In a child: runs the case that the environment names, and reports.
pub fn child(case: fn(&str, &ProcessGroup) -> Result<Value, Error>) {
    let Ok(name) = std::env::var(CASE) else { return };
    let report = match name.as_str() {
        "minimal" => {
            crate::minimal::main().unwrap();
            json!(null)
        }
        name => {
            let group = ProcessGroup::from_env().unwrap();
            case(name, &group).unwrap_or_else(|error| report_of(&error))
        }
    };
    if let Some(path) = std::env::var_os(OUT) {
        std::fs::write(path, report.to_string()).unwrap();
    }
}

/// An error as a report.
pub fn report_of(error: &Error) -> Value {
    let source = std::error::Error::source(error).map(ToString::to_string);
    json!({
        "error": error.to_string(), "source": source,
        "peer_lost": error.is_peer_lost(), "timeout": error.is_timeout(),
    })
}

/// Waits for something that happens in another process.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = now() + DEADLINE;
    while !condition() {
        assert!(now() < deadline, "waited {DEADLINE:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[expect(clippy::disallowed_methods, reason = "the harness drives real processes in real time")]
pub fn now() -> Instant {
    Instant::now()
}
