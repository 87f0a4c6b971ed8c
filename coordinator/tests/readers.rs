//! Readers that do not read: what they hold is bounded, each has a share, and others are answered meanwhile. Real coordinator,
//! real HTTP/2 with windows that are never opened.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use muster_coordinator::{Config, Error};
use muster_proto::v1;
use muster_proto::v1::job_service_client::JobServiceClient;
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use muster_proto::v1::worker_service_client::WorkerServiceClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// The smallest window that HTTP/2 begins with.
const WINDOW_BYTES: u32 = 65_535;

/// A coordinator in this process.
struct Coordinator {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Coordinator {
    async fn start(data_dir: &Path) -> Self {
        let address = format!("127.0.0.1:{}", muster_tests::free_port()).parse().unwrap();
        let stop = CancellationToken::new();
        // The node here sends no heartbeats.
        let lease = Duration::from_mins(5);
        let config = Config { listen: address, lease, ..Config::new(data_dir.to_owned()) };
        let task = tokio::spawn(muster_coordinator::run(config, stop.clone()));
        let coordinator = Self { address, stop, task };
        eventually("a connection", async || coordinator.try_channel().await.map_err(|e| e.to_string())).await;
        coordinator
    }

    async fn try_channel(&self) -> Result<Channel, tonic::transport::Error> {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await
    }

    async fn channel(&self) -> Channel {
        self.try_channel().await.unwrap()
    }

    /// A connection on which little fits that nobody reads.
    async fn narrow(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        let narrow =
            endpoint.initial_stream_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES);
        narrow.connect().await.unwrap()
    }

    async fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel().await)
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

