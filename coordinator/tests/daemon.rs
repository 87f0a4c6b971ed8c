//! The whole coordinator over real gRPC, with a scripted node on the other side. Real node daemons and
//! programs come in the end-to-end tests.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use muster_coordinator::{Config, Error};
use muster_proto::v1;
use muster_proto::v1::cluster_service_client::ClusterServiceClient;
use muster_proto::v1::job_service_client::JobServiceClient;
use muster_proto::v1::node_service_client::NodeServiceClient;
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use muster_proto::v1::worker_service_client::WorkerServiceClient;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

#[path = "daemon/points.rs"]
mod points_of_nodes;

/// Numbers the hellos of all scripted nodes.
static HELLOS: AtomicU64 = AtomicU64::new(1);

/// A coordinator in this process, on a port of its own.
struct Coordinator {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Coordinator {
    async fn start(data_dir: &Path) -> Self {
        let address = free_address();
        let stop = CancellationToken::new();
        // Scripted nodes send no heartbeats, and a busy machine takes its time.
        let lease = Duration::from_mins(5);
        let config = Config { listen: address, lease, ..Config::new(data_dir.to_owned()) };
        let task = tokio::spawn(muster_coordinator::run(config, stop.clone()));
        let coordinator = Self { address, stop, task };
        coordinator.channel().await;
        coordinator
    }

    async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        for _ in 0..500 {
            if let Ok(channel) = endpoint.connect().await {
                return channel;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the coordinator does not answer");
    }

    async fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel().await)
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

fn free_address() -> SocketAddr {
    format!("127.0.0.1:{}", muster_tests::free_port()).parse().unwrap()
}

/// The node's end of a session.
struct Session {
    up: mpsc::Sender<v1::SessionRequest>,
    down: Streaming<v1::SessionResponse>,
}

impl Session {
    async fn open(coordinator: &Coordinator, gangs: Vec<v1::GangReport>) -> Result<Self, tonic::Status> {
        Self::open_as("n1", coordinator, gangs).await
    }

    async fn open_as(
        node: &str,
        coordinator: &Coordinator,
        gangs: Vec<v1::GangReport>,
    ) -> Result<Self, tonic::Status> {
        let mut client = WorkerServiceClient::new(coordinator.channel().await);
        client
            .join(v1::JoinRequest {
                node_name: node.into(),
                address: "127.0.0.1".into(),
                incarnation: "i1".into(),
                ..Default::default()
            })
            .await?;
        let (up, requests) = mpsc::channel(16);
        let number = HELLOS.fetch_add(1, Ordering::Relaxed);
        let (node_name, incarnation) = (node.into(), "i1".into());
        let hello = v1::Hello { node_name, incarnation, gangs, leaving: None, number, resends_points: true };
        up.send(v1::SessionRequest { message: Some(Up::Hello(hello)) }).await.unwrap();
        let down = client.session(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Self { up, down })
    }

    async fn say(&self, message: Up) {
        self.up.send(v1::SessionRequest { message: Some(message) }).await.unwrap();
    }

    async fn hear(&mut self) -> Down {
        let next = tokio::time::timeout(Duration::from_secs(10), self.down.next()).await.unwrap();
        next.unwrap().unwrap().message.unwrap()
    }

