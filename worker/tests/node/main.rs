//! The node daemon over real gRPC, with real processes. The coordinator is a script; the two real daemons
//! together are tested end to end elsewhere.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "tests wait on the clock of the machine")]

mod adoption;
mod coordinator;
mod launching;
mod logs;
mod sessions;
mod stopping;
mod telemetry;

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coordinator::Coordinator;
use muster_core::types::NodeName;
use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;
use muster_proto::v1::session_response::Message as Down;
use muster_worker::{Config, Error};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use v1::{DesiredPhase, ObservedPhase};

/// Longest wait for anything: far above what a loaded two-core machine needs.
const PATIENCE: Duration = Duration::from_mins(1);
/// A lease that no test outlives.
const LEASE: Duration = Duration::from_mins(10);

/// Waits until `look` gives something, and fails with what it saw last.
async fn eventually<T, E: Debug>(what: &str, mut look: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => assert!(Instant::now() < deadline, "{what} did not happen; last seen: {seen:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `Ok` of what holds.
fn holds(condition: bool) -> Result<(), bool> {
    condition.then_some(()).ok_or(condition)
}

/// The whole text of a file, once its last line is complete.
async fn text_of(path: &Path) -> String {
    eventually(&format!("{}", path.display()), || match std::fs::read_to_string(path) {
        Ok(text) if text.ends_with('\n') => Ok(text),
        other => Err(other),
    })
    .await
}

async fn pid_in(path: &Path) -> i32 {
    text_of(path).await.trim().parse().unwrap()
}

/// Whether a process of this id is there (a zombie is not).
fn is_running(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

async fn gone(pid: i32) {
    eventually("the end of a process", || if is_running(pid) { Err(pid) } else { Ok(()) }).await;
}

/// Not a test: this program run as a shim.
#[test]
fn shim_entry() {
    if std::env::var_os("MUSTER_SHIM_DIR").is_some() {
        muster_worker::shim();
    }
}

/// The directory of a test. The shims in it end with it, and so do their ranks.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        for shim in shims(self.path()) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).ok();
        }
    }
}

/// The process ids of the shims of the daemons in a directory.
fn shims(dir: &Path) -> Vec<i32> {
    let entries = std::fs::read_dir(dir.join("data/run")).into_iter().flatten().flatten();
    let pid = |entry: std::fs::DirEntry| {
        let record: serde_json::Value =
            serde_json::from_slice(&std::fs::read(entry.path().join("shim.json")).ok()?).ok()?;
        i32::try_from(record["pid"].as_i64()?).ok().filter(|pid| is_running(*pid))
    };
    entries.filter_map(pid).collect()
}

