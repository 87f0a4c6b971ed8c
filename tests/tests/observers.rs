//! What observes a job does not harm it: points of ranks that flood, and a disk of the coordinator that hangs under them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use muster_tests::{Cluster, Settings, eventually, http_address, http_get};

const RANKS: usize = 8;
const RENEWALS: &str = "muster_worker_lease_renewals_total";

/// A job whose ranks report far more points than a program would, until there is a file `done`.
struct Flood {
    cluster: Cluster,
    worker: String,
    id: String,
}

impl Flood {
    fn start() -> Self {
        let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
        let worker = cluster.spawn_worker_with("n1", "n1", &["--http-listen", "127.0.0.1:0"]);
        cluster.workers.push(worker);
        cluster.wait_for_nodes(1);
        let (ranks, dir) = (RANKS.to_string(), cluster.dir.path().to_str().unwrap());
        let command = [env!("CARGO_BIN_EXE_bench"), "flood", "2000", dir];
        let submit = ["submit", "--nproc-per-node", &ranks, "--stop-grace", "30s", "--"];
        let id = cluster.muster(&[&submit[..], &command].concat()).ok().trim().to_owned();
        cluster.wait_for(&id, "RUNNING");
        let worker = http_address(&cluster.workers[0]);
        Self { cluster, worker, id }
    }

    fn samples(&self) -> BTreeMap<String, f64> {
        let (_, text) = http_get(&self.worker, "/metrics");
        let pair = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        text.lines().filter_map(pair).collect()
    }

    /// Waits for so many heartbeats that are acknowledged: those of two leases.
    fn wait_for_renewals(&self) {
        // A heartbeat is a fifth of a second, and the lease five.
        let wanted = self.samples()[RENEWALS] + 50.0;
        eventually("renewals of the lease", || {
            let samples = self.samples();
            if samples[RENEWALS] >= wanted { Ok(()) } else { Err(samples) }
        });
        let samples = self.samples();
        assert_eq!(samples["muster_worker_ranks_running"] as usize, RANKS);
        assert_eq!(samples["muster_worker_sessions_total"] as usize, 1, "no session was lost");
    }
}

#[test]
fn ranks_that_flood_keep_their_lease_and_are_cancelled_before_their_points_are_through() {
    let flood = Flood::start();
    flood.wait_for_renewals();
    flood.cluster.muster(&["cancel", &flood.id]).ok();
    flood.cluster.wait_for(&flood.id, "CANCELLED");
    // What was reported before the end comes after it.
    let dir = flood.cluster.dir.path();
    let lines = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    let of_rank = |rank| dir.join(format!("n1/logs/{}/attempt_1/{rank}/points.jsonl", flood.id));
    eventually("the last points", || {
        let kept = lines(dir.join(format!("coordinator/metrics/{}.jsonl", flood.id)));
        let written: usize = (0..RANKS).map(|rank| lines(of_rank(rank))).sum();
        if kept == written && kept > 0 { Ok(()) } else { Err(format!("{kept} of {written}")) }
    });
}

#[test]
fn a_disk_that_hangs_under_points_costs_no_lease() {
    let flood = Flood::start();
    let path = flood.cluster.dir.path().join(format!("coordinator/metrics/{}.jsonl", flood.id));
    eventually("the first points", || if path.exists() { Ok(()) } else { Err(()) });
    // Whoever opens a pipe to write waits until somebody reads.
    let pipe = path.with_extension("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::rename(pipe, path).unwrap();
    flood.wait_for_renewals();
    flood.cluster.muster(&["cancel", &flood.id]).ok();
    flood.cluster.wait_for(&flood.id, "CANCELLED");
}