    async fn assignment(&mut self) -> v1::Assignment {
        match self.hear().await {
            Down::Assignment(assignment) => assignment,
            Down::Welcome(mut welcome) => welcome.assignments.pop().unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

fn report(job: &v1::Assignment, phase: v1::ObservedPhase, exits: Vec<v1::RankExit>) -> Up {
    Up::Gang(v1::GangReport {
        job_id: job.job_id.clone(),
        generation: job.generation,
        phase: phase.into(),
        master_port: 29500,
        exits,
        error: String::new(),
        ..Default::default()
    })
}

fn points(job: &v1::Assignment, seqs: std::ops::RangeInclusive<u64>) -> Up {
    let point = |seq| v1::Point {
        generation: job.generation,
        rank: Some(0),
        step: Some(seq),
        time: None,
        values: [("loss".to_owned(), 1.0 / seq as f64)].into(),
        seq,
    };
    Up::Points(v1::PointBatch {
        job_id: job.job_id.clone(),
        points: seqs.map(point).collect(),
        resumes: false,
    })
}

fn submission(request_id: &str) -> v1::SubmitJobRequest {
    let spec = v1::JobSpec { command: vec!["train".into()], ..Default::default() };
    v1::SubmitJobRequest { request_id: request_id.into(), spec: Some(spec) }
}

async fn metric_seqs(jobs: &mut JobServiceClient<Channel>, job_id: &str, follow: bool) -> Vec<u64> {
    let request = v1::StreamMetricsRequest { job_id: job_id.into(), follow, ..Default::default() };
    let stream = jobs.stream_metrics(request).await.unwrap().into_inner();
    let points: Vec<_> = stream.collect().await;
    points.into_iter().map(|response| response.unwrap().point.unwrap().seq).collect()
}

#[tokio::test]
async fn a_job_runs_over_a_restart_of_the_coordinator() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut session = Session::open(&coordinator, vec![]).await.unwrap();
    assert!(matches!(session.hear().await, Down::Welcome(_)));

    let mut jobs = coordinator.jobs().await;
    let job = jobs.submit_job(submission("r1")).await.unwrap().into_inner().job.unwrap();
    let prepare = session.assignment().await;
    assert_eq!((prepare.phase(), prepare.job_id.as_str()), (v1::DesiredPhase::Prepared, job.id.as_str()));
    session.say(report(&prepare, v1::ObservedPhase::Prepared, vec![])).await;
    let run = session.assignment().await;
    assert_eq!((run.phase(), run.master_port), (v1::DesiredPhase::Running, 29500));
    session.say(report(&run, v1::ObservedPhase::Running, vec![])).await;
    session.say(points(&run, 1..=3)).await;
    assert!(matches!(session.hear().await, Down::PointAck(ack) if ack.seq == 3));
    coordinator.stop().await;

    // A new coordinator on the same directory: the job runs on under the same generation, and what was
    // not acknowledged before is taken, once.
    let coordinator = Coordinator::start(dir.path()).await;
    let mut jobs = coordinator.jobs().await;
    let running = v1::GangReport {
        job_id: job.id.clone(),
        generation: 1,
        phase: v1::ObservedPhase::Running.into(),
        ..Default::default()
    };
    let mut session = Session::open(&coordinator, vec![running]).await.unwrap();
    let again = session.assignment().await;
    assert_eq!((again.generation, again.phase()), (1, v1::DesiredPhase::Running));
    session.say(points(&again, 2..=5)).await;
    assert!(matches!(session.hear().await, Down::PointAck(ack) if ack.seq == 5));

    let mut following = jobs.clone();
    let id = job.id.clone();
    let follower = tokio::spawn(async move { metric_seqs(&mut following, &id, true).await });
    let watch = jobs.watch_job(v1::WatchJobRequest { job_id: job.id.clone() }).await.unwrap().into_inner();
    session.say(points(&again, 6..=7)).await;
    let exit = v1::RankExit { rank: Some(0), code: Some(0), ..Default::default() };
    session.say(report(&again, v1::ObservedPhase::Stopped, vec![exit])).await;
    let states: Vec<_> = watch.map(|response| response.unwrap().job.unwrap().state()).collect().await;
    assert_eq!(states, [v1::JobState::Running, v1::JobState::Succeeded]);
    assert_eq!(follower.await.unwrap(), [1, 2, 3, 4, 5, 6, 7], "every point once, and the stream ends");
    assert_eq!(metric_seqs(&mut jobs, &job.id, false).await.len(), 7);
    let done =
        jobs.get_job(v1::GetJobRequest { job_id: job.id.clone() }).await.unwrap().into_inner().job.unwrap();
    assert_eq!((done.latest_step, done.latest_loss), (Some(7), Some(1.0 / 7.0)));
    coordinator.stop().await;
}

#[tokio::test]
async fn bad_input_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut jobs = coordinator.jobs().await;
    let spec = |spec| v1::SubmitJobRequest { request_id: String::new(), spec };
    let bad = |min_nodes, command: &[&str]| v1::JobSpec {
        min_nodes: Some(min_nodes),
        command: command.iter().map(|arg| (*arg).to_owned()).collect(),
        ..Default::default()
    };
    let table = [
        (spec(None), "spec: is missing"),
        (spec(Some(bad(1, &[]))), "spec.command: is empty"),
        (spec(Some(bad(0, &["x"]))), "spec.min_nodes: is 0; it must be between 1 and 16384"),
        (spec(Some(bad(u32::MAX, &["x"]))), "spec.min_nodes: is 4294967295"),
    ];
    for (request, expected) in table {
        let status = jobs.submit_job(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(expected), "{}", status.message());
        assert!(!status.details().is_empty(), "the violation is in the details too");
    }
    let status = jobs.get_job(v1::GetJobRequest { job_id: "../../etc".into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);

    jobs.submit_job(submission("r1")).await.unwrap();
    let mut other = submission("r1");
    other.spec.as_mut().unwrap().priority = 9;
    assert_eq!(jobs.submit_job(other).await.unwrap_err().code(), Code::AlreadyExists);

    let huge = v1::JobSpec { command: vec!["x".repeat(5 << 20)], ..Default::default() };
    assert_eq!(jobs.submit_job(spec(Some(huge))).await.unwrap_err().code(), Code::ResourceExhausted);
    coordinator.stop().await;
}

#[tokio::test]
async fn a_clone_of_a_live_node_is_refused_and_a_newer_session_wins() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut first = Session::open(&coordinator, vec![]).await.unwrap();
    assert!(matches!(first.hear().await, Down::Welcome(_)));
    let mut client = WorkerServiceClient::new(coordinator.channel().await);
    let clone = v1::JoinRequest {
        node_name: "n1".into(),
        address: "127.0.0.1".into(),
        incarnation: "another".into(),
        ..Default::default()
    };
    assert_eq!(client.join(clone).await.unwrap_err().code(), Code::AlreadyExists);
    let _second = Session::open(&coordinator, vec![]).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), first.down.next()).await.unwrap();
    assert_eq!(ended.unwrap().unwrap_err().code(), Code::Aborted);
    coordinator.stop().await;
}

#[tokio::test]
async fn concurrent_submissions_are_all_durable() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let jobs = coordinator.jobs().await;
    let submissions =
        (0..200).map(|i| {
            let mut jobs = jobs.clone();
            async move {
                jobs.submit_job(submission(&format!("r{i}"))).await.unwrap().into_inner().job.unwrap().id
            }
        });
    let tasks: tokio::task::JoinSet<_> = submissions.collect();
    let ids: BTreeSet<_> = tasks.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 200);
    coordinator.stop().await;
    let coordinator = Coordinator::start(dir.path()).await;
    let mut client = ClusterServiceClient::new(coordinator.channel().await);
    let cluster = client.get_cluster(v1::GetClusterRequest {}).await.unwrap().into_inner().cluster.unwrap();
    assert_eq!(cluster.jobs_queued, Some(200));
    coordinator.stop().await;
}

