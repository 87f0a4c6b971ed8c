//! A coordinator that is stopped at each of its writes in turn, while jobs are submitted, start, fail, start again, end and
//! are cancelled: whatever it said is so afterwards, and the ranks have noticed nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use muster_tests::{BEATS, Daemon, Outcome, beats, binary, eventually, is_running, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// What the stopper says where it cannot trace.
const SKIPPED: i32 = 77;
/// Starting on a store that was not closed is some so many writes: repair, leadership, the first nodes.
const RECOVERY_WRITES: u64 = 23;
/// The histories below have some 180 writes; with far fewer, the stopper has not seen them.
const WRITES_MIN: u64 = 100;

/// A cluster whose coordinator runs behind the stopper, and what it has said so far.
struct Stage {
    dir: tempfile::TempDir,
    address: String,
    daemons: Vec<Daemon>,
    /// Each job as it was last seen.
    seen: BTreeMap<String, Value>,
    /// Each job's request.
    requests: BTreeMap<String, Vec<String>>,
}

/// An address of our own: the port is the same in every life, and one that was stopped may not even have bound it.
fn own_address() -> String {
    static PORT: AtomicU16 = AtomicU16::new(7100);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    format!("127.{}.{middle}.{low}:{}", 64 + (high & 63), PORT.fetch_add(1, Ordering::Relaxed))
}

impl Stage {
    fn start(how: &str, stops: &str) -> Self {
        let address = own_address();
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("coordinator");
        let [store, report] = [data.join("store.redb"), dir.path().join("stops")];
        let stopper = env!("CARGO_BIN_EXE_stopper");
        let [store, report] = [&store, &report].map(|path| path.to_str().unwrap());
        let prefix = [stopper, how, stops, store, report].map(str::to_owned);
        let args = ["coordinator", "--listen", &address, "--data-dir", data.to_str().unwrap()];
        let lease = ["--lease", "5s", "--heartbeat", "200ms"];
        let coordinator =
            Daemon::start_behind(&prefix, dir.path(), "coordinator", &[&args[..], &lease].concat());
        let mut stage = Self {
            dir,
            address,
            daemons: vec![coordinator],
            seen: BTreeMap::new(),
            requests: BTreeMap::new(),
        };
        for name in ["n1", "n2"] {
            let data = stage.dir.path().join(name);
            let args = ["worker", "--coordinator", &stage.url(), "--name", name, "--data-dir"];
            let args = [&args[..], &[data.to_str().unwrap()]].concat();
            stage.daemons.push(Daemon::start(stage.dir.path(), name, &args));
        }
        stage
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn bed(&self, job: &str) -> PathBuf {
        self.dir.path().join(job)
    }

    /// Repeats a command until a coordinator has answered it.
    fn muster(&self, args: &[&str]) -> Outcome {
        eventually("an answer", || {
            let outcome =
                Outcome::of(Command::new(binary("muster")).args(args).env("MUSTER_COORDINATOR", self.url()));
            if outcome.code == 0 { Ok(outcome) } else { Err((outcome, self.daemons[0].log())) }
        })
    }

    fn submit(&mut self, name: &str) -> String {
        std::fs::create_dir(self.bed(name)).unwrap();
        let bed = format!("BED={}", self.bed(name).display());
        let args = ["submit", "--request-id", name, "--name", name, "--nnodes", "2", "--max-restarts", "1"];
        let command = ["--stop-grace", "2s", "--env", &bed, "--", "sh", "-c", BEATS];
        let args = [&args[..], &command].concat();
        let id = self.muster(&args).stdout.trim().to_owned();
        self.requests.insert(id.clone(), args.into_iter().map(str::to_owned).collect());
        id
    }

    /// The job, once it has been seen to go nowhere but forward.
    fn job(&mut self, id: &str) -> Value {
        let job = self.muster(&["job", id, "--output", "json"]).json().remove(0);
        if let Some(before) = self.seen.insert(id.to_owned(), job.clone()) {
            let number = |job: &Value, name: &str| job[name].as_u64().unwrap_or(0);
            for count in ["generation", "restartsUsed"] {
                assert!(number(&job, count) >= number(&before, count), "{count}: {before} then {job}");
            }
            let is_over = ["SUCCEEDED", "FAILED", "CANCELLED"]
                .iter()
                .any(|s| before["state"] == format!("JOB_STATE_{s}"));
            assert!(!is_over || before == job, "a job that was over has changed: {before} then {job}");
        }
        job
    }

    fn wait_for(&mut self, id: &str, state: &str) -> Value {
        eventually(state, || {
            let job = self.job(id);
            if job["state"] == format!("JOB_STATE_{state}") { Ok(job) } else { Err(job) }
        })
    }

    /// The processes of a job's ranks that have lived, by generation and rank.
    fn pids(&self, job: &str) -> BTreeMap<(u32, u32), BTreeSet<i32>> {
        let mut pids: BTreeMap<_, BTreeSet<i32>> = BTreeMap::new();
        for beat in beats(&self.bed(job)) {
            pids.entry((beat.generation, beat.rank)).or_default().insert(beat.pid);
        }
        pids
    }

    fn wait_for_ranks(&self, job: &str, generation: u32) -> i32 {
        eventually("the ranks", || {
            let pids = self.pids(job);
            match (pids.get(&(generation, 0)), pids.get(&(generation, 1))) {
                (Some(_), Some(second)) => Ok(*second.first().unwrap()),
                _ => Err((pids, self.daemons[0].log())),
            }
        })
    }

    /// The calls at which the coordinator was stopped; fewer than asked for if there were not so many writes.
    fn stops(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("stops")).unwrap_or_default();
        let call = |line| serde_json::from_str::<Value>(line).unwrap()["call"].to_string();
        text.lines().map(call).collect()
    }
}

