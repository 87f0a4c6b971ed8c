//! The one task that owns the node's core: what the coordinator wants and what the shims observe go in,
//! commands to the shims and reports go out.

mod ending;
mod machine;
mod noting;
mod sending;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::time::Duration;

use muster_core::types::{GangId, Generation, JobId, Millis, ObservedPhase, Rank, StopMode, StopSignal};
use muster_proto::convert;
use muster_proto::v1;
use muster_proto::v1::session_response::Message as Down;
use muster_worker_core::{Core, Effect, Input};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::clock::boot_now;
use crate::launch::user;
use crate::logs::{Live, Subscriptions};
use crate::monitor::Monitor;
use crate::session::{self, Event, Identity, Queues, request};
use crate::shim::{Command, Context, Shim, find};
use crate::telemetry::Outbox;
use crate::{Config, Error, data_dir, devices};
use machine::Watched;
use sending::{observed, room_from, send_points};

/// Observations and messages that may wait for the daemon; senders wait beyond it.
const INBOX_MAX: usize = 1024;
/// Time that killed ranks get to be gone when the daemon ends. One that the kernel does not let go of (a dead
/// file server, a hung driver) must not keep the daemon; its shim says so after 10 s.
const KILLED_MAX: Duration = Duration::from_secs(11);
/// Time to take note that a shim that did not follow is gone.
const SHIM_KILLED_MAX: Duration = Duration::from_secs(2);
/// Time to find out what became of the gangs of an earlier daemon.
const ADOPT_MAX: Duration = Duration::from_secs(15);
/// Time for the shims of ended gangs to go.
const RELEASE_MAX: Duration = Duration::from_secs(6);
/// Time for the last reports and points to reach the coordinator when the daemon ends, and for the goodbye.
const FLUSH_MAX: Duration = Duration::from_secs(3);
const GOODBYE_MAX: Duration = Duration::from_secs(1);
/// Runs a node daemon until `shutdown` is cancelled or the coordinator refuses it for good.
///
/// A coordinator that is not there is waited for, for ever. On shutdown every rank is stopped (SIGTERM, then
/// SIGKILL), the coordinator is told, and nothing is left running. Dropped instead, it leaves its ranks to their
/// shims, as it does when its process is killed: the next daemon with this data directory goes on with them.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    let failed = |source| Error::DataDir { path: config.data_dir.clone(), source };
    // Ranks are told paths in it, and have working directories of their own.
    let data_dir = std::path::absolute(&config.data_dir).map_err(failed)?;
    user::check(config.run_as.as_ref()).map_err(Error::RunAs)?;
    if config.run_as.is_none() && user::is_root() {
        warn!(
            "this daemon runs as root, and so do the ranks of jobs that do not say as whom; --run-as USER changes that"
        );
    }
    let _lock = data_dir::lock(&data_dir)?;
    let monitor = Monitor::new();
    let _page = monitor.serve(&config).await?;
    let watched = Watched::start(&config, data_dir.clone(), monitor.clone()).await?;
    let (fenced_at, fences) = watch::channel(None);
    let identity = Identity {
        incarnation: uuid::Uuid::new_v4().to_string(),
        boot_id: devices::boot_id(Path::new("/")),
        data_id: data_dir::data_id(&data_dir)?,
        data_dir: data_dir.clone(),
        inventory: watched.inventory(),
        fenced_at: fences,
        config,
    };
    let (events, observed) = mpsc::channel(INBOX_MAX);
    let outbox = Outbox::default();
    let context = Context {
        data_dir,
        data_id: identity.data_id.clone(),
        boot_id: identity.boot_id.clone(),
        command: identity.config.shim.clone(),
        attached: identity.config.attached.clone(),
        run_as: identity.config.run_as.clone(),
        outbox: outbox.clone(),
    };
    let daemon = Daemon {
        core: Core::default(),
        fenced_at,
        context,
        events,
        observed,
        shims: BTreeMap::new(),
        releasing: BTreeSet::new(),
        released: JoinSet::new(),
        outbox,
        live: Live::default(),
        link: None,
        unsent: BTreeSet::new(),
        leaving: None,
        last_coordinator: None,
        hellos: 0,
        watched,
        monitor,
        identity,
    };
    daemon.run(shutdown).await
}

