//! The one task that owns the node's core: what the coordinator wants and what the runners observe go in,
//! commands to the runners and reports go out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use muster_core::types::{GangId, Generation, JobId, Rank};
use muster_proto::convert;
use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::core::{Core, Effect, Input};
use crate::launch::{Command, Context, Launcher, Runner};
use crate::logs::{Live, Subscriptions};
use crate::session::{self, Event, Identity, request};
use crate::telemetry::{Outbox, Sockets};
use crate::{Config, Error, devices};

/// Observations and messages that may wait for the daemon; senders wait beyond it.
const INBOX_MAX: usize = 1024;
/// Points are sent in batches, at most this often.
const POINTS_INTERVAL: Duration = Duration::from_millis(50);
/// Longest time to stop ranks when the daemon itself is to end, whatever grace their jobs have: whoever stops a
/// daemon (systemd, Kubernetes) kills it after 30 to 90 s.
const SHUTDOWN_GRACE_MAX: u64 = 20_000;
/// Time for the last reports and points to reach the coordinator when the daemon ends.
const FAREWELL_MAX: Duration = Duration::from_secs(3);

/// Runs a node daemon until `shutdown` is cancelled or the coordinator refuses it for good.
///
/// A coordinator that is not there is waited for, for ever. On shutdown every rank is stopped (SIGTERM, then
/// SIGKILL), the coordinator is told, and nothing is left running.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    let data_dir = config.data_dir.clone();
    let _lock = lock(&data_dir)?;
    let failed = |source| Error::DataDir { path: data_dir.clone(), source };
    let sockets = Sockets::new(&data_dir).map_err(failed)?;
    let root = Path::new("/");
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let identity = Identity {
        incarnation: uuid::Uuid::new_v4().to_string(),
        boot_id: devices::boot_id(root),
        inventory: devices::inventory(root, visible.as_deref(), config.labels.clone()),
        config,
    };
    let total = &identity.inventory.total;
    info!(node = %identity.config.name, gpus = total.gpus, cpu_millis = total.cpu_millis, memory_bytes = total.memory_bytes, "inventory");
    let (events, observed) = mpsc::channel(INBOX_MAX);
    let outbox = Outbox::default();
    let daemon = Daemon {
        core: Core::default(),
        launcher: Launcher::start()?,
        context: Context { data_dir: data_dir.clone(), sockets, outbox: outbox.clone() },
        events,
        observed,
        runners: BTreeMap::new(),
        outbox,
        live: Live::default(),
        link: None,
        unsent: BTreeSet::new(),
        send_at: None,
        identity,
    };
    daemon.run(shutdown).await
}

