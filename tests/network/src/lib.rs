//! A cluster of the real coordinator and real node daemons, over their real gRPC stack, on a simulated network and a
//! simulated clock. Only the ranks are models. Faults come from a seed.
//!
//! Where the simulation of the cores (`muster-sim`) goes through many histories, this one shows that what stands around
//! the cores keeps their promises: streams, deadlines, probes, retries.

pub mod connection;
pub mod schedule;
pub mod user;

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use muster_proto::v1;
use muster_worker::simulation::{Life, set_cut, set_now, take_lives};
use tokio_util::sync::CancellationToken;
use turmoil::Sim;

use schedule::{Entry, Fault};

/// Nodes of a cluster.
pub const NODES: usize = 4;
/// Simulated time between two looks at the network. Ranks and leases count in hundreds of milliseconds.
const TICK: Duration = Duration::from_millis(10);
/// Longest history, in simulated time.
const ELAPSED_MAX: Duration = Duration::from_mins(30);
const PORT: u16 = 7070;
/// What the coordinator's host is called, and the user's.
const COORDINATOR: &str = "coordinator";
const USER: &str = "user";

/// What became of a cluster.
#[derive(Debug)]
pub struct Outcome {
    /// The jobs that were submitted, in their last states.
    pub jobs: Vec<v1::Job>,
    /// What ran, and when.
    pub lives: Vec<Life>,
    /// Simulated time.
    pub elapsed: Duration,
}

/// Name of a node's host.
fn node(index: usize) -> String {
    format!("n{index}")
}

/// Runs a cluster through these faults, until everything that was submitted has ended.
pub fn run(seed: u64, wanted: &[user::Wanted], faults: &[Entry]) -> Result<Outcome> {
    let dir = tempfile::tempdir()?;
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(40))
        .simulation_duration(ELAPSED_MAX)
        .tcp_capacity(1 << 16)
        .build();
    take_lives();
    let data_dir = dir.path().join(COORDINATOR);
    let is_dead = Rc::new(Cell::new(false));
    let dead = is_dead.clone();
    sim.host(COORDINATOR, move || coordinator(data_dir.clone(), dead.get()));
    for index in 0..NODES {
        let data_dir = dir.path().join(node(index));
        sim.host(node(index), move || worker(index, data_dir.clone()));
    }
    let (answer, jobs) = std::sync::mpsc::channel();
    let wanted = wanted.to_vec();
    sim.client(USER, async move {
        let jobs = user::submit_and_wait(&url(USER), &wanted).await?;
        answer.send(jobs)?;
        Ok(())
    });
    drive(&mut sim, faults, &is_dead).map_err(|error| anyhow!("the simulation broke: {error}"))?;
    let elapsed = sim.elapsed();
    // What still runs ends with the cluster.
    set_now(elapsed);
    drop(sim);
    Ok(Outcome {
        jobs: jobs.try_recv().context("the user has not heard of every job")?,
        lives: take_lives(),
        elapsed,
    })
}

/// Where this host reaches the coordinator.
fn url(caller: &str) -> String {
    format!("http://{caller}.{COORDINATOR}:{PORT}")
}

async fn coordinator(data_dir: PathBuf, is_dead: bool) -> turmoil::Result {
    if is_dead {
        return std::future::pending().await;
    }
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let listener = turmoil::net::TcpListener::bind(address).await?;
    let config = muster_coordinator::Config::new(data_dir);
    let shutdown = CancellationToken::new();
    muster_coordinator::run_on(config, connection::incoming(listener), || (), shutdown).await?;
    Ok(())
}

async fn worker(index: usize, data_dir: PathBuf) -> turmoil::Result {
    let name = muster_core::types::NodeName::new(node(index))?;
    std::fs::create_dir_all(&data_dir)?;
    let mut config = muster_worker::Config::new(vec![url(&node(index))], name, data_dir);
    config.address = Some(turmoil::lookup(node(index)));
    muster_worker::run(config, CancellationToken::new()).await?;
    Ok(())
}

/// Steps to the end, with a fault where one is due.
fn drive(sim: &mut Sim<'_>, faults: &[Entry], is_dead: &Cell<bool>) -> turmoil::Result {
    let mut ahead = faults.iter().peekable();
    loop {
        while let Some(entry) = ahead.next_if(|entry| entry.at <= sim.elapsed()) {
            set_now(sim.elapsed());
            is_dead.set(matches!(entry.fault, Fault::KillCoordinator));
            inject(sim, entry.fault);
        }
        if sim.step()? {
            return Ok(());
        }
    }
}

fn inject(sim: &mut Sim<'_>, fault: Fault) {
    match fault {
        Fault::Cut(index) | Fault::CutUp(index) | Fault::CutDown(index) => set_cut(&node(index), true),
        Fault::Repair(index) => set_cut(&node(index), false),
        Fault::CutUser => set_cut(USER, true),
        Fault::RepairUser => set_cut(USER, false),
        _ => {}
    }
    match fault {
        Fault::Cut(index) => sim.partition(node(index), COORDINATOR),
        Fault::CutUp(index) => sim.partition_oneway(node(index), COORDINATOR),
        Fault::CutDown(index) => sim.partition_oneway(COORDINATOR, node(index)),
        Fault::Hold(index) => sim.hold(node(index), COORDINATOR),
        Fault::Repair(index) => {
            sim.release(node(index), COORDINATOR);
            sim.repair(node(index), COORDINATOR);
        }
        Fault::CutUser => sim.partition(USER, COORDINATOR),
        Fault::RepairUser => sim.repair(USER, COORDINATOR),
        Fault::Slow(index, most) => sim.set_link_max_message_latency(node(index), COORDINATOR, most),
        Fault::Crash(index) => sim.crash(node(index)),
        Fault::Start(index) => sim.bounce(node(index)),
        Fault::CrashCoordinator => sim.crash(COORDINATOR),
        Fault::KillCoordinator | Fault::StartCoordinator => {
            sim.crash(COORDINATOR);
            sim.bounce(COORDINATOR);
        }
    }
}