/// One node daemon in this process, its coordinator, and a directory for both and for the ranks.
struct World {
    coordinator: Coordinator,
    dir: Dir,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl World {
    /// Starts both and waits until they have met.
    async fn start() -> Self {
        Self::with(Coordinator::start(LEASE).await, vec![]).await
    }

    /// Starts a node. `first` are URLs that are tried before the coordinator's.
    async fn with(coordinator: Coordinator, first: Vec<String>) -> Self {
        let dir = Dir::new();
        let stop = CancellationToken::new();
        let urls = first.into_iter().chain([coordinator.url()]).collect();
        let task = tokio::spawn(muster_worker::run(config(urls, dir.path()), stop.clone()));
        let world = Self { coordinator, dir, stop, task };
        world.session(1).await;
        world
    }

    /// Waits for the node's n-th session.
    async fn session(&self, number: usize) -> v1::Hello {
        eventually("a session", || self.coordinator.hellos().into_iter().nth(number - 1).ok_or(number)).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log_dir(&self, gang: &v1::Assignment, local_rank: u32) -> PathBuf {
        let (job, generation) = (&gang.job_id, gang.generation);
        self.path(&format!("data/logs/{job}/attempt_{generation}/{local_rank}"))
    }

    async fn want(&self, gang: &v1::Assignment, phase: DesiredPhase) {
        let assignment = v1::Assignment { phase: phase.into(), ..gang.clone() };
        self.coordinator.say(Down::Assignment(assignment)).await;
    }

    /// Waits until the node has reported a gang in this phase.
    async fn observe(&self, gang: &v1::Assignment, phase: ObservedPhase) -> Box<v1::GangReport> {
        eventually(phase.as_str_name(), || match self.coordinator.report(gang) {
            Some(report) if report.phase() == phase => Ok(report),
            other => Err(other),
        })
        .await
    }

    /// Launches a gang and waits for its end.
    async fn run(&self, gang: &v1::Assignment) -> Box<v1::GangReport> {
        self.want(gang, DesiredPhase::Running).await;
        self.observe(gang, ObservedPhase::Stopped).await
    }

    /// What is reported of a gang from now on is what the coordinator wants.
    fn desire(&self, gangs: &[&v1::Assignment]) {
        let running = |gang: &&v1::Assignment| v1::Assignment {
            phase: DesiredPhase::Running.into(),
            ..(*gang).clone()
        };
        self.coordinator.state().desired = gangs.iter().map(running).collect();
    }

    /// Ends the daemon as SIGKILL does: at whatever it is.
    async fn kill_daemon(&mut self) {
        self.task.abort();
        (&mut self.task).await.unwrap_err();
    }

    /// Starts another in its place, and waits until it has said what it found.
    async fn start_daemon(&mut self) -> v1::Hello {
        let sessions = self.coordinator.hellos().len();
        self.stop = CancellationToken::new();
        let config = config(vec![self.coordinator.url()], self.dir.path());
        self.task = tokio::spawn(muster_worker::run(config, self.stop.clone()));
        self.session(sessions + 1).await
    }

    /// Stops the daemon as SIGTERM does.
    async fn end(self) -> (Result<(), Error>, Coordinator) {
        self.stop.cancel();
        (tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap(), self.coordinator)
    }
}

fn config(urls: Vec<String>, dir: &Path) -> Config {
    let program = std::env::current_exe().unwrap();
    let shim = vec![program.into(), "--exact".into(), "shim_entry".into(), "--nocapture".into()];
    Config { shim, ..Config::new(urls, NodeName::new("n1").unwrap(), dir.join("data")) }
}

/// A gang of one rank that runs a shell script with the world's directory as $DIR.
fn gang(world: &World, job: &str, script: &str) -> v1::Assignment {
    let spec = v1::JobSpec {
        name: job.to_owned(),
        command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        env: [("DIR".to_owned(), world.dir.path().to_str().unwrap().to_owned())].into(),
        min_nodes: Some(1),
        procs_per_node: Some(1),
        stop_grace: Some(duration_to_wire_std(PATIENCE)),
        ..Default::default()
    };
    let placement = v1::NodePlacement {
        node_name: "n1".into(),
        address: "127.0.0.1".into(),
        group_rank: Some(0),
        first_rank: Some(0),
        procs: 1,
        gpus: vec![],
    };
    v1::Assignment {
        job_id: job.to_owned(),
        generation: 1,
        phase: DesiredPhase::Prepared.into(),
        spec: Some(spec),
        placement: Some(placement),
        world_size: 1,
        group_world_size: 1,
        master_addr: "127.0.0.1".into(),
        master_port: 0,
        stop_signal: String::new(),
        restart_count: 0,
        dump_stacks: false,
        stop_grace: None,
    }
}

/// The same with more ranks on the node.
fn with_ranks(mut gang: v1::Assignment, count: u32) -> v1::Assignment {
    gang.placement.as_mut().unwrap().procs = count;
    gang.spec.as_mut().unwrap().procs_per_node = Some(count);
    gang.world_size = count;
    gang
}

fn with_grace(mut gang: v1::Assignment, grace: Duration) -> v1::Assignment {
    gang.spec.as_mut().unwrap().stop_grace = Some(duration_to_wire_std(grace));
    gang
}
