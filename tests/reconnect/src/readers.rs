//! The readers of `cargo xtask bench observers`: lists that nobody reads, followers of logs that stall, idle connections,
//! and lists that are read at a pace; and how long one call takes beside them.

#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use muster_proto::v1;
use muster_proto::v1::job_service_client::JobServiceClient;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// Calls on one connection of those that do not read.
const CALLS_PER_CONNECTION: usize = 100;
/// Time between attempts of somebody who was refused.
const RETRY: Duration = Duration::from_millis(500);
/// Time between the calls that are measured.
const LOOK: Duration = Duration::from_millis(10);
/// Longest time of such a call.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// Jobs on a page that is read.
const READ_PAGE: u32 = 20;
/// Submissions at once.
const SUBMITS: usize = 64;

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// The coordinator
    #[arg(long)]
    coordinator: String,
    /// Job whose logs are followed, and that is asked for
    #[arg(long, default_value = "")]
    job: String,
    /// Jobs to submit that can never be placed; nothing else is done then
    #[arg(long, default_value_t = 0)]
    submit: usize,
    /// Lists of 1,000 jobs that nobody reads
    #[arg(long, default_value_t = 1000)]
    unread: usize,
    /// Followers of logs that do not read
    #[arg(long, default_value_t = 200)]
    followers: usize,
    /// Lists each second that are read
    #[arg(long, default_value_t = 500)]
    lists_per_second: u64,
    /// Connections on which nothing is said
    #[arg(long, default_value_t = 5000)]
    idle: usize,
    /// How long all of it lasts
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

impl Options {
    /// Connections that it needs.
    pub fn connections(&self) -> usize {
        self.idle + (self.unread + self.followers) / CALLS_PER_CONNECTION + 2
    }
}

/// What the readers came to.
#[derive(Debug, Default)]
struct Counts {
    unread: AtomicUsize,
    unread_refused: AtomicUsize,
    followers: AtomicUsize,
    followers_refused: AtomicUsize,
    idle: AtomicUsize,
    idle_ended: AtomicUsize,
    lists: AtomicUsize,
    lists_refused: AtomicUsize,
}

fn add(count: &AtomicUsize) {
    count.fetch_add(1, Ordering::Relaxed);
}

pub async fn bench(options: &Options) -> Value {
    if options.submit > 0 {
        return submit(options).await;
    }
    let counts = Arc::new(Counts::default());
    let pieces = |all: usize| {
        (0..all.div_ceil(CALLS_PER_CONNECTION))
            .map(move |n| CALLS_PER_CONNECTION.min(all - n * CALLS_PER_CONNECTION))
    };
    for calls in pieces(options.unread) {
        let channel = connect(options).await;
        for _ in 0..calls {
            tokio::spawn(hold_list(channel.clone(), counts.clone()));
        }
    }
    for calls in pieces(options.followers) {
        let channel = connect(options).await;
        for _ in 0..calls {
            tokio::spawn(hold_logs(channel.clone(), options.job.clone(), counts.clone()));
        }
    }
    for _ in 0..options.idle {
        tokio::spawn(hold_connection(options.coordinator.clone(), counts.clone()));
    }
    tokio::spawn(list(connect(options).await, options.lists_per_second, counts.clone()));
    let (mut took, failed) = look(options).await;
    took.sort_unstable();
    let at = |part: usize| took.get(took.len().saturating_sub(1) * part / 1000).map(Duration::as_micros);
    let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
    json!({
        "get_job": took.len(), "get_job_p50_us": at(500), "get_job_p99_us": at(990), "get_job_max_us": at(1000),
        "get_job_failed": failed,
        "unread_held": count(&counts.unread), "unread_refused": count(&counts.unread_refused),
        "followers_held": count(&counts.followers), "followers_refused": count(&counts.followers_refused),
        "idle_held": count(&counts.idle), "idle_ended": count(&counts.idle_ended),
        "lists_read": count(&counts.lists), "lists_refused": count(&counts.lists_refused),
    })
}

async fn connect(options: &Options) -> Channel {
    let endpoint = Endpoint::from_shared(options.coordinator.clone()).expect("a URL");
    endpoint.connect().await.expect("the coordinator is there")
}

