//! `cargo xtask bench agents`: so many agents that Muster did not start enter one round at the same moment. How long
//! until the last of them holds its rank, beside torchft's Lighthouse and torch's c10d in turn.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use muster_proto::v1;
use muster_proto::v1::rendezvous_service_client::RendezvousServiceClient;
use muster_proto::v1::rendezvous_service_join_request::Message as Say;
use muster_proto::v1::rendezvous_service_join_response::Message as Heard;
use serde_json::{Value, json};
use tokio::sync::{Barrier, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::coordinator::Coordinator;

/// A coordinator that has just started waits for agents of an earlier one.
const SETTLED: Duration = Duration::from_secs(4);
/// Connections that are opened at once: more than the kernel queues for a listener would be refused.
const CONNECTS_MAX: usize = 64;
const PATIENCE: Duration = Duration::from_mins(2);

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Agents of a round, one size after the other
    #[arg(long, value_delimiter = ',', default_value = "2,32,128,512,2048,4096")]
    agents: Vec<usize>,
    /// Rounds of each size
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Largest size for the peers; c10d takes seconds for a hundred
    #[arg(long, default_value_t = 512)]
    peers_max: usize,
    /// A Python with torch and torchft; without it there are no peers
    #[arg(long)]
    python: Option<PathBuf>,
}

/// Largest round.
pub fn most(options: &Options) -> usize {
    options.agents.iter().copied().max().unwrap_or(0)
}

pub async fn bench(options: &Options) -> Value {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let coordinator = Coordinator::start(dir.path().to_owned(), false).await;
    tokio::time::sleep(SETTLED).await;
    let mut table = Vec::new();
    for &agents in &options.agents {
        let (mut ours, mut whole): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
        let mut peers = [("torchft", Vec::new()), ("torchft-threads", Vec::new()), ("c10d", Vec::new())];
        let before = coordinator.cost().0;
        for round in 0..options.rounds {
            let (entered, connected) = meet(&coordinator.address, agents, &format!("{agents}-{round}")).await;
            ours.push(entered);
            whole.push(connected + entered);
            let Some(python) = options.python.as_deref().filter(|_| agents <= options.peers_max) else {
                continue;
            };
            for (name, times) in &mut peers {
                // c10d's time is seconds and hardly varies.
                if (*name == "c10d" && (round > 2 || agents > 128)) || round > 4 {
                    continue;
                }
                times.extend(peer(python, name, agents));
            }
        }
        let cpu_ms = (coordinator.cost().0 - before) * 1000.0 / options.rounds as f64;
        let mut line = json!({"agents": agents, "muster_ms": median(&mut ours), "with_connecting_ms": median(&mut whole),
            "worst_ms": ours.last(), "coordinator_cpu_ms": cpu_ms});
        for (name, mut times) in peers {
            if !times.is_empty() {
                line[format!("{name}_ms")] = json!(median(&mut times));
            }
        }
        println!("{line}");
        table.push(line);
    }
    json!({"bench": "agents", "sizes": table, "coordinator_mib": coordinator.cost().1})
}

/// Of an even number the greater of the middle two; sorts.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One round: milliseconds from the first entry to the last rank, and what the connections took before.
async fn meet(address: &str, agents: usize, run: &str) -> (f64, f64) {
    let began = Instant::now();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a valid URL").tcp_nodelay(true);
    let turns = Arc::new(tokio::sync::Semaphore::new(CONNECTS_MAX));
    let start = Arc::new(Barrier::new(agents + 1));
    let mut all = JoinSet::new();
    for at in 0..agents {
        let (endpoint, turns, start, run) = (endpoint.clone(), turns.clone(), start.clone(), run.to_owned());
        all.spawn(async move {
            let turn = turns.acquire().await.expect("it is not closed");
            let channel = endpoint.connect().await.expect("the coordinator takes connections");
            drop(turn);
            start.wait().await;
            let (stream, place) = enter(channel, run, at, agents as u32).await;
            (Instant::now(), place, stream)
        });
    }
    start.wait().await;
    let entered = Instant::now();
    let ends = tokio::time::timeout(PATIENCE, all.join_all()).await.expect("every agent gets a rank");
    let last = ends.iter().map(|(end, ..)| *end).max().expect("there are agents");
    let mut ranks: Vec<u32> = ends.iter().map(|(_, place, _)| place.rank).collect();
    ranks.sort_unstable();
    assert!(ranks.into_iter().eq(0..agents as u32), "each rank once");
    (millis(last - entered), millis(entered - began))
}

fn millis(span: Duration) -> f64 {
    span.as_secs_f64() * 1000.0
}

type Stream = (mpsc::Sender<v1::RendezvousServiceJoinRequest>, Streaming<v1::RendezvousServiceJoinResponse>);

async fn enter(channel: Channel, run_id: String, at: usize, agents: u32) -> (Stream, v1::AgentPlace) {
    let (sender, receiver) = mpsc::channel(4);
    let hello = v1::AgentHello {
        agent_id: format!("{run_id}-{at}"),
        run_id,
        node_name: format!("n{at}"),
        min_agents: agents,
        max_agents: agents,
        last_call: None,
        held: None,
    };
    let enter = v1::AgentEnter { address: format!("10.0.{}.{}", at / 250, at % 250 + 1), port: 29_500 };
    for message in [Say::Hello(hello), Say::Enter(enter)] {
        let request = v1::RendezvousServiceJoinRequest { message: Some(message) };
        sender.try_send(request).expect("there is room");
    }
    let mut client = RendezvousServiceClient::new(channel);
    let mut stream = client.join(ReceiverStream::new(receiver)).await.expect("it is taken").into_inner();
    loop {
        let message = stream.message().await.expect("the stream holds").and_then(|response| response.message);
        match message {
            Some(Heard::Place(place)) => return ((sender, stream), place),
            Some(Heard::Waiting(_)) => {}
            other => panic!("an agent that waits was told {other:?}"),
        }
    }
}

fn peer(python: &Path, name: &str, agents: usize) -> Option<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers.py");
    let output =
        Command::new(python).arg(script).args([name, &agents.to_string()]).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let time = text.lines().last().and_then(|line| line.parse().ok());
    if time.is_none() {
        eprintln!("{name} with {agents} agents failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    time
}
