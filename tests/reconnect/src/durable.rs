//! `cargo xtask bench durable`: submissions per second, each stored before it is acknowledged, on redb and on etcd, beside
//! what etcd alone puts for as many clients; how long a cluster is without a leader; and how soon a coordinator with a
//! large store is back.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use muster_proto::v1::{
    self, cluster_service_client::ClusterServiceClient, job_service_client::JobServiceClient,
    worker_service_client::WorkerServiceClient,
};
use muster_tests::{Etcd, binary};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

/// Room for every round: etcd takes 2 GiB by default.
const QUOTA_BYTES: &str = "8589934592";
/// Bytes of a put: as much as the record of a small job has.
const VALUE_BYTES: usize = 600;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_mins(2);
/// Between attempts of a client that waits for a leader.
const ASK_INTERVAL: Duration = Duration::from_millis(5);

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Clients, each with a connection of its own and one request under way
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Seconds of each measurement; a coordinator lets 100,000 jobs wait
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Rounds of puts and submissions, in turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Failovers of each kind
    #[arg(long, default_value_t = 5)]
    failovers: usize,
    /// Nodes stored for the restart
    #[arg(long, default_value_t = 10_000)]
    nodes: usize,
    /// Jobs stored for the restart
    #[arg(long, default_value_t = 100_000)]
    jobs: usize,
}

/// A process that ends with the bench.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).ok();
    }

    fn kill(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    muster_tests::free_port().parse().expect("a port is a number")
}

/// A coordinator on a port of its own.
fn coordinator(dir: &Path, name: &str, port: u16, store: &str) -> Process {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join(format!("{name}.log")));
    let mut command = Command::new(binary("muster"));
    command.args(["coordinator", "--exit-with-stdin", "--listen", &format!("127.0.0.1:{port}")]);
    command.args(["--store", store, "--data-dir"]).arg(dir.join(name)).env_remove("RUST_LOG");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log.expect("a log can be made"));
    Process(command.spawn().expect("muster can be started"))
}

fn channel(port: u16) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("a valid URL");
    endpoint.connect_timeout(Duration::from_millis(200)).connect_lazy()
}

fn submission() -> v1::SubmitJobRequest {
    let command = vec!["true".to_owned()];
    let spec = v1::JobSpec { name: "bench".to_owned(), command, ..v1::JobSpec::default() };
    v1::SubmitJobRequest { request_id: String::new(), spec: Some(spec) }
}

/// Submits until somebody of these acknowledges it.
async fn until_taken(ports: &[u16]) -> Instant {
    let clients: Vec<_> = ports.iter().map(|port| JobServiceClient::new(channel(*port))).collect();
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        for client in &clients {
            if client.clone().submit_job(submission()).await.is_ok() {
                return Instant::now();
            }
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
    panic!("no coordinator takes a job");
}

/// How many requests all clients together got done in a second.
async fn rate<C, F>(options: &Options, clients: Vec<C>, ask: impl Fn(C) -> F + Clone + Send + 'static) -> f64
where
    C: Clone + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let began = Instant::now();
    let end = began + Duration::from_secs(options.seconds);
    let mut all = JoinSet::new();
    for client in clients {
        let ask = ask.clone();
        all.spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < end {
                ask(client.clone()).await;
                done += 1;
            }
            done
        });
    }
    let done: u64 = all.join_all().await.into_iter().sum();
    done as f64 / began.elapsed().as_secs_f64()
}

async fn submissions(options: &Options, port: u16) -> f64 {
    let clients = (0..options.clients).map(|_| JobServiceClient::new(channel(port))).collect();
    rate(options, clients, |mut client: JobServiceClient<Channel>| async move {
        client.submit_job(submission()).await.expect("it is taken");
    })
    .await
}