async fn eventually<T>(what: &str, attempt: impl AsyncFn() -> Result<T, String>) -> T {
    let mut last = String::new();
    for _ in 0..3000 {
        match attempt().await {
            Ok(done) => return done,
            Err(seen) => last = seen,
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come: {last}");
}

async fn submit(jobs: &mut JobServiceClient<Channel>, env_bytes: usize) -> String {
    let env = [("FILLER".to_owned(), "x".repeat(env_bytes))].into();
    let spec = v1::JobSpec { command: vec!["train".into()], env, ..Default::default() };
    let request = v1::SubmitJobRequest { spec: Some(spec), ..Default::default() };
    jobs.submit_job(request).await.unwrap().into_inner().job.unwrap().id
}

/// Asks for all jobs, and takes nothing of the answer but that there is one.
async fn list_and_not_read(channel: Channel) -> Result<Streaming<v1::ListJobsResponse>, Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let codec = ProstCodec::<v1::ListJobsRequest, v1::ListJobsResponse>::default();
    let path = PathAndQuery::from_static("/muster.v1.JobService/ListJobs");
    let request = Request::new(v1::ListJobsRequest { page_size: 1000, ..Default::default() });
    client.server_streaming(request, path, codec).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_nobody_reads_are_bounded_and_a_job_is_shown_meanwhile() {
    const READERS: usize = 64;
    // Some twenty-five of these are the largest page, and five such pages a share.
    const ENV_BYTES: usize = 120 << 10;
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut jobs = coordinator.jobs().await;
    for _ in 0..30 {
        submit(&mut jobs, ENV_BYTES).await;
    }
    let small = submit(&mut jobs, 0).await;

    let (mut unread, mut refused) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let channel = coordinator.channel().await;
        for _ in 0..READERS / 4 {
            match list_and_not_read(channel.clone()).await {
                Ok(answer) => unread.push(answer),
                Err(status) => refused.push(status),
            }
        }
    }
    assert!((3..=6).contains(&unread.len()), "{} lists are unread", unread.len());
    assert_eq!(unread.len() + refused.len(), READERS);
    for status in &refused {
        assert_eq!(status.code(), Code::ResourceExhausted);
        let words = status.message();
        assert!(words.contains("not read") && words.contains(&(16 << 20).to_string()), "{words}");
    }
    // On a connection of theirs and on one of its own.
    let job = jobs.get_job(v1::GetJobRequest { job_id: small.clone() }).await.unwrap().into_inner();
    assert_eq!(job.job.unwrap().id, small);
    // They have the connection's window between them, so that nobody could read to the end while others do not.
    let mut read = unread.pop().unwrap();
    drop(unread);
    let page = read.message().await.unwrap().unwrap();
    assert!(page.jobs.len() > 10, "{} jobs are on the page", page.jobs.len());
    eventually("room", async || {
        list_and_not_read(coordinator.channel().await).await.map(drop).map_err(|status| status.to_string())
    })
    .await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_opens_streams_without_end_leaves_some_to_others() {
    const SHARE: usize = 1024;
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut jobs = coordinator.jobs().await;
    let watch = v1::WatchJobRequest { job_id: submit(&mut jobs, 0).await };
    let mut streams = Vec::new();
    let refused = 'refused: loop {
        let mut jobs = coordinator.jobs().await;
        // Fewer than a connection has.
        for _ in 0..256 {
            match jobs.watch_job(watch.clone()).await {
                Ok(stream) => streams.push(stream.into_inner()),
                Err(status) => break 'refused status,
            }
        }
    };
    assert_eq!((streams.len(), refused.code()), (SHARE, Code::ResourceExhausted));
    assert!(refused.message().contains("1024 streams of 127.0.0.1"), "{}", refused.message());
    jobs.get_job(v1::GetJobRequest { job_id: watch.job_id.clone() }).await.unwrap();
    // The socket's share is its own.
    let socket = format!("unix:{}", dir.path().join("muster.sock").display());
    let socket = Endpoint::from_shared(socket).unwrap().connect().await.unwrap();
    let mut local = JobServiceClient::new(socket).watch_job(watch.clone()).await.unwrap().into_inner();
    assert!(local.message().await.unwrap().is_some());
    // A stream that ends makes room.
    streams.pop();
    eventually("room", async || {
        let mut jobs = coordinator.jobs().await;
        jobs.watch_job(watch.clone()).await.map(drop).map_err(|status| status.to_string())
    })
    .await;
    coordinator.stop().await;
}

/// A node whose ranks write without end.
struct Node {
    up: mpsc::Sender<v1::SessionRequest>,
    down: Streaming<v1::SessionResponse>,
}

impl Node {
    async fn join(coordinator: &Coordinator) -> Self {
        let mut client = WorkerServiceClient::new(coordinator.channel().await);
        let (node_name, incarnation) = ("n1".to_owned(), "i1".to_owned());
        let join = v1::JoinRequest {
            node_name: node_name.clone(),
            address: "127.0.0.1".into(),
            incarnation: incarnation.clone(),
            ..Default::default()
        };
        client.join(join).await.unwrap();
        let (up, requests) = mpsc::channel(16);
        let hello = v1::Hello { node_name, incarnation, number: 1, ..Default::default() };
        up.send(v1::SessionRequest { message: Some(Up::Hello(hello)) }).await.unwrap();
        let down = client.session(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { up, down }
    }

    async fn say(&self, message: Up) {
        self.up.send(v1::SessionRequest { message: Some(message) }).await.unwrap();
    }

    /// Waits for what concerns it; none if nothing of it comes for long.
    async fn hear<T>(&mut self, wanted: impl Fn(Down) -> Option<T>) -> Option<T> {
        loop {
            let next = tokio::time::timeout(QUIET, self.down.message()).await.ok()?;
            if let Some(found) = next.unwrap().unwrap().message.and_then(&wanted) {
                return Some(found);
            }
        }
    }

    /// Does as it is told with a job's gang, until its ranks run.
    async fn run(&mut self) -> String {
        let assignment = |down| match down {
            Down::Assignment(assignment) => Some(assignment),
            _ => None,
        };
        let mut id = String::new();
        for phase in [v1::ObservedPhase::Prepared, v1::ObservedPhase::Running] {
            let v1::Assignment { job_id, generation, .. } = self.hear(assignment).await.unwrap();
            id.clone_from(&job_id);
            let (phase, master_port) = (phase.into(), 29500);
            self.say(Up::Gang(v1::GangReport {
                job_id,
                generation,
                phase,
                master_port,
                ..Default::default()
            }))
            .await;
        }
        id
    }

    async fn subscribed(&mut self) -> v1::LogSubscribe {
        let wanted = |down| match down {
            Down::LogSubscribe(wanted) => Some(wanted),
            _ => None,
        };
        self.hear(wanted).await.unwrap()
    }

    /// Sends a log for as long as it may, up to some bytes, and gives how many there were.
    async fn write(&mut self, log: &v1::LogSubscribe, bytes: u64) -> u64 {
        let (mut credit, mut offset) = (log.credit_bytes, log.offset);
        let allowed = |down| match down {
            Down::LogCredit(credit) => Some(credit.bytes),
            _ => None,
        };
        while offset < bytes {
            if credit == 0 {
                match self.hear(allowed).await {
                    Some(more) => credit += more,
                    None => break,
                }
            }
            let data = vec![b'x'; credit as usize].into();
            let (rank, stream) = (Some(log.rank), log.stream);
            let chunk = v1::LogChunk { generation: 1, rank, stream, offset, data, dropped_bytes: 0 };
            let subscription = log.subscription;
            self.say(Up::Log(v1::LogData { subscription, chunk: Some(chunk), ..Default::default() })).await;
            offset += std::mem::take(&mut credit);
        }
        offset
    }
}

/// Long enough that more would have come on any machine. What is checked then holds on a slower one, too.
const QUIET: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_of_logs_that_does_not_read_is_sent_no_more_than_its_share() {
    // What is sent ahead, waits, and is encoded, beside what the connection and its socket hold.
    const SHARE_BYTES: u64 = 128 << 10;
    const FLOOD_BYTES: u64 = 16 << 20;
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut node = Node::join(&coordinator).await;
    let mut jobs = coordinator.jobs().await;
    let spec = v1::JobSpec { command: vec!["train".into()], procs_per_node: Some(64), ..Default::default() };
    jobs.submit_job(v1::SubmitJobRequest { spec: Some(spec), ..Default::default() }).await.unwrap();
    let job_id = node.run().await;

    // All ranks together are allowed no more than one alone, but for the least that is worth a message.
    let everything = v1::StreamLogsRequest { job_id: job_id.clone(), follow: true, ..Default::default() };
    let all = jobs.stream_logs(everything.clone()).await.unwrap();
    let mut credit = 0;
    for _ in 0..64 * 2 {
        credit += node.subscribed().await.credit_bytes;
    }
    assert!(credit <= SHARE_BYTES, "{credit} bytes may be sent ahead");
    drop(all);

    let stdout = v1::LogStream::Stdout.into();
    let one = v1::StreamLogsRequest { rank: Some(0), stream: stdout, ..everything };
    let mut narrow = JobServiceClient::new(coordinator.narrow().await);
    let mut unread = narrow.stream_logs(one).await.unwrap().into_inner();
    let log = node.subscribed().await;
    let sent = node.write(&log, FLOOD_BYTES).await;
    assert!(sent <= SHARE_BYTES + u64::from(WINDOW_BYTES), "{sent} bytes were sent to nobody");
    // It goes on where it was for who reads at last.
    let mut read = 0;
    while read < sent {
        read += unread.message().await.unwrap().unwrap().chunk.unwrap().data.len() as u64;
    }
    coordinator.stop().await;
}
