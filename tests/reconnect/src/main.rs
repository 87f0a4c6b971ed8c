//! `cargo xtask bench reconnect`: thousands of nodes, each with the real session and core of the node daemon, hold jobs
//! of a real coordinator, which is killed and started again. How soon they are all back, what is lost (nothing may
//! be), and what it costs. The last line is a JSON object. `cargo xtask bench agents` is in `agents.rs`, `bench durable` in
//! `durable.rs`, and the readers of `bench observers` in `readers.rs`.

mod agents;
mod coordinator;
mod durable;
mod node;
mod readers;
mod stats;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{Args, Parser};
use muster_core::types::Millis;
use muster_proto::v1;
use muster_worker::load::boot_now;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use coordinator::{Coordinator, cost};
use stats::{Endings, Stats};

/// Nodes of one job.
const GANG: usize = 8;
/// Nodes without a job, one in so many: a queue waits although there is room.
const FREE: usize = 10;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_mins(8);
/// A lease that was not renewed has ended by then.
const AFTERWARDS: Duration = Duration::from_secs(12);
/// Open files besides those of the nodes' connections. Each node may hold a second connection, to ask for signs of life.
const FILES_SPARE: usize = 200;

#[derive(Clone, Debug, Parser)]
enum Bench {
    /// Thousands of nodes whose coordinator is killed and comes back
    Reconnect(Options),
    /// Agents that Muster did not start enter one round
    Agents(agents::Options),
    /// Durable submissions, failover, and a restart with a large store
    Durable(durable::Options),
    /// Readers that do not read, beside one that does; a part of `bench observers`
    Readers(readers::Options),
}

#[derive(Clone, Debug, Args)]
struct Options {
    /// Nodes; nine in ten hold a job of eight nodes each
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Jobs that wait, half of them all alike and half each for a node that there is not
    #[arg(long, default_value_t = 1000)]
    waiting: usize,
    /// Seconds over which the nodes are started
    #[arg(long, default_value_t = 0)]
    ramp: u64,
    /// Seconds measured before the coordinator is killed
    #[arg(long, default_value_t = 10)]
    steady: u64,
    /// Seconds between its end and its next start
    #[arg(long, default_value_t = 0)]
    down: u64,
    /// Encrypted connections, and a certificate for each node
    #[arg(long)]
    tls: bool,
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let (result, is_well) = match Bench::parse() {
        Bench::Reconnect(options) => {
            let files = raise_files(options.nodes);
            let result = runtime.block_on(bench(&options, files));
            let is_well = result["false_losses"] == 0;
            (result, is_well)
        }
        Bench::Agents(options) => {
            raise_files(agents::most(&options));
            (runtime.block_on(agents::bench(&options)), true)
        }
        Bench::Durable(options) => (runtime.block_on(durable::bench(&options)), true),
        Bench::Readers(options) => {
            raise_files(options.connections());
            (runtime.block_on(readers::bench(&options)), true)
        }
    };
    println!("{result}");
    // Ten thousand sessions need not be closed one by one.
    std::process::exit(i32::from(!is_well));
}

/// Raises the limit of open files as far as needed, for this process and for the coordinator that it starts.
fn raise_files(nodes: usize) -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits can be read");
    let wanted = (2 * nodes + FILES_SPARE) as u64;
    // Only the superuser may raise the hard limit.
    if setrlimit(Resource::RLIMIT_NOFILE, wanted.max(hard), wanted.max(hard)).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("a limit can be raised to the hard one");
    }
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits can be read");
    assert!(soft > (nodes + FILES_SPARE) as u64, "{soft} open files are too few for {nodes} nodes");
    soft
}