#[tokio::test]
async fn only_one_coordinator_on_a_directory_and_only_on_loopback() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let run = |config| muster_coordinator::run(config, CancellationToken::new());
    let config = Config::new(dir.path().to_owned());
    let error = run(Config { listen: free_address(), ..config.clone() }).await.unwrap_err();
    assert!(error.to_string().contains("in use by another coordinator"), "{error}");
    let elsewhere = tempfile::tempdir().unwrap();
    let config = Config { data_dir: elsewhere.path().to_owned(), ..config };
    let error = run(Config { listen: coordinator.address, ..config.clone() }).await.unwrap_err();
    assert!(error.to_string().contains("failed to listen"), "{error}");
    let error = run(Config { listen: "0.0.0.0:0".parse().unwrap(), ..config }).await.unwrap_err();
    assert!(error.to_string().contains("--insecure"), "{error}");
    coordinator.stop().await;
}

#[tokio::test]
async fn a_watcher_that_is_too_slow_is_told_and_others_miss_nothing() {
    // More than may wait for a watcher, and all that the connection holds.
    const CHANGES: usize = 9000;
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut session = Session::open(&coordinator, vec![]).await.unwrap();
    assert!(matches!(session.hear().await, Down::Welcome(_)));
    let watch = async || {
        let mut nodes = NodeServiceClient::new(coordinator.channel().await);
        nodes.watch_nodes(v1::WatchNodesRequest {}).await.unwrap().into_inner()
    };
    let (mut slow, fast) = (watch().await, watch().await);
    let reader = tokio::spawn(async move {
        let changes: Vec<_> = fast.skip(1).take(CHANGES).collect().await;
        let reasons = changes.into_iter().map(|change| change.unwrap().node.unwrap().cordon_reason);
        reasons.collect::<BTreeSet<_>>()
    });
    let nodes = NodeServiceClient::new(coordinator.channel().await);
    let reasons: BTreeSet<_> = (0..CHANGES).map(|i| format!("{i:0>1000}")).collect();
    let mut cordons = tokio::task::JoinSet::new();
    for reason in reasons.clone() {
        let mut nodes = nodes.clone();
        if cordons.len() == 64 {
            cordons.join_next().await.unwrap().unwrap();
        }
        cordons.spawn(async move {
            nodes.cordon_node(v1::CordonNodeRequest { node_name: "n1".into(), reason }).await.unwrap();
        });
    }
    cordons.join_all().await;
    assert_eq!(reader.await.unwrap(), reasons);
    let told = loop {
        let next = tokio::time::timeout(Duration::from_secs(10), slow.next()).await.unwrap();
        if let Err(status) = next.unwrap() {
            break status;
        }
    };
    assert_eq!(told.code(), Code::ResourceExhausted);
    assert!(told.message().contains("call again"), "{}", told.message());
    coordinator.stop().await;
}