async fn puts(options: &Options, url: &str) -> f64 {
    let mut clients = Vec::new();
    for index in 0..options.clients {
        let client = etcd_client::Client::connect([url], None).await.expect("etcd is there");
        clients.push((index, client));
    }
    let number = Arc::new(std::sync::atomic::AtomicU64::new(0));
    rate(options, clients, move |(index, mut client)| {
        let number = number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        async move {
            client
                .put(format!("bench/{index}/{number}"), vec![b'x'; VALUE_BYTES], None)
                .await
                .expect("it is put");
        }
    })
    .await
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Milliseconds without a leader: from the fault to the first submission that the next one acknowledges.
async fn failovers(options: &Options, dir: &Path, store: &str, signal: Signal) -> Vec<f64> {
    let ports = [free_port(), free_port(), free_port()];
    let name = |index: usize| format!("f{index}-{}", ports[index]);
    let mut all: Vec<Process> =
        (0..3).map(|index| coordinator(dir, &name(index), ports[index], store)).collect();
    until_taken(&ports).await;
    let mut times = Vec::new();
    for _ in 0..options.failovers {
        // A whole lease, so that it is renewed as it is in general.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let mut leader = 0;
        for (index, port) in ports.iter().enumerate() {
            if JobServiceClient::new(channel(*port)).submit_job(submission()).await.is_ok() {
                leader = index;
            }
        }
        let others: Vec<u16> = ports.iter().copied().filter(|port| *port != ports[leader]).collect();
        let began = Instant::now();
        all[leader].signal(signal);
        let taken = until_taken(&others).await;
        times.push((taken - began).as_secs_f64() * 1000.0);
        all[leader].kill();
        all[leader] = coordinator(dir, &name(leader), ports[leader], store);
    }
    times
}

/// Milliseconds until a coordinator that holds much answers again after it was killed.
async fn restart(options: &Options, dir: &Path, store: &str) -> Value {
    let port = free_port();
    let name = format!("restart-{port}");
    let mut process = coordinator(dir, &name, port, store);
    until_taken(&[port]).await;
    let mut all = JoinSet::new();
    for client in 0..options.clients {
        let (jobs, nodes) = (options.jobs / options.clients, options.nodes / options.clients);
        all.spawn(async move {
            let (mut submit, mut join) =
                (JobServiceClient::new(channel(port)), WorkerServiceClient::new(channel(port)));
            for node in 0..nodes {
                let request = v1::JoinRequest {
                    node_name: format!("node-{client}-{node}"),
                    address: "10.0.0.1".to_owned(),
                    incarnation: format!("{client}-{node}"),
                    ..v1::JoinRequest::default()
                };
                join.join(request).await.expect("it joins");
            }
            // More than any of them has, so that all wait.
            for _ in 0..jobs {
                let mut request = submission();
                if let Some(spec) = &mut request.spec {
                    spec.per_proc = Some(v1::Resources { memory_bytes: 1 << 40, ..v1::Resources::default() });
                }
                submit.submit_job(request).await.expect("it is taken");
            }
        });
    }
    all.join_all().await;
    process.kill();
    let began = Instant::now();
    process = coordinator(dir, &name, port, store);
    let mut client = ClusterServiceClient::new(channel(port));
    let cluster = loop {
        assert!(began.elapsed() < PATIENCE, "it does not come back");
        match client.get_cluster(v1::GetClusterRequest {}).await {
            Ok(answer) => break answer.into_inner().cluster.unwrap_or_default(),
            Err(_) => tokio::time::sleep(ASK_INTERVAL).await,
        }
    };
    let ms = began.elapsed().as_secs_f64() * 1000.0;
    drop(process);
    json!({ "ms": ms, "nodes": cluster.nodes_total, "jobs_queued": cluster.jobs_queued })
}

pub async fn bench(options: &Options) -> Value {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let dir = dir.path();
    let etcd = Etcd::start_with(1, &["--quota-backend-bytes", QUOTA_BYTES]).expect("there is an etcd");
    let url = etcd.url();
    let store = |name: &str| format!("{url}/{name}");
    let (redb_port, etcd_port) = (free_port(), free_port());
    let on_redb = coordinator(dir, "redb", redb_port, "redb");
    let on_etcd = coordinator(dir, "etcd-coordinator", etcd_port, &store("rate"));
    until_taken(&[redb_port]).await;
    until_taken(&[etcd_port]).await;
    let (mut alone, mut redb, mut several) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..options.rounds {
        let line = (
            puts(options, &url.replace("etcd://", "http://")).await,
            submissions(options, redb_port).await,
            submissions(options, etcd_port).await,
        );
        println!(
            "round {round}: etcd alone {:.0} puts/s, submissions/s on redb {:.0}, on etcd {:.0}",
            line.0, line.1, line.2
        );
        alone.push(line.0);
        redb.push(line.1);
        several.push(line.2);
    }
    drop((on_redb, on_etcd));
    let killed = failovers(options, dir, &store("killed"), Signal::SIGKILL).await;
    println!("ms without a leader after a kill: {killed:.0?}");
    let stopped = failovers(options, dir, &store("stopped"), Signal::SIGTERM).await;
    println!("ms without a leader after a stop: {stopped:.0?}");
    let restarts = [restart(options, dir, "redb").await, restart(options, dir, &store("restart")).await];
    let (alone, redb, several) = (median(alone), median(redb), median(several));
    json!({
        "bench": "durable", "clients": options.clients,
        "etcd_puts_per_second": alone,
        "redb": { "submissions_per_second": redb, "ratio": redb / alone },
        "etcd": { "submissions_per_second": several, "ratio": several / alone },
        "killed_ms": { "median": median(killed.clone()), "most": killed.into_iter().fold(0.0, f64::max) },
        "stopped_ms": { "median": median(stopped.clone()), "most": stopped.into_iter().fold(0.0, f64::max) },
        "restart": { "redb": restarts[0], "etcd": restarts[1] },
    })
}