fn lock(data_dir: &Path) -> Result<File, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    std::fs::create_dir_all(data_dir).map_err(failed)?;
    let file = File::create(data_dir.join("worker.lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::DataDirHeld(data_dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// The open session, seen from here.
struct Link {
    bulk: mpsc::Sender<v1::SessionRequest>,
    logs: Subscriptions,
}

struct Daemon {
    core: Core,
    launcher: Launcher,
    context: Context,
    events: mpsc::Sender<Input>,
    observed: mpsc::Receiver<Input>,
    runners: BTreeMap<GangId, Runner>,
    outbox: Outbox,
    live: Live,
    link: Option<Link>,
    /// Gangs whose report is to be sent.
    unsent: BTreeSet<GangId>,
    /// When points or reports are to be sent, if any wait.
    send_at: Option<Instant>,
    identity: Identity,
}

impl Daemon {
    async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        let (sender, mut session) = mpsc::channel(INBOX_MAX);
        let mut keeping = tokio::spawn(session::keep(self.identity.clone(), sender));
        let refused = loop {
            tokio::select! {
                refused = &mut keeping => {
                    break Some(refused.unwrap_or_else(|error| Error::Refused(format!("the session broke: {error}"))));
                }
                () = shutdown.cancelled() => break None,
                () = self.turn(&mut session) => {}
            }
        };
        self.step(Input::Shutdown);
        let hurry = tokio::time::sleep(Duration::from_millis(SHUTDOWN_GRACE_MAX));
        tokio::pin!(hurry);
        let mut hurried = false;
        while !self.core.is_idle() {
            tokio::select! {
                () = self.turn(&mut session) => {}
                () = &mut hurry, if !hurried => {
                    hurried = true;
                    for runner in self.runners.values() {
                        runner.tell(Command::Stop(muster_core::types::Millis(0)));
                    }
                }
            }
        }
        tokio::time::timeout(FAREWELL_MAX, self.farewell(&mut session)).await.ok();
        keeping.abort();
        info!("worker stopped");
        refused.map_or(Ok(()), Err)
    }

    /// Waits for one thing and deals with it.
    async fn turn(&mut self, session: &mut mpsc::Receiver<Event>) {
        if self.send_at.is_none() && self.outbox.has_unsent() {
            self.send_at = Some(Instant::now() + POINTS_INTERVAL);
        }
        if !self.unsent.is_empty() {
            self.send_at = Some(Instant::now());
        }
        let outbox = self.outbox.clone();
        tokio::select! {
            Some(observation) = self.observed.recv() => self.step(observation),
            Some(event) = session.recv() => self.on_session(event),
            () = sleep_until(self.send_at), if self.link.is_some() => self.send_waiting().await,
            // The next turn looks at it.
            () = outbox.added(), if self.send_at.is_none() => {}
        }
    }

    fn on_session(&mut self, event: Event) {
        match event {
            Event::Open { urgent, bulk } => {
                let gangs = self.core.reports().iter().map(convert::gang_report_to_wire).collect();
                let (name, incarnation) = (&self.identity.config.name, self.identity.incarnation.clone());
                let hello = v1::Hello { node_name: name.to_string(), incarnation, gangs };
                // The queue is new and empty.
                urgent.try_send(request(Up::Hello(hello))).ok();
                self.unsent.clear();
                // What the last session did not get acknowledged goes first: the coordinator passes over what is
                // older than what it has.
                self.outbox.rewind();
                self.link = Some(Link { bulk, logs: Subscriptions::default() });
            }
            Event::Closed => self.link = None,
            Event::Heard(message) => self.hear(*message),
        }
    }

    fn hear(&mut self, message: Down) {
        match message {
            Down::Welcome(welcome) => {
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
                    self.outbox.acknowledge(&gang, Rank(ack.rank), ack.seq);
                }
            }
            Down::LogSubscribe(wanted) => {
                if let Some(link) = &mut self.link {
                    let (data_dir, live) = (self.context.data_dir.clone(), self.live.clone());
                    link.logs.add(wanted, data_dir, live, link.bulk.clone());
                }
            }
            Down::LogCredit(credit) => {
                if let Some(link) = &self.link {
                    link.logs.credit(&credit);
                }
            }
            Down::LogUnsubscribe(ended) => {
                if let Some(link) = &mut self.link {
                    link.logs.remove(ended.subscription);
                }
            }
            Down::HeartbeatAck(_) => {}
        }
    }

    fn step(&mut self, input: Input) {
        if let Input::Gone(gang) | Input::Failed(gang, _) = &input {
            self.runners.remove(gang);
            self.live.remove(gang);
        }
        let mut effects: VecDeque<Effect> = self.core.step(input).into();
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Start(assignment) => {
                    let gang = assignment.gang.clone();
                    self.live.insert(gang.clone());
                    let runner = self.launcher.run(*assignment, self.context.clone(), self.events.clone());
                    self.runners.insert(gang, runner);
                }
                Effect::Launch(assignment) => {
                    if let Some(runner) = self.runners.get(&assignment.gang) {
                        runner.tell(Command::Launch(assignment));
                    }
                }
                Effect::Stop(gang, grace) => {
                    if let Some(runner) = self.runners.get(&gang) {
                        runner.tell(Command::Stop(grace));
                    }
                }
                Effect::Release(gang) => self.outbox.end(&gang),
                Effect::Report(gang) => _ = self.unsent.insert(gang),
            }
        }
    }

    /// Sends points, then reports: the coordinator has the last points of a rank before it learns that the rank
    /// has ended.
    async fn send_waiting(&mut self) {
        self.send_at = None;
        let Some(bulk) = self.link.as_ref().map(|link| link.bulk.clone()) else { return };
        while let Some(batch) = self.outbox.next_batch() {
            if bulk.send(request(Up::Points(batch))).await.is_err() {
                return;
            }
        }
        while let Some(gang) = self.unsent.pop_first() {
            let Some(report) = self.core.report(&gang) else { continue };
            if bulk.send(request(Up::Gang(convert::gang_report_to_wire(&report)))).await.is_err() {
                return;
            }
        }
    }

    /// Waits until the coordinator has the last points, and says goodbye.
    async fn farewell(&mut self, session: &mut mpsc::Receiver<Event>) {
        self.send_waiting().await;
        while !self.outbox.is_empty() && self.link.is_some() {
            self.turn(session).await;
        }
        let Some(link) = self.link.take() else { return };
        let goodbye = v1::Goodbye { reason: "the daemon was stopped".to_owned() };
        link.bulk.send(request(Up::Goodbye(goodbye))).await.ok();
        drop(link);
        // The coordinator ends the stream once it has heard it.
        while !matches!(session.recv().await, Some(Event::Closed) | None) {}
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
