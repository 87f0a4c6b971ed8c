//! `cargo xtask bench observers`: what observes a job, all of it at once or one by one, beside the job that must not
//! notice. Each scenario is one function in [`SCENARIOS`]; it gets a running job and prints one JSON line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use muster_tests::{Cluster, Daemon, Settings, eventually, http_address, http_get};
use serde_json::{Value, json};

use crate::load1;

/// Points that a coordinator has received.
const RECEIVED: &str = "muster_points_received_total";
/// Time between looks at the daemons.
const SAMPLE: Duration = Duration::from_millis(100);
/// Time in which the points that wait may still arrive, once the ranks report no more.
const CATCH_UP_MAX: Duration = Duration::from_mins(5);
/// Time without a point after which none is on its way.
const QUIET: Duration = Duration::from_secs(5);
/// Time after which memory that was in use for observers is to be given back.
const GIVEN_BACK: Duration = Duration::from_mins(1);
/// Jobs that wait beside the one that runs, to be listed.
const WAITING: usize = 1500;
/// Time between two writes of a rank that floods.
const SLICE: Duration = Duration::from_millis(10);

/// What is done to the job while it is watched; gives what was seen.
type Scenario = fn(&Options) -> Value;

/// The scenarios by name.
const SCENARIOS: [(&str, Scenario); 3] = [("flood", flood), ("outage", outage), ("all", all_at_once)];

/// What the command line says.
#[derive(Clone, Debug)]
struct Options {
    scenario: Option<String>,
    ranks: usize,
    points_per_second: u64,
    seconds: u64,
    outage: u64,
}

impl Options {
    fn parse(args: &[String]) -> Self {
        let mut options =
            Self { scenario: None, ranks: 64, points_per_second: 5000, seconds: 30, outage: 45 };
        for pair in args.chunks(2) {
            let [flag, value] = pair else { panic!("{} wants a value", pair[0]) };
            match flag.as_str() {
                "--scenario" => options.scenario = Some(value.clone()),
                "--ranks" => options.ranks = value.parse().unwrap(),
                "--points-per-second" => options.points_per_second = value.parse().unwrap(),
                "--seconds" => options.seconds = value.parse().unwrap(),
                "--outage" => options.outage = value.parse().unwrap(),
                other => panic!("{other} is no flag of this bench"),
            }
        }
        options
    }
}

/// Runs the scenario that is asked for, or all of them, each with a cluster of its own.
pub(crate) fn run(args: &[String]) {
    let options = Options::parse(args);
    let chosen = |name: &str| options.scenario.as_deref().is_none_or(|wanted| wanted == name);
    let names = SCENARIOS.map(|(name, _)| name);
    assert!(names.into_iter().any(chosen), "there is no such scenario; there are {names:?}");
    for (name, scenario) in SCENARIOS.iter().filter(|(name, _)| chosen(name)) {
        let mut figures = scenario(&options);
        figures["bench"] = "observers".into();
        figures["scenario"] = (*name).into();
        figures["load1"] = load1().into();
        println!("{figures}");
    }
}

/// Runs a rank of this bench: it reports so many points each second until there is a file `done`.
pub(crate) fn rank(points_per_second: u64, dir: &Path) {
    let mut socket = UnixStream::connect(std::env::var_os("MUSTER_TELEMETRY").unwrap()).unwrap();
    let (began, mut step) = (Instant::now(), 0);
    while !dir.join("done").exists() {
        let due = began.elapsed().as_millis() as u64 * points_per_second / 1000;
        // Nobody makes up for the time in which the socket was full.
        let first = step.max(due.saturating_sub(points_per_second));
        let mut lines = Vec::new();
        for step in first..due {
            writeln!(lines, "{{\"step\":{step},\"values\":{{\"loss\":0.5}}}}").unwrap();
        }
        socket.write_all(&lines).unwrap();
        // For those who follow its log.
        println!("step {step}: loss 0.5, as a program prints it that is watched by somebody");
        step = step.max(due);
        std::thread::sleep(SLICE);
    }
}

/// Ranks that report thousands of points each second.
fn flood(options: &Options) -> Value {
    let mut bench = Bench::start(options, options.points_per_second);
    bench.watch_for(Duration::from_secs(options.seconds));
    bench.end(options)
}

