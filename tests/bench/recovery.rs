//! `cargo xtask bench recovery`: how long a job is without all its ranks after a fault, beside torchrun in the same run,
//! in turn. The ranks are shells that write down when they begin, so that launchers are measured and not imports.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use muster_tests::{Bed, Cluster, Settings, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::{load1, unix_now};

const ROUNDS: usize = 5;
/// Writes generation, rank, process and Unix time, and stays.
const STAMP: &str =
    "echo \"$((TORCHELASTIC_RESTART_COUNT+1)) $RANK $$ $(date +%s.%N)\" >> $STAMPS; exec sleep 600";

/// What a rank wrote.
#[derive(Clone, Copy, Debug)]
struct Stamp {
    start: u32,
    pid: i32,
    at: f64,
}

pub(crate) fn run(python: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let cluster = Cluster::start(Settings::default());
    for round in 0..=ROUNDS {
        let file = |side: &str| dir.path().join(format!("{side}{round}"));
        let pair = [
            ("muster", muster_rank_kill(&cluster, &file("m"))),
            ("torchrun", torchrun_rank_kill(python, &file("t"))),
        ];
        for (side, ms) in pair {
            println!(
                "{}",
                json!({ "bench": "rank killed, 2x2", "side": side, "round": round, "ms": ms, "load1": load1() })
            );
        }
        if round > 0 {
            ours.push(pair[0].1);
            theirs.push(pair[1].1);
        }
    }
    drop(cluster);
    let (a, b) = (median(&mut ours), median(&mut theirs));
    println!(
        "\n{:<58}{:>10}{:>10}{:>8}",
        "median of ms until every rank was spawned again", "muster", "torchrun", "ratio"
    );
    println!("{:<58}{a:>10.0}{b:>10.0}{:>7.3}x", "a rank killed, 2 nodes x 2", a / b);
    for (name, lease, measure) in [
        ("a node killed, elastic, lease of 1 s (lease included)", "1s", node_kill as fn(&'static str) -> f64),
        ("a node frozen, elastic, lease of 1 s (lease included)", "1s", node_freeze),
        ("a node killed and back under its name, lease of 10 s", "10s", node_replaced),
        ("a daemon killed: until its ranks are taken over", "10s", daemon_killed),
    ] {
        let mut all: Vec<f64> = (0..ROUNDS).map(|_| measure(lease)).collect();
        let ms = median(&mut all);
        println!("{name:<58}{ms:>10.0}{:>10}", "-");
        println!("{}", json!({ "bench": name, "side": "muster", "ms": ms, "all": all, "load1": load1() }));
    }
}

fn median(all: &mut [f64]) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn stamps(file: &Path) -> Vec<Stamp> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let parse = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        Some(Stamp {
            start: words.first()?.parse().ok()?,
            pid: words.get(2)?.parse().ok()?,
            at: words.get(3)?.parse().ok()?,
        })
    };
    text.lines().filter_map(parse).collect()
}

fn started(file: &Path, start: u32) -> Vec<Stamp> {
    eventually("every rank", || {
        let all: Vec<Stamp> = stamps(file).into_iter().filter(|stamp| stamp.start == start).collect();
        if all.len() == 4 { Ok(all) } else { Err(all) }
    })
}

/// Kills a rank, and waits until all are there again.
fn kill_one(file: &Path) -> f64 {
    let victim = started(file, 1)[3].pid;
    let killed = unix_now();
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    let last = started(file, 2).iter().map(|stamp| stamp.at).fold(0.0, f64::max);
    (last - killed) * 1000.0
}

