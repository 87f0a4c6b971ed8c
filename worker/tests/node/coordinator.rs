//! The coordinator's side of WorkerService, as a script: it says what a test tells it to and keeps what it hears.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use muster_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

type Answers = mpsc::Sender<Result<v1::SessionResponse, Status>>;

/// What the script does, and what it has heard.
pub struct State {
    /// What the next Welcome lists.
    pub desired: Vec<v1::Assignment>,
    /// Answers to the next Joins, before they succeed.
    pub refusals: VecDeque<Status>,
    /// Whether heartbeats and points are acknowledged.
    pub acks_heartbeats: bool,
    pub acks_points: bool,
    pub joins: Vec<v1::JoinRequest>,
    /// Everything from all sessions, in order.
    pub heard: Vec<Up>,
    /// Points by job, generation and rank, without those that came again.
    pub kept: BTreeMap<(String, u32, u32), Vec<v1::Point>>,
    session: Option<Answers>,
}

#[derive(Clone)]
pub struct Coordinator {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    reads: Arc<watch::Sender<bool>>,
    lease: Duration,
    stop: CancellationToken,
}

impl Coordinator {
    pub async fn start(lease: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = State {
            desired: vec![],
            refusals: VecDeque::new(),
            acks_heartbeats: true,
            acks_points: true,
            joins: vec![],
            heard: vec![],
            kept: BTreeMap::new(),
            session: None,
        };
        let coordinator = Self {
            address: listener.local_addr().unwrap(),
            state: Arc::new(Mutex::new(state)),
            reads: Arc::new(watch::Sender::new(true)),
            lease,
            stop: CancellationToken::new(),
        };
        let server = tonic::transport::Server::builder()
            .add_service(WorkerServiceServer::new(coordinator.clone()))
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                coordinator.stop.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        coordinator
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Says something in the open session.
    pub async fn say(&self, message: Down) {
        let session = self.state().session.clone().expect("a session is open");
        session.send(Ok(v1::SessionResponse { message: Some(message), term: 0 })).await.unwrap();
    }

    /// Ends the open session with an error; the node may come back at once.
    pub async fn break_session(&self, status: Status) {
        let session = self.state().session.take().expect("a session is open");
        session.send(Err(status)).await.unwrap();
    }

    /// Whether what nodes send is read. What is not read fills the connection.
    pub fn read(&self, reads: bool) {
        self.reads.send_replace(reads);
    }

    /// The last that was heard of a gang.
    pub fn report(&self, gang: &v1::Assignment) -> Option<Box<v1::GangReport>> {
        let of_gang =
            |r: &&v1::GangReport| (r.job_id.as_str(), r.generation) == (&gang.job_id, gang.generation);
        self.state()
            .heard
            .iter()
            .rev()
            .find_map(|message| match message {
                Up::Gang(report) => Some(report).filter(of_gang).cloned(),
                Up::Hello(hello) => hello.gangs.iter().find(of_gang).cloned(),
                _ => None,
            })
            .map(Box::new)
    }

    pub fn hellos(&self) -> Vec<v1::Hello> {
        let state = self.state();
        let hellos = state.heard.iter().filter_map(|message| match message {
            Up::Hello(hello) => Some(hello.clone()),
            _ => None,
        });
        hellos.collect()
    }

    /// Every point, in the order in which it came.
    pub fn points(&self) -> Vec<v1::Point> {
        let state = self.state();
        let batches = state.heard.iter().filter_map(|message| match message {
            Up::Points(batch) => Some(batch.points.clone()),
            _ => None,
        });
        batches.flatten().collect()
    }

    /// The numbers and steps of the points of one rank that are kept.
    pub fn kept(&self, gang: &v1::Assignment, rank: u32) -> Vec<(u64, u64)> {
        let state = self.state();
        let kept = state.kept.get(&(gang.job_id.clone(), gang.generation, rank));
        kept.into_iter().flatten().map(|point| (point.seq, point.step())).collect()
    }

    /// What came for one subscription.
    pub fn logs(&self, subscription: u64) -> Vec<v1::LogData> {
        let state = self.state();
        let pieces = state.heard.iter().filter_map(|message| match message {
            Up::Log(log) if log.subscription == subscription => Some(log.clone()),
            _ => None,
        });
        pieces.collect()
    }

    async fn listen(self, mut incoming: Streaming<v1::SessionRequest>, answers: Answers) {
        let mut reads = self.reads.subscribe();
        loop {
            reads.wait_for(|reads| *reads).await.unwrap();
            let Ok(Some(v1::SessionRequest { message: Some(message) })) = incoming.message().await else {
                return;
            };
            let mut ends = false;
            let answer = {
                let mut state = self.state();
                // A session that a test has broken is over here too, before the node learns of it.
                if !state.session.as_ref().is_some_and(|open| open.same_channel(&answers)) {
                    return;
                }
                let answer = match &message {
                    Up::Hello(_) => Some(Down::Welcome(v1::Welcome {
                        session: state.joins.len() as u64,
                        assignments: state.desired.clone(),
                    })),
                    Up::Heartbeat(beat) if state.acks_heartbeats => {
                        Some(Down::HeartbeatAck(v1::HeartbeatAck { seq: beat.seq }))
                    }
                    Up::Points(batch) if state.acks_points => batch.points.last().map(|last| {
                        // The highest that is kept, which an earlier daemon may have sent.
                        let kept = state.kept.get(&(batch.job_id.clone(), last.generation, last.rank()));
                        let seq = last.seq.max(kept.and_then(|kept| kept.last()).map_or(0, |p| p.seq));
                        Down::PointAck(v1::PointAck {
                            job_id: batch.job_id.clone(),
                            generation: last.generation,
                            rank: last.rank(),
                            seq,
                            again: false,
                        })
                    }),
                    Up::Goodbye(_) => {
                        ends = true;
                        None
                    }
                    _ => None,
                };
                if let Up::Points(batch) = &message {
                    for point in &batch.points {
                        let key = (batch.job_id.clone(), point.generation, point.rank());
                        let kept = state.kept.entry(key).or_default();
                        if kept.last().is_none_or(|last| last.seq < point.seq) {
                            kept.push(point.clone());
                        }
                    }
                }
                state.heard.push(message);
                if ends {
                    state.session = None;
                }
                answer
            };
            if ends {
                return;
            }
            if let Some(answer) = answer {
                answers.send(Ok(v1::SessionResponse { message: Some(answer), term: 0 })).await.ok();
            }
        }
    }
}

#[tonic::async_trait]
impl WorkerService for Coordinator {
    async fn issue_certificate(
        &self,
        _request: Request<v1::IssueCertificateRequest>,
    ) -> Result<Response<v1::IssueCertificateResponse>, Status> {
        Err(Status::failed_precondition("nothing is encrypted here"))
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let accepted_at = request.local_addr().map(|address| address.to_string()).unwrap_or_default();
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let mut state = self.state();
        if let Some(refusal) = state.refusals.pop_front() {
            return Err(refusal);
        }
        state.joins.push(request.into_inner());
        Ok(Response::new(v1::JoinResponse {
            lease: Some(duration_to_wire_std(self.lease)),
            heartbeat_interval: Some(duration_to_wire_std(Duration::from_millis(50))),
            accepted_at,
            boot_id: boot_id.trim().to_owned(),
            ..v1::JoinResponse::default()
        }))
    }

    type SessionStream = ReceiverStream<Result<v1::SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (answers, outgoing) = mpsc::channel(64);
        self.state().session = Some(answers.clone());
        tokio::spawn(self.clone().listen(request.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
