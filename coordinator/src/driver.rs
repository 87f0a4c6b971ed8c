//! The one task that owns the core. It feeds inputs in, makes writes durable in groups, and only then lets
//! anything leave: messages to nodes, replies, and what readers and watchers see.
//!
//! While one group is being written, steps go on and the next group fills. A store that cannot be written for
//! now (a full disk) turns the coordinator read-only: heartbeats are heard, training goes on, submissions
//! are refused with what to do, and the waiting group is tried again.

mod durable;
mod handle;
mod publish;
mod send;
mod show;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use muster_core::types::{JobId, Millis, NodeName, Session};
use muster_core::{Core, Effects, Heard, Input, Job, Join, Node, Reply, ToNode, Write};
use muster_proto::v1;
use muster_store::{Batch, Error as StoreError, Fence, Store};
use tokio::sync::{mpsc, oneshot, watch as channel};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{info, warn};

use crate::access::Tokens;
use crate::clock::Clock;
use crate::links::{Link, Links};
use crate::metrics::Metrics;
use crate::monitor::{Monitor, Tally};
use crate::published::Published;
use crate::{Error, persist};
use durable::finished;
use handle::{Answer, Command};
pub(crate) use handle::{Handle, Hello, RequestError};

/// Commands that may wait for the driver; senders wait beyond it.
pub(crate) const INBOX_MAX: usize = 4096;
/// Effects that may wait for the store; beyond it the inbox is not read.
const DEFERRED_MAX: usize = 65_536;

/// A pause of the whole process counts if it is longer than this part of the lease. A node takes a coordinator for one that
/// hangs when a new connection is silent for a twelfth, and then trusts in a lease that this pause makes true.
const STALL_PART: u64 = 16;

/// An effect that waits until the writes before it are durable.
enum Deferred {
    Send(NodeName, Session, ToNode),
    Reply(oneshot::Sender<Answer>, Answer),
    JobChanged(Arc<Job>),
    /// Readers see it, and nobody is told.
    JobDetail(Arc<Job>),
    NodeChanged(Arc<Node>),
    JobDeleted(JobId),
    TokensChanged(Write),
    NodeForgotten(NodeName),
}

/// Writes, and what waits for them.
#[derive(Default)]
struct Group {
    batch: Batch,
    deferred: Vec<Deferred>,
}

type Commit = tokio::task::JoinHandle<(Box<dyn Store>, Batch, Result<(), StoreError>)>;

/// Says whether the time of leading lasts.
pub(crate) type Leads = Arc<dyn Fn() -> bool + Send + Sync>;

/// Why [`Driver::run`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was asked to, and everything is stored.
    Stopped,
    /// Another coordinator leads, or may.
    Deposed,
}

/// The task's state.
pub(crate) struct Driver {
    core: Core,
    clock: Clock,
    /// The core's time: when what is being handled was heard. It is behind the clock while commands wait, so that no
    /// timer overtakes what was heard before it was due.
    now: Millis,
    fence: Fence,
    lease: Millis,
    /// None while a commit holds it.
    store: Option<Box<dyn Store>>,
    /// The group being written.
    writing: Option<(Commit, Vec<Deferred>)>,
    /// The group being filled.
    filling: Group,
    /// Why the store cannot be written, while it cannot.
    degraded: channel::Sender<Option<String>>,
    /// By what callers are judged.
    tokens: Arc<RwLock<Tokens>>,
    /// Whether this coordinator still leads: what is decided after it does not is neither said nor done.
    leads: Leads,
    inbox: mpsc::Receiver<(Millis, Command)>,
    links: Links,
    metrics: Metrics,
    /// What readers see.
    published: Published,
    /// Whether readers are shown what was known when the time of leading ended.
    showing: Arc<AtomicBool>,
    /// Jobs of whose gangs readers do not see all that is known.
    details: BTreeSet<JobId>,
    /// When those are published, at the earliest.
    details_due: Millis,
    monitor: Monitor,
    tally: Tally,
}

/// Takes leadership, loads the state and makes the driver; [`Driver::run`] runs it.
pub(crate) fn start(
    mut store: Box<dyn Store>,
    config: muster_core::Config,
    metrics: Metrics,
    monitor: Monitor,
    clock: Clock,
    leads: Leads,
) -> Result<(Handle, Driver), Error> {
    let fence = store.campaign()?;
    let snapshot = persist::load(&mut *store)?;
    let seed = uuid::Uuid::new_v4().as_u64_pair().0;
    let lease = config.lease;
    let now = clock.now();
    let (core, effects) = Core::load(now, config, seed, snapshot);
    let (sender, inbox) = mpsc::channel(INBOX_MAX);
    let links = Links::default();
    let (degraded, trouble) = channel::channel(None);
    let tokens = Arc::new(RwLock::new(Tokens::of(&core)));
    let (published, showing) = (Published::of(&core), Arc::new(AtomicBool::new(false)));
    let handle = Handle {
        inbox: sender,
        links: links.clone(),
        clock,
        trouble,
        tokens: tokens.clone(),
        published: published.clone(),
        leads: leads.clone(),
        showing: showing.clone(),
    };
    let tally = Tally::new(monitor.clone(), &core);
    let mut driver = Driver {
        core,
        clock,
        now,
        fence,
        lease,
        store: Some(store),
        writing: None,
        filling: Group::default(),
        degraded,
        tokens,
        leads,
        inbox,
        links,
        metrics,
        published,
        showing,
        details: BTreeSet::new(),
        details_due: Millis(0),
        monitor,
        tally,
    };
    driver.take(effects, None);
    Ok((handle, driver))
}