#[tokio::test]
async fn a_reader_of_points_takes_its_time_and_goes_on_where_it_was() {
    const POINTS: u64 = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut session = Session::open(&coordinator, vec![]).await.unwrap();
    let mut jobs = coordinator.jobs().await;
    let job = jobs.submit_job(submission("r1")).await.unwrap().into_inner().job.unwrap();
    assert!(matches!(session.hear().await, Down::Welcome(_)));
    let prepare = session.assignment().await;
    session.say(report(&prepare, v1::ObservedPhase::Prepared, vec![])).await;
    let run = session.assignment().await;
    session.say(report(&run, v1::ObservedPhase::Running, vec![])).await;
    let follow = v1::StreamMetricsRequest { job_id: job.id.clone(), follow: true, ..Default::default() };
    let mut slow = jobs.stream_metrics(follow.clone()).await.unwrap().into_inner();
    for first in (1..POINTS).step_by(500) {
        session.say(points(&run, first..=first + 499)).await;
        assert!(matches!(session.hear().await, Down::PointAck(ack) if ack.seq == first + 499));
    }
    let seq = |response: Result<v1::StreamMetricsResponse, _>| {
        let response: v1::StreamMetricsResponse = response.unwrap();
        (response.point.unwrap().seq, response.index)
    };
    let mut half = vec![];
    while (half.len() as u64) < POINTS / 2 {
        half.push(seq(slow.next().await.unwrap()));
    }
    drop(slow);
    let after_index = half.last().unwrap().1;
    let rest =
        jobs.stream_metrics(v1::StreamMetricsRequest { after_index, ..follow }).await.unwrap().into_inner();
    let rest: Vec<_> = rest.take(POINTS as usize / 2).map(seq).collect().await;
    let seqs: Vec<u64> = half.into_iter().chain(rest).map(|(seq, _)| seq).collect();
    assert_eq!(seqs, (1..=POINTS).collect::<Vec<_>>());
    coordinator.stop().await;
}