/// The whole life of some jobs, and what must hold of it wherever the coordinator is stopped.
fn history(how: &str, nth: u64, then: u64) -> Vec<String> {
    let mut stage = Stage::start(how, &format!("{nth},{then}"));
    let failing = stage.submit("failing");
    let queued = stage.submit("queued");
    let victim = stage.wait_for_ranks("failing", 1);
    stage.job(&failing);
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    stage.wait_for_ranks("failing", 2);
    stage.job(&failing);
    stage.muster(&["cancel", &queued]);
    stage.wait_for(&queued, "CANCELLED");
    std::fs::write(stage.bed("failing").join("done"), "").unwrap();
    stage.wait_for(&failing, "SUCCEEDED");
    let cancelled = stage.submit("cancelled");
    stage.wait_for_ranks("cancelled", 1);
    stage.muster(&["cancel", &cancelled]);
    stage.wait_for(&cancelled, "CANCELLED");

    // Name, generations, restarts: a coordinator that is stopped costs nobody anything.
    for (id, name, generation, restarts) in
        [(&failing, "failing", 2, 1), (&queued, "queued", 0, 0), (&cancelled, "cancelled", 1, 0)]
    {
        let job = stage.job(id);
        let seen = [&job["generation"], &job["restartsUsed"]].map(|count| count.as_u64().unwrap_or(0));
        assert_eq!(seen, [generation, restarts], "{job}");
        let again: Vec<&str> = stage.requests[id].iter().map(String::as_str).collect();
        assert_eq!(stage.muster(&again).stdout.trim(), id, "a repeated request is the same job");
        let pids = stage.pids(name);
        assert_eq!(pids.len() as u64, 2 * generation, "{name}: {pids:?}");
        assert!(pids.values().all(|pids| pids.len() == 1), "each rank is one process to its end: {pids:?}");
        let left: Vec<&i32> = pids.values().flatten().filter(|pid| is_running(**pid)).collect();
        assert!(left.is_empty(), "{name} has left {left:?}");
    }
    let jobs = stage.muster(&["jobs", "--all", "--output", "json"]).json();
    assert_eq!(jobs.len(), 3, "no request was taken twice: {jobs:?}");
    stage.stops()
}

/// Histories with stops at each `stride`-th write from `first` on, and soon after the start of the life that follows:
/// recovery writes, too. Ends with the first that has not so many writes.
fn check(how: &str, first: u64, stride: usize) {
    let probe = ["before", "1", "/nowhere/store.redb", "/dev/null", "true"];
    if Outcome::of(Command::new(env!("CARGO_BIN_EXE_stopper")).args(probe)).code == SKIPPED {
        return skip("a stop at every write", "nobody may trace here");
    }
    for nth in (first..).step_by(stride) {
        let stops = history(how, nth, 1 + nth % RECOVERY_WRITES);
        eprintln!("{how} at write {nth}: {stops:?}");
        if stops.is_empty() {
            assert!(nth > WRITES_MIN, "the store was hardly written: {nth} writes");
            return;
        }
    }
}

/// Every way at once: a history mostly waits.
fn check_ways(stride: usize) {
    std::thread::scope(|scope| {
        for (how, first) in [("before", 1), ("torn", 4), ("power", 7)] {
            let first = if stride == 1 { 1 } else { first };
            scope.spawn(move || check(how, first, stride));
        }
    });
}

#[test]
fn it_is_stopped_at_writes_of_every_kind() {
    // A commit is some eight writes: with this stride, each of them has its turn.
    check_ways(9);
}

#[test]
#[ignore = "takes minutes; `cargo xtask nightly` runs it"]
fn it_is_stopped_at_every_write() {
    check_ways(1);
}