fn muster_rank_kill(cluster: &Cluster, file: &Path) -> f64 {
    let stamps = format!("STAMPS={}", file.display());
    let flags = ["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "3", "--env", &stamps];
    let id = cluster.submit(&flags, STAMP);
    let ms = kill_one(file);
    cluster.muster(&["cancel", &id]).ok();
    cluster.wait_for(&id, "CANCELLED");
    ms
}

struct Agents(Vec<Child>);

impl Drop for Agents {
    fn drop(&mut self) {
        for agent in &mut self.0 {
            kill(Pid::from_raw(agent.id() as i32), Signal::SIGTERM).ok();
        }
        for agent in &mut self.0 {
            agent.wait().ok();
        }
    }
}

/// With the switch without which restarted workers of torchrun 2.11 meet the old store (pytorch issue 135712).
fn torchrun_rank_kill(python: &Path, file: &Path) -> f64 {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let agent = || {
        Command::new(python)
            .args([
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "2",
                "--max-restarts",
                "3",
            ])
            .args([
                "--rdzv-backend",
                "c10d",
                "--rdzv-id",
                "bench",
                "--rdzv-endpoint",
                &format!("127.0.0.1:{port}"),
            ])
            // It takes "$$" in arguments for "$".
            .args(["--no-python", "sh", "-c", &STAMP.replace("$$", "$$$$")])
            .env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            .env("STAMPS", file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let _agents = Agents(vec![agent(), agent()]);
    kill_one(file)
}

fn elastic(lease: &'static str) -> (Bed, PathBuf) {
    let bed = Bed::start(
        Settings { lease, ..Settings::default() },
        &["--nnodes", "1:2", "--max-restarts", "3"],
        "",
    );
    bed.wait_for_ranks(1, 2);
    let dir = bed.cluster.dir.path().to_owned();
    (bed, dir)
}

/// Seconds since the machine was started, as the ranks read them.
fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// From a fault to the first sign of the last rank of a generation.
fn until(bed: &Bed, generation: u32, ranks: usize, fault: f64) -> f64 {
    bed.wait_for_ranks(generation, ranks);
    let beats = bed.beats();
    let first = |rank: u32| {
        beats
            .iter()
            .find(|beat| (beat.generation, beat.rank) == (generation, rank))
            .map_or(0.0, |beat| beat.time)
    };
    ((0..ranks as u32).map(first).fold(0.0, f64::max) - fault) * 1000.0
}

fn node_kill(lease: &'static str) -> f64 {
    let (bed, _dir) = elastic(lease);
    let fault = uptime();
    bed.signal_node(1, Signal::SIGKILL);
    let ms = until(&bed, 2, 1, fault);
    bed.finish(2, 1);
    ms
}

fn node_freeze(lease: &'static str) -> f64 {
    let (bed, _dir) = elastic(lease);
    let fault = uptime();
    bed.signal_node(1, Signal::SIGSTOP);
    let ms = until(&bed, 2, 1, fault);
    bed.signal_node(1, Signal::SIGKILL);
    bed.finish(2, 1);
    ms
}

fn node_replaced(lease: &'static str) -> f64 {
    let settings = Settings { lease, ..Settings::default() };
    let mut bed = Bed::start(settings, &["--nnodes", "2", "--max-restarts", "3"], "");
    bed.wait_for_ranks(1, 2);
    let fault = uptime();
    bed.signal_node(1, Signal::SIGKILL);
    bed.restart_worker(1, Duration::ZERO);
    let ms = until(&bed, 2, 2, fault);
    bed.finish(2, 1);
    ms
}

/// The ranks must be the same processes before and after.
fn daemon_killed(lease: &'static str) -> f64 {
    let settings = Settings { lease, ..Settings::default() };
    let mut bed = Bed::start(settings, &["--nnodes", "2"], "");
    let before = bed.wait_for_ranks(1, 2);
    let fault = unix_now();
    bed.restart_worker(1, Duration::ZERO);
    eventually("its taking them over", || {
        let log = bed.cluster.workers[1].log();
        // One line of each life.
        if log.matches("joined").count() >= 2 { Ok(()) } else { Err(log) }
    });
    let ms = (unix_now() - fault) * 1000.0;
    assert_eq!(bed.wait_for_ranks(1, 2), before);
    bed.finish(1, 0);
    ms
}