/// Ranks that report meanwhile what the coordinator, which is away, hears of afterwards.
fn outage(options: &Options) -> Value {
    let mut bench = Bench::start(options, options.points_per_second.min(200));
    bench.watch_for(Duration::from_secs(5));
    bench.cluster.coordinator.kill();
    std::thread::sleep(Duration::from_secs(options.outage));
    bench.cluster.restart_coordinator();
    bench.coordinator = http_address(&bench.cluster.coordinator);
    (bench.renewed, bench.received_before) = (None, bench.received);
    // Ranks were lost more than a lease after it was back.
    bench.watch_for(Duration::from_secs(options.seconds.max(60)));
    bench.end(options)
}

/// The same, beside readers that do not read, stalled followers of logs, lists and idle connections.
fn all_at_once(options: &Options) -> Value {
    let mut bench = Bench::start(options, options.points_per_second);
    let load = std::env::current_exe().unwrap().with_file_name("reconnect");
    let url = bench.cluster.url();
    let readers = |more: &[&str]| {
        let mut command = Command::new(&load);
        command.args(["readers", "--coordinator", &url]).args(more).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    readers(&["--submit", &WAITING.to_string()]).wait().unwrap();
    let idle_mib = resident_mib(&bench.cluster.coordinator);
    let (id, seconds) = (bench.id.clone(), options.seconds.to_string());
    let mut reading = readers(&["--job", &id, "--seconds", &seconds]);
    while reading.try_wait().unwrap().is_none() {
        bench.look();
        std::thread::sleep(SAMPLE);
    }
    let said = reading.wait_with_output().unwrap().stdout;
    let read: Value = serde_json::from_slice(&said).expect("the readers say what they saw");
    let mut figures = bench.end(options);
    std::thread::sleep(GIVEN_BACK);
    let after_mib = resident_mib(&bench.cluster.coordinator);
    figures["coordinator_idle_mib"] = idle_mib.round().into();
    figures["coordinator_a_minute_later_mib"] = after_mib.round().into();
    figures["a_minute_later_over_idle"] = (after_mib / idle_mib).into();
    figures["readers"] = read;
    figures
}

/// A cluster with a job, and what was seen of it.
struct Bench {
    cluster: Cluster,
    /// Where they serve metrics.
    coordinator: String,
    worker: String,
    id: String,
    /// Lease renewals so far, and since when.
    renewed: Option<(u64, Instant)>,
    longest_gap: Duration,
    /// Points that coordinators have received, repetitions included, and those of earlier lives.
    received: f64,
    received_before: f64,
    coordinator_mib: f64,
}

impl Bench {
    fn start(options: &Options, points_per_second: u64) -> Self {
        let mut cluster = Cluster::start(Settings { workers: 0, lease: "", ..Settings::default() });
        let worker = cluster.spawn_worker_with("n1", "n1", &["--http-listen", "127.0.0.1:0"]);
        cluster.workers.push(worker);
        cluster.wait_for_nodes(1);
        let ranks = cluster.dir.path().join("ranks");
        std::fs::create_dir(&ranks).unwrap();
        let program = std::env::current_exe().unwrap();
        let (count, rate) = (options.ranks.to_string(), points_per_second.to_string());
        let args = ["submit", "--nproc-per-node", &count, "--stop-grace", "30s", "--"];
        let command = [program.to_str().unwrap(), "flood", &rate, ranks.to_str().unwrap()];
        let id = cluster.muster(&[&args[..], &command].concat()).ok().trim().to_owned();
        cluster.wait_for(&id, "RUNNING");
        let coordinator = http_address(&cluster.coordinator);
        let worker = http_address(&cluster.workers[0]);
        Self {
            cluster,
            coordinator,
            worker,
            id,
            renewed: None,
            longest_gap: Duration::ZERO,
            received: 0.0,
            received_before: 0.0,
            coordinator_mib: 0.0,
        }
    }

    /// Looks at the daemons for a while.
    fn watch_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.look();
            std::thread::sleep(SAMPLE);
        }
    }

    fn look(&mut self) {
        let renewals =
            scrape(&self.worker).get("muster_worker_lease_renewals_total").map(|count| *count as u64);
        let now = Instant::now();
        if let Some(renewals) = renewals {
            match &mut self.renewed {
                Some((before, since)) if *before == renewals => {
                    self.longest_gap = self.longest_gap.max(now - *since);
                }
                renewed => *renewed = Some((renewals, now)),
            }
        }
        let received = scrape(&self.coordinator).get(RECEIVED).copied().unwrap_or(0.0);
        self.received = self.received_before + received;
        self.coordinator_mib = self.coordinator_mib.max(peak_mib(&self.cluster.coordinator));
    }

    /// Cancels the job, waits for what is on its way, and says what was seen.
    fn end(&mut self, options: &Options) -> Value {
        let job = self.cluster.job(&self.id);
        let logged = self.cluster.coordinator.log();
        let began = Instant::now();
        self.cluster.muster(&["cancel", &self.id]).ok();
        let ended = eventually("the job's end", || {
            let job = self.cluster.job(&self.id);
            let state = job["state"].as_str().unwrap_or_default().to_owned();
            let is_over = ["CANCELLED", "FAILED", "SUCCEEDED"].iter().any(|end| state.ends_with(end));
            if is_over { Ok(state) } else { Err(state) }
        });
        let cancelled = began.elapsed();
        let caught_up = self.wait_for_points();
        let on_disk = self.cluster.dir.path().join(format!("coordinator/metrics/{}.jsonl", self.id));
        let metrics = scrape(&self.worker);
        json!({
            "ranks": options.ranks,
            "generation": job["generation"], "state": job["state"], "state_after_cancel": ended,
            "nodes_lost": logged.matches("node lost").count(),
            "ranks_stopped": exits(&metrics) - if ended.ends_with("CANCELLED") { options.ranks as f64 } else { 0.0 },
            "largest_ack_ms": largest_ack(&metrics), "longest_without_renewal_ms": self.longest_gap.as_millis(),
            "cancel_ms": cancelled.as_millis(), "points_written": self.written(),
            "points_in_file": lines(&on_disk), "points_received": self.received, "points_caught_up_ms": caught_up.as_millis(),
            "coordinator_peak_mib": self.coordinator_mib.round(),
        })
    }

    /// Points that the ranks' node has on its disk.
    fn written(&self) -> u64 {
        let logs = self.cluster.dir.path().join("n1/logs").join(&self.id);
        let mut all = 0;
        let mut open = vec![logs];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    open.push(entry.path());
                } else if entry.file_name() == "points.jsonl" {
                    all += lines(&entry.path());
                }
            }
        }
        all
    }

    /// Returns once no more points come: how long after the end the last of them came.
    fn wait_for_points(&mut self) -> Duration {
        let began = Instant::now();
        let mut last = began;
        while last.elapsed() < QUIET && began.elapsed() < CATCH_UP_MAX {
            let before = self.received;
            std::thread::sleep(SAMPLE);
            self.look();
            if self.received > before {
                last = Instant::now();
            }
        }
        last - began
    }
}

