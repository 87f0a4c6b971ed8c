//! Thin handlers: wire to checked types, one call of the driver, checked types to wire.

mod agents;
mod cluster;
pub(crate) mod jobs;
pub(crate) mod logs;
pub(crate) mod nodes;
#[cfg(test)]
mod ownership_tests;
pub(crate) mod points;
mod streams;
pub(crate) mod tokens;
pub(crate) mod worker;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use muster_core::Refusal;
use muster_proto::convert;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};

use crate::access::Identity;
use crate::authority::Authority;
use crate::driver::{Handle, RequestError};
use crate::intake::Intake;
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::office::Office;

/// Nodes that join or open their session at once; the others wait in the order in which they came. What the nodes
/// that are here say has the driver's inbox nearly to itself: heartbeats behind ten thousand arrivals would be
/// answered so late that their nodes gave up, and came back to make the queue longer. Still enough of them for a
/// group that is written for tens of milliseconds.
const ARRIVALS_MAX: usize = 256;
/// Messages of a stream that wait for its client.
const STREAM_QUEUE: usize = 16;

/// A stream that a reader follows. What waits for its client is shared or small, and becomes a message when the client takes
/// it: a record may be as large as a message can be.
pub(crate) type Followed<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// Returns the stream of what comes through a queue.
fn followed<W: Send + 'static, T: 'static>(
    waiting: mpsc::Receiver<Result<W, Status>>,
    message: impl Fn(W) -> T + Send + 'static,
) -> Followed<T> {
    Box::pin(ReceiverStream::new(waiting).map(move |next| next.map(&message)))
}

/// A server stream fed by a task.
pub(crate) type Stream<T> = ReceiverStream<Result<T, Status>>;

/// What every handler needs.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub office: Office,
    pub metrics: Metrics,
    pub monitor: Monitor,
    pub intake: Intake,
    pub lease: Duration,
    pub heartbeat: Duration,
    /// Whether everybody who may see jobs sees all of each.
    open_jobs: bool,
    /// Where connections are encrypted.
    authority: Option<Authority>,
    arrivals: Arc<Semaphore>,
}

impl Api {
    pub fn new(office: Office, metrics: Metrics, monitor: Monitor, config: &crate::Config) -> Self {
        let (lease, heartbeat) = (config.lease, config.heartbeat);
        let arrivals = Arc::new(Semaphore::new(ARRIVALS_MAX));
        let life = config.node_certificate_life;
        let authority = config.tls_dir.as_deref().map(|dir| Authority::new(dir, life));
        let intake = Intake::new();
        Self {
            office,
            metrics,
            monitor,
            intake,
            lease,
            heartbeat,
            open_jobs: config.open_jobs,
            authority,
            arrivals,
        }
    }

    /// The driver of the present time of leading.
    fn driver(&self) -> Result<Handle, Status> {
        Ok(self.office.reign()?.driver)
    }

    /// Who certifies nodes.
    fn authority(&self) -> Result<&Authority, Status> {
        self.authority.as_ref().ok_or_else(|| {
            let message = "connections are not encrypted here, and nodes need no certificates; start the coordinator with --tls-dir";
            convert::refusal(Code::FailedPrecondition, "NO_AUTHORITY", message)
        })
    }

    /// A node's turn to arrive.
    async fn arrival(&self) -> Result<SemaphorePermit<'_>, Status> {
        self.arrivals.acquire().await.map_err(|_| Status::unavailable("the coordinator is shutting down"))
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::Refused(refusal) => refused(&refusal, message),
            RequestError::StoreUnavailable(_) => {
                convert::unavailable("STORE_UNAVAILABLE", message, Duration::from_secs(2))
            }
            RequestError::Stopping => convert::unavailable("STOPPING", message, Duration::from_secs(1)),
        }
    }
}

fn refused(refusal: &Refusal, message: String) -> Status {
    match refusal {
        Refusal::NoJob(_) => convert::refusal(Code::NotFound, "NO_SUCH_JOB", message),
        Refusal::NoNode(_) => convert::refusal(Code::NotFound, "NO_SUCH_NODE", message),
        Refusal::RequestReused { .. } => convert::refusal(Code::AlreadyExists, "REQUEST_ID_REUSED", message),
        Refusal::QueueFull(_) => convert::refusal(Code::ResourceExhausted, "QUEUE_FULL", message),
        Refusal::NotOwner { .. } => convert::refusal(Code::PermissionDenied, "NOT_OWNER", message),
        Refusal::Priority { .. } => convert::refusal(Code::PermissionDenied, "PRIORITY_TOO_HIGH", message),
        Refusal::TooManyNodes { .. } => convert::refusal(Code::ResourceExhausted, "TOO_MANY_NODES", message),
        Refusal::NameHeld(_) => convert::refusal(Code::AlreadyExists, "NODE_NAME_HELD", message),
        Refusal::LeaseHeld { millis, .. } => {
            convert::unavailable("LEASE_HELD", message, Duration::from_millis(*millis))
        }
        Refusal::TokenExists(_) => convert::refusal(Code::AlreadyExists, "TOKEN_EXISTS", message),
        Refusal::NoToken(_) => convert::refusal(Code::NotFound, "NO_SUCH_TOKEN", message),
        Refusal::TokenUsedUp(_) => convert::refusal(Code::PermissionDenied, "TOKEN_USED_UP", message),
        Refusal::TooManyBarred => convert::refusal(Code::ResourceExhausted, "TOO_MANY_SHUT_OUT", message),
        Refusal::TooManyTokens => convert::refusal(Code::ResourceExhausted, "TOO_MANY_TOKENS", message),
        Refusal::LateHello(_) => convert::refusal(Code::Aborted, "LATE_HELLO", message),
        Refusal::NotJoined(node) => convert::precondition(node.as_str(), message),
    }
}

/// Who calls, as the layer in front of us has found.
fn caller<T>(request: &Request<T>) -> Result<Identity, Status> {
    let identity = request.extensions().get::<Identity>().cloned();
    identity.ok_or_else(|| Status::internal("nobody has looked who calls; this is a bug in muster"))
}

fn unexpected_reply() -> Status {
    Status::internal("the core gave a reply of another kind than the request; this is a bug in muster")
}
