//! How the handlers reach the driver: commands into its inbox, and their answers. What only looks never goes there.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use muster_core::types::{GangReport, Incarnation, Millis, NodeName};
use muster_core::{Heard, Input, Job, Join, Node, Refusal, Reply};
use muster_proto::v1;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use super::Leads;
use crate::access::Tokens;
use crate::clock::Clock;
use crate::links::{Link, Links};
use crate::published::{Changes, Published, State};

/// What a request comes back with.
pub(crate) type Answer = Result<Reply, RequestError>;

/// Why a request has no reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    StoreUnavailable(String),
    #[error("the coordinator is shutting down, or has stopped leading; try again")]
    Stopping,
}

/// The first message of a session, checked.
#[derive(Debug)]
pub(crate) struct Hello {
    pub node: NodeName,
    pub incarnation: Incarnation,
    pub gangs: Vec<GangReport>,
    pub leaving: Option<String>,
    pub number: u64,
}

pub(super) enum Command {
    Request {
        input: Box<Input>,
        reply: oneshot::Sender<Answer>,
    },
    Join {
        join: Box<Join>,
        reply: oneshot::Sender<Answer>,
    },
    FromNode(Box<Input>),
    OpenSession {
        hello: Box<Hello>,
        sender: mpsc::Sender<Result<v1::SessionResponse, Status>>,
        reply: oneshot::Sender<Result<Arc<Link>, RequestError>>,
    },
    /// Takes the driver's time, as much work would.
    #[cfg(test)]
    Busy(Box<dyn FnOnce() + Send>),
}

/// How handlers reach the driver.
#[derive(Clone)]
pub(crate) struct Handle {
    /// With the time at which each was heard.
    pub(super) inbox: mpsc::Sender<(Millis, Command)>,
    pub(super) links: Links,
    pub(super) clock: Clock,
    /// Why the store cannot be written, while it cannot.
    pub(super) trouble: watch::Receiver<Option<String>>,
    /// By what callers are judged: a look costs no turn of the driver.
    pub(super) tokens: Arc<RwLock<Tokens>>,
    /// What readers see.
    pub(super) published: Published,
    pub(super) leads: Leads,
    /// Whether what was known when the time of leading ended is shown.
    pub(super) showing: Arc<AtomicBool>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// A mutation: answered once it is durable.
    pub async fn request(&self, input: Input) -> Answer {
        let input = Box::new(input);
        self.ask(|reply| Command::Request { input, reply }).await?
    }

    /// A node registers: answered once what is new about it is durable, which is at once if nothing is.
    pub async fn join(&self, join: Join) -> Answer {
        let join = Box::new(join);
        self.ask(|reply| Command::Join { join, reply }).await?
    }

    /// Something a node says: acted on in order, never answered.
    pub async fn tell(&self, input: Input) -> Result<(), RequestError> {
        self.send(Command::FromNode(Box::new(input))).await
    }

    /// Acknowledges a node's heartbeat if its session still holds the lease: at once, however busy
    /// the driver is, and whatever waits for the store. Nothing of a lease is stored, and training
    /// must not end because a disk is full.
    pub fn heartbeat(&self, link: &Link, seq: u64) -> Result<(), RequestError> {
        if !(self.leads)() {
            return Err(RequestError::Stopping);
        }
        if link.pulse.beat(self.clock.now()) {
            link.send(v1::session_response::Message::HeartbeatAck(v1::HeartbeatAck { seq }));
        }
        Ok(())
    }

    /// A session is over. Its last heartbeat counts; none is acknowledged from now on.
    pub async fn disconnected(&self, node: &NodeName, link: &Link) -> Result<(), RequestError> {
        let session = link.session;
        if let Some(at) = link.pulse.end() {
            self.tell(Input::Heartbeats(vec![Heard { node: node.clone(), session, at }])).await?;
        }
        self.tell(Input::Disconnected { node: node.clone(), session }).await
    }

    /// Opens a node's session; `sender` is its stream. Answered at once: what the node shall do comes on the stream when
    /// it is durable, and heartbeats need not wait for that.
    pub async fn open_session(
        &self,
        hello: Hello,
        sender: mpsc::Sender<Result<v1::SessionResponse, Status>>,
    ) -> Result<Arc<Link>, RequestError> {
        let hello = Box::new(hello);
        self.ask(|reply| Command::OpenSession { hello, sender, reply }).await?
    }

    /// Looks at the published state, for a short time: all of it is durable.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> Result<T, RequestError> {
        let seen = look(&self.published.read());
        self.confirm()?;
        Ok(seen)
    }

    /// Returns the job now, and each of its later states.
    pub fn watch_job(&self, id: &str) -> Result<(Arc<Job>, Changes<Job>), RequestError> {
        let watched = self.published.write().watch_job(id)?;
        self.confirm()?;
        Ok(watched)
    }

    /// Returns every node now, and each one that changes.
    pub fn watch_nodes(&self) -> Result<(Vec<Arc<Node>>, Changes<Node>), RequestError> {
        let watched = self.published.write().watch_nodes();
        self.confirm()?;
        Ok(watched)
    }

    /// Checks that what was seen just now was the present: nobody else can have led until then. What is shown after the time
    /// of leading is marked as old instead.
    pub fn confirm(&self) -> Result<(), RequestError> {
        let is_present = (self.leads)() || self.showing.load(Ordering::Acquire);
        if is_present { Ok(()) } else { Err(RequestError::Stopping) }
    }

    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Why what is read may not be stored yet; none if it is.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// The tokens that are stored.
    pub fn tokens(&self) -> RwLockReadGuard<'_, Tokens> {
        // Each change is whole before anything can panic.
        self.tokens.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commands that wait.
    pub fn inbox_depth(&self) -> usize {
        self.inbox.max_capacity() - self.inbox.capacity()
    }

    pub fn clock(&self) -> Clock {
        self.clock
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.send(make(reply)).await?;
        answer.await.map_err(|_| RequestError::Stopping)
    }

    /// The time is that at which it was heard, however long it waits: a heartbeat that came in time counts, whatever
    /// is in front of it.
    async fn send(&self, command: Command) -> Result<(), RequestError> {
        self.inbox.send((self.clock.now(), command)).await.map_err(|_| RequestError::Stopping)
    }
}