fn lines(path: &Path) -> u64 {
    File::open(path).map_or(0, |file| BufReader::new(file).split(b'\n').count() as u64)
}

/// The samples that a daemon shows, by name and labels as they are written.
fn scrape(address: &str) -> BTreeMap<String, f64> {
    let (_, text) = http_get(address, "/metrics");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let pair = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    samples.filter_map(pair).collect()
}

fn exits(metrics: &BTreeMap<String, f64>) -> f64 {
    let exits = metrics.iter().filter(|(name, _)| name.starts_with("muster_worker_rank_exits_total"));
    exits.map(|(_, count)| count).sum()
}

/// Gives the upper bound in milliseconds of the slowest renewal; none where the daemon does not say.
fn largest_ack(metrics: &BTreeMap<String, f64>) -> Option<f64> {
    let all = metrics.get("muster_worker_lease_renewal_seconds_count")?;
    let bucket = |(name, count): (&String, &f64)| {
        let bound = name.strip_prefix("muster_worker_lease_renewal_seconds_bucket{le=\"")?;
        let bound: f64 = bound.trim_end_matches("\"}").parse().ok()?;
        (count >= all).then_some(bound)
    };
    metrics.iter().filter_map(bucket).min_by(f64::total_cmp).map(|bound| bound * 1000.0)
}

/// Memory that a daemon has now.
fn resident_mib(daemon: &Daemon) -> f64 {
    crate::memory_mib(&PathBuf::from(format!("/proc/{}", daemon.pid())), "VmRSS:").unwrap_or(0.0)
}

/// Most memory that a daemon has had.
fn peak_mib(daemon: &Daemon) -> f64 {
    crate::peak_mib(&PathBuf::from(format!("/proc/{}", daemon.pid()))).unwrap_or(0.0)
}
