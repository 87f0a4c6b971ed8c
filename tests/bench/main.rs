//! `cargo xtask bench`: the training program beside the same in Python under torchrun, on the same libtorch,
//! in one run, in turn. Prints JSON lines, then a table of ratios of medians. `cargo xtask bench recovery` measures
//! how long faults take to heal instead, `cargo xtask bench launch` how soon ranks run, `cargo xtask bench init` how soon they
//! have met, `cargo xtask bench store` the store at which they do, and `cargo xtask bench observers` what looking at a job
//! costs it.

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

mod init;
mod launch;
mod observers;
mod recovery;
mod store;
mod subject;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use muster_tests::{Cluster, Settings, binary};
use serde_json::{Value, json};

/// Rounds counted; one more before them warms the page cache up.
const ROUNDS: usize = 5;
/// Attempts at one run of the peer.
const TRIES_MAX: usize = 3;
const RANKS: &str = "2";
/// Images of a run: enough steps for a steady pace, few enough for a bench of minutes.
const IMAGES: &str = "30000";
const SAMPLE: Duration = Duration::from_millis(20);

/// One run of one side.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Optimiser steps per second between the first and the last.
    steps_per_second: f64,
    /// From the command to the end of the first step.
    first_step_ms: f64,
    /// Highest resident memory of a rank.
    rank_mib: f64,
}

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        None => vision(root),
        Some("recovery") => recovery::run(root, &args[1..]),
        Some("store") => store::run(root),
        Some("init") => init::run(root),
        Some("launch") => launch::run(root),
        Some("observers") => observers::run(&args[1..]),
        // A rank of that bench.
        Some("stamp") => launch::stamp(Path::new(&args[1])),
        // A rank of `observers`.
        Some("flood") => observers::rank(args[1].parse().unwrap(), Path::new(&args[2])),
        Some(other) => {
            panic!(
                "there is no bench {other}; there are `agents`, `durable`, `init`, `launch`, `observers`, `recovery`, \
                 `reconnect`, `store` and, without a name, training"
            )
        }
    }
}

fn vision(root: &Path) {
    let python = root.join(".deps/python/bin/python3");
    let data = root.join(".deps/data/fashion-mnist");
    assert!(python.is_file(), "Python's torch is not there; run this as `cargo xtask bench`");
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let ours_now = muster(&cluster, &data).unwrap();
        // Under torchrun a Gloo program sometimes aborts when the interpreter ends; such a run is made again.
        let theirs_now = (0..TRIES_MAX).find_map(|_| torchrun(&python, &data, root)).unwrap();
        for (name, measured) in [("muster", ours_now), ("torchrun", theirs_now)] {
            let line = json!({
                "bench": "vision", "side": name, "round": round, "ranks": RANKS, "images": IMAGES,
                "steps_per_second": measured.steps_per_second, "first_step_ms": measured.first_step_ms,
                "rank_mib": measured.rank_mib, "load1": load1(),
            });
            println!("{line}");
            if round > 0 {
                if name == "muster" { ours.push(measured) } else { theirs.push(measured) }
            }
        }
    }
    table(&ours, &theirs);
}

fn table(ours: &[Measured], theirs: &[Measured]) {
    println!("\n{:<22}{:>12}{:>12}{:>10}", "median", "muster", "torchrun", "ratio");
    let row = |name: &str, value: fn(&Measured) -> f64| {
        let (a, b) = (median(ours.iter().map(value)), median(theirs.iter().map(value)));
        println!("{name:<22}{a:>12.1}{b:>12.1}{:>9.2}x", a / b);
    };
    row("steps/s", |m| m.steps_per_second);
    row("first step, ms", |m| m.first_step_ms);
    row("memory per rank, MiB", |m| m.rank_mib);
}

