//! Readers that do not read: what they hold is bounded, each has a share, and others are answered meanwhile. Real coordinator,
//! real HTTP/2 with windows that are never opened.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use muster_coordinator::{Config, Error};
use muster_proto::v1;
use muster_proto::v1::job_service_client::JobServiceClient;
use tokio_util::sync::CancellationToken;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

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
        let config = Config { listen: address, ..Config::new(data_dir.to_owned()) };
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