async fn bench(options: &Options, files: u64) -> Value {
    let of_sessions = Targets::new().with_target("muster_worker::session", LevelFilter::DEBUG);
    tracing_subscriber::registry().with(Endings.with_filter(of_sessions)).init();
    let dir = tempfile::tempdir().expect("a directory can be made");
    let mut coordinator = Coordinator::start(dir.path().to_owned(), options.tls).await;
    // Nodes have a disk each; on one they would wait for each other, and for the coordinator's writes.
    let notes = tempfile::tempdir_in("/dev/shm").expect("a directory in memory can be made");
    let url = coordinator.url();
    let join = options.tls.then(|| coordinator.join_token(options.nodes));
    let stats = Arc::new(Stats::default());

    stats.begin(boot_now());
    for index in 0..options.nodes {
        let (identity, stats) = (node::identity(index, &url, notes.path(), join.as_deref()), stats.clone());
        let after = Duration::from_secs(options.ramp) * index as u32 / options.nodes as u32;
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            node::run(index, identity, stats).await;
        });
    }
    let joined = until("the nodes join", || stats.welcomes() == options.nodes).await;
    say("joined", joined, &stats.summary());

    let gangs = options.nodes * (FREE - 1) / FREE / GANG;
    let began = boot_now();
    coordinator.submit(vec![spec(GANG, None); gangs]).await;
    until("the gangs run", || stats.running.load(Ordering::Relaxed) == gangs * GANG).await;
    let placed = boot_now().since(began);
    say("gangs run", placed, &json!({"gangs": gangs}));
    let began = boot_now();
    coordinator.submit(waiting(options, options.nodes - gangs * GANG)).await;
    let queued = boot_now().since(began);
    say("others wait", queued, &json!({"jobs": options.waiting}));

    stats.begin(boot_now());
    let before = (coordinator.cost(), cost("self"));
    tokio::time::sleep(Duration::from_secs(options.steady)).await;
    let steady = phase(&stats, before, (coordinator.cost(), cost("self")));
    say("steady", Millis::from_secs(options.steady), &steady);
    let states_before = states(&coordinator).await;
    let lost_before = coordinator.losses().await;

    stats.begin(boot_now());
    let ours = cost("self");
    coordinator.kill();
    tokio::time::sleep(Duration::from_secs(options.down)).await;
    coordinator.restart().await;
    let back = boot_now();
    let reconnected = until("the nodes come back", || stats.welcomes() == options.nodes).await;
    let reconnect = phase(&stats, ((0.0, 0.0), ours), (coordinator.cost(), cost("self")));
    say("all are back", reconnected, &reconnect);
    tokio::time::sleep(AFTERWARDS).await;
    let afterwards = phase(&stats, ((0.0, 0.0), ours), (coordinator.cost(), cost("self")));
    say("a lease later", boot_now().since(back), &afterwards);

    let (ready, known) = coordinator.nodes().await;
    let states_after = states(&coordinator).await;
    let lost = coordinator.losses().await;
    let count = |losses: &Value, key: &str| losses[key].as_u64().unwrap_or(0) as usize;
    let (stopped, fenced) = (stats.stopped.load(Ordering::Relaxed), stats.fenced.load(Ordering::Relaxed));
    let false_losses = count(&lost_before, "nodes_lost")
        + count(&lost, "nodes_lost")
        + count(&lost, "jobs_restarted")
        + stopped
        + fenced
        + (options.nodes - ready)
        + gangs.abs_diff(states_after.get("Running").copied().unwrap_or(0));
    let load1 = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    json!({
        "bench": "reconnect", "tls": options.tls, "nodes": options.nodes, "connections": options.nodes, "gangs": gangs,
        "waiting": options.waiting, "files_max": files, "ramp_s": options.ramp, "down_s": options.down,
        "joined_ms": joined.0, "placed_ms": placed.0,
        "queued_ms": queued.0, "steady": steady, "reconnected_ms": reconnected.0, "reconnect": reconnect,
        "a_lease_later": afterwards, "false_losses": false_losses, "nodes_lost": lost["nodes_lost"],
        "jobs_restarted": lost["jobs_restarted"], "parts_stopped": stopped, "parts_fenced": fenced,
        "nodes_ready": ready, "nodes_known": known, "jobs_before": states_before, "jobs_after": states_after,
        "log_lines": coordinator.logged(""), "load1": load1.split(' ').next(),
    })
}

/// A job of so many nodes, which may want a label.
fn spec(nodes: usize, rack: Option<usize>) -> v1::JobSpec {
    v1::JobSpec {
        command: vec!["train".to_owned()],
        min_nodes: Some(u32::try_from(nodes).expect("few nodes")),
        procs_per_node: Some(8),
        node_selector: rack.map(|rack| ("rack".to_owned(), rack.to_string())).into_iter().collect(),
        ..v1::JobSpec::default()
    }
}

/// Jobs that do not fit: into the `free` nodes, or anywhere.
fn waiting(options: &Options, free: usize) -> Vec<v1::JobSpec> {
    let one =
        |index: usize| if index.is_multiple_of(2) { spec(free + 1, None) } else { spec(1, Some(index)) };
    (0..options.waiting).map(one).collect()
}

async fn states(coordinator: &Coordinator) -> HashMap<String, usize> {
    let mut all = HashMap::new();
    for job in coordinator.jobs().await {
        *all.entry(format!("{:?}", job.state())).or_default() += 1;
    }
    all
}

/// What a part of the run cost the coordinator and us, and what the nodes saw.
fn phase(stats: &Stats, before: ((f64, f64), (f64, f64)), after: ((f64, f64), (f64, f64))) -> Value {
    let mut summary = stats.summary();
    let round = |value: f64| (value * 100.0).round() / 100.0;
    summary["coordinator_cpu_s"] = round(after.0.0 - before.0.0).into();
    summary["coordinator_rss_mib"] = after.0.1.round().into();
    summary["generator_cpu_s"] = round(after.1.0 - before.1.0).into();
    summary["generator_rss_mib"] = after.1.1.round().into();
    summary
}

/// Waits until something holds; how long that took.
async fn until(what: &str, holds: impl Fn() -> bool) -> Millis {
    let began = boot_now();
    while !holds() {
        let waited = boot_now().since(began);
        assert!(u128::from(waited.0) < PATIENCE.as_millis(), "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    boot_now().since(began)
}

fn say(what: &str, took: Millis, more: &Value) {
    eprintln!("{what}: {:.2} s, {more}", took.0 as f64 / 1000.0);
}