impl Driver {
    /// Number of the time of leading.
    pub fn term(&self) -> u64 {
        self.fence.0
    }

    /// Identity of the cluster, as the API shows it.
    pub fn cluster_id(&self) -> String {
        format!("{:016x}", self.core.meta().seed)
    }

    /// Runs until `stop`, and then finishes what is to be written; or until `over`, or until it sees by itself that another
    /// coordinator leads.
    pub async fn run(&mut self, stop: &CancellationToken, over: &CancellationToken) -> Result<End, Error> {
        let ended = self.lead(stop, over).await;
        self.tally.clear();
        match ended {
            Err(Error::Store(StoreError::Fenced)) => Ok(End::Deposed),
            ended => ended,
        }
    }

    async fn lead(&mut self, stop: &CancellationToken, over: &CancellationToken) -> Result<End, Error> {
        let nodes = self.core.nodes_after(None).count();
        info!(jobs = self.core.jobs_total(), nodes, fence = self.fence.0, "state loaded");
        // Woken at least this often, so that a pause of the whole process is noticed as one.
        let wake_max = Duration::from_millis(self.lease.0 / (2 * STALL_PART)).max(Duration::from_millis(10));
        let mut woken = self.clock.now();
        loop {
            if !(self.leads)() {
                return Ok(End::Deposed);
            }
            self.flush();
            #[cfg(debug_assertions)]
            self.check_published();
            let room = self.filling.deferred.len() < DEFERRED_MAX;
            let due = if room { self.core.next_deadline() } else { None };
            let idle = [due, self.details_due()]
                .into_iter()
                .flatten()
                .min()
                .map_or(wake_max, |at| Duration::from_millis(at.since(self.clock.now()).0).min(wake_max));
            let input = tokio::select! {
                biased;
                () = over.cancelled() => return Ok(End::Deposed),
                done = finished(&mut self.writing) => {
                    self.written(done?)?;
                    None
                }
                command = self.inbox.recv(), if room => match command {
                    Some(command) => Some(command),
                    None => break,
                },
                () = stop.cancelled() => break,
                () = tokio::time::sleep(idle) => None,
            };
            // It may have waited for long, or not run at all.
            if !(self.leads)() {
                return Ok(End::Deposed);
            }
            let now = self.clock.now();
            if now.since(woken).0 > self.lease.0 / STALL_PART {
                warn!(
                    paused_ms = now.since(woken).0,
                    "the coordinator did not run for a while; leases are extended"
                );
                self.monitor.pauses.inc();
                self.now = self.now.max(now);
                self.step(Input::Stalled, None);
            }
            woken = now;
            match input {
                Some((heard, command)) => {
                    self.now = self.now.max(heard);
                    self.command(command);
                }
                // Whatever waits was heard before now, also where the store holds it up.
                None if self.inbox.is_empty() && due.is_some_and(|at| at <= now) => {
                    self.now = self.now.max(now);
                    self.step(Input::Tick, None);
                }
                None => {}
            }
            self.publish_details(now);
        }
        self.drain().await.map(|()| End::Stopped)
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Request { input, reply } => {
                let trouble = self.degraded.borrow().clone();
                match trouble {
                    Some(why) => drop(reply.send(Err(RequestError::StoreUnavailable(why)))),
                    None => self.step(*input, Some(reply)),
                }
            }
            Command::Join { join, reply } => self.join(*join, reply),
            Command::FromNode(input) => self.step(*input, None),
            Command::OpenSession { hello, sender, reply } => self.open_session(*hello, sender, reply),
            #[cfg(test)]
            Command::Busy(work) => work(),
        }
    }

    /// Takes a step of the core, which knows every heartbeat that bears on it.
    fn decide(&mut self, input: Input) -> Effects {
        let links = &self.links;
        let pulse = |node: &NodeName, session| {
            let link = links.get(node).filter(|link| link.session == session)?;
            Some(link.pulse.clone())
        };
        // A stall ends no lease, and so no pulse.
        let ends_leases = !matches!(input, Input::Stalled);
        if ends_leases && let Some(heard) = self.core.heard_since(self.now, pulse) {
            let effects = self.core.step(self.now, heard);
            self.take(effects, None);
        }
        self.core.step(self.now, input)
    }

    /// Tells the core when a node was last heard, before another session or daemon takes its place.
    fn settle(&mut self, node: &NodeName, last: Option<Millis>) {
        let Some(at) = last else { return };
        let Some(session) = self.links.get(node).map(|link| link.session) else { return };
        self.step(Input::Heartbeats(vec![Heard { node: node.clone(), session, at }]), None);
    }

    /// A node that comes back as it was waits for nothing: its ranks live by how soon it is heard again.
    fn join(&mut self, join: Join, reply: oneshot::Sender<Answer>) {
        let name = join.name.clone();
        let older = self.links.get(&name);
        self.settle(&name, older.as_ref().and_then(|link| link.pulse.last()));
        let mut effects = self.decide(Input::Join(Box::new(join)));
        if let Some(older) = older.filter(|link| !self.core.has_session(&name, link.session)) {
            older.pulse.end();
        }
        match effects.reply.take_if(|_| effects.writes.is_empty()) {
            Some(answer) => {
                reply.send(answer.map_err(RequestError::from)).ok();
                self.take(effects, None);
            }
            None => self.take(effects, Some(reply)),
        }
    }

    fn open_session(
        &mut self,
        hello: Hello,
        sender: mpsc::Sender<Result<v1::SessionResponse, Status>>,
        reply: oneshot::Sender<Result<Arc<Link>, RequestError>>,
    ) {
        let Hello { node, incarnation, gangs, leaving, number } = hello;
        let hello = Input::Hello { node: node.clone(), incarnation, gangs, leaving, number };
        self.settle(&node, self.links.get(&node).and_then(|link| link.pulse.last()));
        let mut effects = self.decide(hello);
        let answer = match effects.reply.take() {
            Some(Ok(Reply::Session(session))) => {
                let link = Link::new(session, self.fence.0, sender);
                if let Some(older) = self.links.replace(&node, link.clone()) {
                    // What it has acknowledged since holds for the lease that goes on.
                    self.settle(&node, older.pulse.end());
                    older.close(Status::aborted("a newer session of this node was opened"));
                }
                self.monitor.sessions_opened.inc();
                info!(%node, %session, "node connected");
                Ok(link)
            }
            Some(Err(refusal)) => Err(refusal.into()),
            Some(Ok(_)) | None => Err(RequestError::Stopping),
        };
        self.take(effects, None);
        reply.send(answer).ok();
    }

    fn step(&mut self, input: Input, reply: Option<oneshot::Sender<Answer>>) {
        let effects = self.decide(input);
        self.take(effects, reply);
    }

    /// Adds a step's effects to the group being filled, in the order of the contract.
    fn take(&mut self, mut effects: Effects, reply: Option<oneshot::Sender<Answer>>) {
        if cfg!(debug_assertions)
            && !effects.events.is_empty()
            && let Err(broken) = self.core.check_invariants()
        {
            panic!("the core's state is broken: {broken}");
        }
        if effects.stranger && self.monitor.refused("gang_report") {
            warn!("a node reports of a gang or of ranks that it never held; it is passed over");
        }
        for write in &effects.writes {
            persist::encode(&mut self.filling.batch, write);
        }
        // Before the reply: who was told that a token is revoked can rely on it, and who has submitted a job finds it.
        self.publish(&effects.writes, std::mem::take(&mut effects.events));
        let deferred = &mut self.filling.deferred;
        deferred.extend(
            effects.sends.into_iter().map(|(node, session, what)| Deferred::Send(node, session, what)),
        );
        if let (Some(reply), Some(answer)) = (reply, effects.reply.take()) {
            deferred.push(Deferred::Reply(reply, answer.map_err(RequestError::from)));
        }
    }

    fn carry_out(&mut self, deferred: Vec<Deferred>) {
        for effect in deferred {
            match effect {
                Deferred::Send(node, session, what) => self.send(&node, session, what),
                Deferred::Reply(reply, answer) => drop(reply.send(answer)),
                Deferred::JobChanged(job) => self.job_changed(&job),
                Deferred::JobDetail(job) => self.published.write().put_job(&job),
                Deferred::NodeChanged(node) => self.node_changed(&node),
                Deferred::JobDeleted(id) => {
                    self.published.write().delete_job(&id);
                    self.tally.job_deleted(&id);
                    self.metrics.delete(&id);
                }
                Deferred::TokensChanged(change) => {
                    self.tokens.write().unwrap_or_else(PoisonError::into_inner).apply(&change);
                }
                Deferred::NodeForgotten(name) => {
                    self.published.write().forget_node(&name);
                    self.tally.node_forgotten(&name);
                }
            }
        }
    }
}