async fn submit(options: &Options) -> Value {
    let channel = connect(options).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..SUBMITS {
        let (mut client, count) = (JobServiceClient::new(channel.clone()), options.submit);
        tasks.spawn(async move {
            for _ in (n..count).step_by(SUBMITS) {
                let spec = v1::JobSpec {
                    name: "waits".to_owned(),
                    command: vec!["true".to_owned()],
                    node_selector: [("there-is".to_owned(), "none".to_owned())].into(),
                    ..Default::default()
                };
                let request = v1::SubmitJobRequest { spec: Some(spec), ..Default::default() };
                client.submit_job(request).await.expect("the job is taken");
            }
        });
    }
    tasks.join_all().await;
    json!({ "submitted": options.submit })
}

/// Asks for a list, over and over until it is given, and does not read it.
async fn hold_list(channel: Channel, counts: Arc<Counts>) {
    let mut client = tonic::client::Grpc::new(channel);
    loop {
        let codec = ProstCodec::<v1::ListJobsRequest, v1::ListJobsResponse>::default();
        let path = PathAndQuery::from_static("/muster.v1.JobService/ListJobs");
        let request = Request::new(v1::ListJobsRequest { page_size: 1000, ..Default::default() });
        let ready = client.ready().await.is_ok();
        let answer: Result<Streaming<v1::ListJobsResponse>, Status> = if ready {
            client.server_streaming(request, path, codec).await.map(tonic::Response::into_inner)
        } else {
            Err(Status::unavailable("no connection"))
        };
        hold(answer.ok(), &counts.unread, &counts.unread_refused).await;
    }
}

/// Follows a job's logs, and does not read them.
async fn hold_logs(channel: Channel, job_id: String, counts: Arc<Counts>) {
    let mut client = JobServiceClient::new(channel);
    loop {
        let request = v1::StreamLogsRequest { job_id: job_id.clone(), follow: true, ..Default::default() };
        let answer = client.stream_logs(request).await.map(tonic::Response::into_inner);
        hold(answer.ok(), &counts.followers, &counts.followers_refused).await;
    }
}

/// Holds an answer for ever; waits a little if there is none.
async fn hold<A>(answer: Option<A>, held: &AtomicUsize, refused: &AtomicUsize) {
    if let Some(_held) = answer {
        add(held);
        std::future::pending::<()>().await;
    }
    add(refused);
    sleep(RETRY).await;
}

/// Holds a connection on which nothing is said; makes another one when it is ended.
async fn hold_connection(url: String, counts: Arc<Counts>) {
    let address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
    loop {
        if let Ok(mut connection) = TcpStream::connect(&address).await {
            add(&counts.idle);
            // What the other side says of itself first is read and thrown away.
            let mut bytes = [0; 64];
            while connection.read(&mut bytes).await.is_ok_and(|count| count > 0) {}
            add(&counts.idle_ended);
        }
        sleep(RETRY).await;
    }
}

/// Reads lists at a pace, whether or not those before have been answered.
async fn list(channel: Channel, per_second: u64, counts: Arc<Counts>) {
    if per_second == 0 {
        return;
    }
    let mut due = interval(Duration::from_nanos(1_000_000_000 / per_second));
    due.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        due.tick().await;
        let (mut client, counts) = (JobServiceClient::new(channel.clone()), counts.clone());
        tokio::spawn(async move {
            let request = v1::ListJobsRequest { page_size: READ_PAGE, ..Default::default() };
            match client.list_jobs(request).await {
                Ok(_) => add(&counts.lists),
                Err(_) => add(&counts.lists_refused),
            }
        });
    }
}

/// Asks for one job at a pace. Returns how long each answer took, and how many calls failed.
async fn look(options: &Options) -> (Vec<Duration>, usize) {
    let mut client = JobServiceClient::new(connect(options).await);
    let until = Instant::now() + Duration::from_secs(options.seconds);
    let (mut took, mut failed) = (Vec::new(), 0);
    while Instant::now() < until {
        let began = Instant::now();
        let request = v1::GetJobRequest { job_id: options.job.clone() };
        match timeout(LOOK_MAX, client.get_job(request)).await {
            Ok(Ok(_)) => took.push(began.elapsed()),
            Ok(Err(_)) | Err(_) => failed += 1,
        }
        sleep(LOOK.saturating_sub(began.elapsed())).await;
    }
    (took, failed)
}