/// Of an even number of values the greater of the middle two.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn muster(cluster: &Cluster, data: &Path) -> Option<Measured> {
    let mark = format!("bench-{}", unix_now());
    let trainer = binary("muster-trainer");
    let mut command = Command::new(binary("muster"));
    command
        .args(["submit", "--nproc-per-node", RANKS, "--follow", "--output", "json"])
        .args(["--env", &format!("BENCH_MARK={mark}"), "--"])
        .arg(trainer)
        .args(["vision", "--epochs", "1", "--limit", IMAGES, "--data"])
        .arg(data)
        .env("MUSTER_COORDINATOR", cluster.url());
    let (began, rank_mib, output) = watch(command, &mark)?;
    let job: Value = output.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap();
    let id = job["id"].as_str().unwrap();
    let points = cluster.muster(&["metrics", id, "--rank", "0", "--output", "json"]).json();
    let losses: Vec<(f64, f64)> = (points.iter().filter(|point| point["values"]["loss"].is_number()))
        .map(|point| {
            (point["step"].as_str().unwrap().parse().unwrap(), seconds(point["time"].as_str().unwrap()))
        })
        .collect();
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!((first.0 - 1.0).abs() < 0.5, "the first report is of step 1");
    Some(Measured {
        steps_per_second: (last.0 - first.0) / (last.1 - first.1),
        first_step_ms: (first.1 - began) * 1000.0,
        rank_mib,
    })
}

fn torchrun(python: &Path, data: &Path, root: &Path) -> Option<Measured> {
    let mark = format!("bench-{}", unix_now());
    let mut command = Command::new(python);
    command
        .args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS])
        .arg(root.join("tests/bench/vision.py"))
        .args(["--limit", IMAGES, "--data"])
        .arg(data)
        .env("BENCH_MARK", &mark)
        .env("OMP_NUM_THREADS", "1");
    let (began, rank_mib, output) = watch(command, &mark)?;
    let line: Value = output.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap();
    let number = |name: &str| line[name].as_f64().unwrap();
    Some(Measured {
        steps_per_second: (number("steps") - 1.0) / (number("last_step") - number("first_step")),
        first_step_ms: (number("first_step") - began) * 1000.0,
        rank_mib,
    })
}

/// Runs a command to its end and samples the high-water mark of its ranks' memory. Gives the Unix time of its
/// start, that mark in MiB, and what it printed; none if it failed.
fn watch(mut command: Command, mark: &str) -> Option<(f64, f64, String)> {
    let began = unix_now();
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let waiting = std::thread::spawn(move || child.wait_with_output().unwrap());
    let mut highest: f64 = 0.0;
    let mut ranks: Vec<PathBuf> = Vec::new();
    while !waiting.is_finished() {
        if ranks.len() < 2 {
            ranks = find_ranks(mark);
        }
        for rank in &ranks {
            highest = highest.max(peak_mib(rank).unwrap_or(0.0));
        }
        std::thread::sleep(SAMPLE);
    }
    let output = waiting.join().unwrap();
    if !output.status.success() {
        eprintln!("{} ended with {}", command.get_program().display(), output.status);
        return None;
    }
    Some((began, highest, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Processes that have this mark and a rank in their environment, and whose parent has no rank.
fn find_ranks(mark: &str) -> Vec<PathBuf> {
    let processes = muster_tests::processes_with(mark).into_iter();
    let paths = processes.map(|(pid, _)| PathBuf::from(format!("/proc/{pid}")));
    let has_rank = |path: &PathBuf| {
        let env = std::fs::read(path.join("environ")).unwrap_or_default();
        env.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"LOCAL_RANK="))
    };
    paths.filter(has_rank).collect()
}

fn peak_mib(process: &Path) -> Option<f64> {
    memory_mib(process, "VmHWM:")
}

/// A line of a process's status that is an amount of memory.
fn memory_mib(process: &Path, name: &str) -> Option<f64> {
    let status = std::fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<f64>().ok()? / 1024.0)
}

/// Unix seconds of an RFC 3339 time.
fn seconds(text: &str) -> f64 {
    let date = Command::new("date").args(["--date", text, "+%s.%N"]).output().unwrap();
    String::from_utf8_lossy(&date.stdout).trim().parse().unwrap()
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn load1() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}