/// The open session, seen from here.
struct Link {
    coordinator: String,
    queues: Queues,
    subscriptions: Subscriptions,
    /// What sends points.
    _points: AbortOnDropHandle<()>,
}

struct Daemon {
    core: Core,
    fenced_at: watch::Sender<Option<Millis>>,
    context: Context,
    events: mpsc::Sender<Input>,
    observed: mpsc::Receiver<Input>,
    shims: BTreeMap<GangId, Shim>,
    /// Forgotten gangs of which the coordinator does not have all points yet.
    releasing: BTreeSet<GangId>,
    /// Shims that are about to end.
    released: JoinSet<()>,
    outbox: Outbox,
    live: Live,
    link: Option<Link>,
    /// Gangs whose report is to be sent.
    unsent: BTreeSet<GangId>,
    /// Hellos so far.
    hellos: u64,
    /// Why the daemon is about to end, until the coordinator has been told.
    leaving: Option<String>,
    /// With whom the last session was.
    last_coordinator: Option<String>,
    watched: Watched,
    monitor: Monitor,
    identity: Identity,
}

impl Daemon {
    async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        self.adopt().await;
        self.say(muster_monitor::ready);
        let (sender, mut session) = mpsc::channel(INBOX_MAX);
        let keeping = tokio::spawn(session::keep(self.identity.clone(), sender));
        let mut keeping = AbortOnDropHandle::new(keeping);
        let refused = loop {
            tokio::select! {
                refused = &mut keeping => {
                    break Some(refused.unwrap_or_else(|error| Error::Refused(format!("the session broke: {error}"))));
                }
                () = shutdown.cancelled() => break None,
                () = self.turn(&mut session) => {}
            }
        };
        self.say(muster_monitor::stopping);
        self.step(Input::Shutdown);
        let grace = self.identity.config.stop_grace_max;
        if !self.is_idle_within(grace, &mut session).await {
            for shim in self.shims.values() {
                shim.tell(Command::Stop(StopMode {
                    signal: StopSignal::default(),
                    grace: Millis(0),
                    dump_stacks: false,
                }));
            }
            if !self.is_idle_within(KILLED_MAX, &mut session).await {
                warn!("a shim does not stop its ranks; it is killed, and they with it");
                self.running().into_iter().filter_map(|gang| self.shims.get(&gang)).for_each(Shim::kill);
                self.is_idle_within(SHIM_KILLED_MAX, &mut session).await;
            }
        }
        let flushed = tokio::time::timeout(FLUSH_MAX, self.flush(&mut session)).await;
        if flushed.is_ok_and(|told| told) {
            let running = self.running();
            let ended: Vec<GangId> = self.shims.keys().filter(|g| !running.contains(g)).cloned().collect();
            for gang in ended {
                self.monitor.given_up(self.outbox.end(&gang));
                self.releasing.insert(gang);
            }
            self.release();
        }
        tokio::time::timeout(GOODBYE_MAX, self.say_goodbye(&mut session)).await.ok();
        // A command's terminal is not held up by shims that tidy up after their ranks.
        if self.context.attached.is_none() {
            let gone = async { while self.released.join_next().await.is_some() {} };
            tokio::time::timeout(RELEASE_MAX, gone).await.ok();
        }
        info!("worker stopped");
        refused.map_or(Ok(()), Err)
    }

    /// Takes over what an earlier daemon left. Those of its gangs that have ended meanwhile, or whose shims are dead, are
    /// cleared up before the first Hello says what is here.
    async fn adopt(&mut self) {
        let mut ended = Vec::new();
        for link in find(&self.context).await {
            let adopted = link.adopted();
            let gang = adopted.assignment.gang.clone();
            self.live.insert(gang.clone());
            for exit in &adopted.exits {
                self.live.end(&gang, exit.rank);
            }
            if link.stream.is_none() {
                ended.push(gang.clone());
            }
            self.step(Input::Adopted(Box::new(adopted)));
            self.count(&gang);
            self.shims.insert(gang, Shim::adopt(link, self.context.clone(), self.events.clone()));
        }
        let settled = async {
            while ended.iter().any(|gang| self.running().contains(gang)) {
                if let Some(observation) = self.observed.recv().await {
                    self.step(observation);
                }
            }
        };
        if tokio::time::timeout(ADOPT_MAX, settled).await.is_err() {
            warn!("what is left of a gang whose shim is dead does not end");
        }
    }

    /// Gangs of which something executes, or may.
    fn running(&self) -> BTreeSet<GangId> {
        let running = self.core.reports().into_iter().filter(|report| report.phase < ObservedPhase::Killed);
        running.map(|report| report.gang).collect()
    }

    /// Lets the shims of forgotten gangs go, once the coordinator has all their points.
    fn release(&mut self) {
        for gang in std::mem::take(&mut self.releasing) {
            if self.outbox.holds(&gang) {
                self.releasing.insert(gang);
            } else if let Some(shim) = self.shims.remove(&gang) {
                self.released.spawn(shim.release());
            }
        }
    }

    /// Waits for one thing and deals with it. May be dropped while it waits: what it takes it deals with at once.
    async fn turn(&mut self, session: &mut mpsc::Receiver<Event>) {
        self.release();
        let send_at = self.send_at();
        let outbox = self.outbox.clone();
        let control = self.link.as_ref().map(|link| link.queues.control.clone());
        tokio::select! {
            Some(observation) = self.observed.recv() => self.step(observation),
            Some(event) = session.recv() => self.on_session(event),
            // Only a coordinator that reads makes room; one that does not holds up nothing else here.
            room = room_from(send_at, control) => if let Some(message) = self.next_message() {
                room.send(request(message));
            },
            () = until(self.core.next_deadline()) => self.step(Input::Tick),
            // The next turn looks at it.
            () = outbox.settled() => {}
            Some(seen) = self.watched.seen.recv() => self.watched.take(seen),
            Some(_) = self.released.join_next() => {}
        }
    }

    fn on_session(&mut self, event: Event) {
        match event {
            Event::Open { coordinator, inventory, hello, queues } => {
                self.watched.opened(inventory);
                let (name, incarnation) = (&self.identity.config.name, self.identity.incarnation.clone());
                let gangs = observed(&self.core);
                let reason = self.leaving_since_shutdown();
                let leaving = reason.map(|reason| v1::Leaving { reason });
                self.hellos += 1;
                let (node_name, number) = (name.to_string(), self.hellos);
                let resends_points = true;
                hello.send(v1::Hello { node_name, incarnation, gangs, leaving, number, resends_points }).ok();
                self.unsent.clear();
                self.leaving = None;
                // What the last session did not get acknowledged goes first: the coordinator passes over what is
                // older than what it has.
                self.outbox.rewind();
                // Another coordinator has its own metrics, and may lack what the last one has acknowledged.
                if self.last_coordinator.as_ref().is_some_and(|last| *last != coordinator) {
                    self.outbox.rewind_to_start();
                }
                self.last_coordinator = Some(coordinator.clone());
                let points = send_points(self.outbox.clone(), queues.points.clone(), self.monitor.clone());
                self.link = Some(Link {
                    coordinator,
                    queues,
                    subscriptions: Subscriptions::default(),
                    _points: AbortOnDropHandle::new(tokio::spawn(points)),
                });
            }
            Event::Closed => {
                self.link = None;
                self.monitor.set_connected(false);
            }
            Event::Renewed { sent, lease } => self.step(Input::Renewed { sent, lease }),
            Event::CoordinatorGone { at } => self.step(Input::CoordinatorGone { at }),
            Event::Heard(message) => self.hear(*message),
        }
    }

    fn hear(&mut self, message: Down) {
        match message {
            Down::Welcome(welcome) => {
                if let Some(link) = &self.link {
                    // Scripts and tests wait for this line.
                    let (node, session) = (&self.identity.config.name, welcome.session);
                    info!(%node, coordinator = %link.coordinator, session, "joined");
                }
                self.monitor.welcomed();
                let mut all = Vec::new();
                for wire in welcome.assignments {
                    match convert::assignment_from_wire(wire) {
                        Ok(assignment) => all.push(assignment),
                        // Taking the list without it would stop what it is about.
                        Err(error) => return warn!(%error, "a welcome cannot be followed"),
                    }
                }
                self.step(Input::Welcome(all));
            }
            Down::Assignment(wire) => match convert::assignment_from_wire(wire) {
                Ok(assignment) => self.step(Input::Assign(Box::new(assignment))),
                Err(error) => warn!(%error, "an assignment cannot be followed"),
            },
            Down::PointAck(ack) => {
                if let Ok(job) = JobId::new(ack.job_id) {
                    let gang = GangId { job, generation: Generation(ack.generation) };
                    let rank = Rank(ack.rank);
                    if ack.again {
                        self.outbox.again(&gang, rank);
                    } else {
                        self.outbox.acknowledge(&gang, rank, ack.seq);
                    }
                }
            }
            Down::LogSubscribe(wanted) => {
                if let Some(link) = &mut self.link {
                    let (data_dir, live) = (self.context.data_dir.clone(), self.live.clone());
                    let (logs, bytes) = (link.queues.logs.clone(), self.monitor.log_bytes());
                    link.subscriptions.add(wanted, (data_dir, live), logs, bytes);
                }
            }
            Down::LogCredit(credit) => {
                if let Some(link) = &self.link {
                    link.subscriptions.credit(&credit);
                }
            }
            Down::LogUnsubscribe(ended) => {
                if let Some(link) = &mut self.link {
                    link.subscriptions.remove(ended.subscription);
                }
            }
            Down::HeartbeatAck(_) => {}
        }
    }

    fn step(&mut self, input: Input) {
        self.note(&input);
        let mut effects: VecDeque<Effect> = self.core.step(boot_now(), input).into();
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Start(assignment) => {
                    let gang = assignment.gang.clone();
                    self.monitor.started();
                    self.live.insert(gang.clone());
                    let surroundings = Box::new(self.surroundings(&assignment));
                    let known = Input::Surroundings(gang.clone(), surroundings.clone());
                    effects.extend(self.core.step(boot_now(), known));
                    let (context, events) = (self.context.clone(), self.events.clone());
                    let shim = Shim::start(*assignment, surroundings, context, events);
                    self.shims.insert(gang, shim);
                }
                Effect::Launch(assignment, fence) => {
                    let gang = assignment.gang.clone();
                    self.tell(&gang, |shim| shim.tell(Command::Launch { assignment, fence }));
                }
                Effect::Stop(gang, stop) => self.tell(&gang, |shim| shim.tell(Command::Stop(stop))),
                Effect::Fence(gang, fence) => self.tell(&gang, |shim| shim.fence(fence)),
                Effect::Kill(gang) => self.tell(&gang, Shim::kill),
                Effect::Leaving(reason) => self.leaving = Some(reason),
                Effect::Release(gang) => {
                    self.monitor.given_up(self.outbox.end(&gang));
                    self.monitor.gang(&gang, None, 0);
                    self.releasing.insert(gang);
                }
                Effect::Report(gang) => {
                    self.count(&gang);
                    self.unsent.insert(gang);
                }
            }
        }
        self.fenced_at.send_replace(self.core.fenced_at());
    }

    fn tell(&self, gang: &GangId, what: impl FnOnce(&Shim)) {
        if let Some(shim) = self.shims.get(gang) {
            what(shim);
        }
    }
}

/// Waits for a time on the node's clock; for ever without one.
async fn until(at: Option<Millis>) {
    match at {
        Some(at) => tokio::time::sleep(Duration::from_millis(at.since(boot_now()).0)).await,
        None => std::future::pending().await,
    }
}
