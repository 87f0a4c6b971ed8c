//! The one task that owns the node's core: what the coordinator wants and what the runners observe go in,
//! commands to the runners and reports go out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use muster_core::types::{GangId, Generation, JobId, Millis, Rank};
use muster_proto::convert;
use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use muster_worker_core::{Core, Effect, Input};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::clock::boot_now;
use crate::launch::{Command, Context, Launcher, Runner};
use crate::logs::{Live, Subscriptions};
use crate::session::{self, Event, Identity, Queues, request};
use crate::telemetry::{Outbox, Sockets};
use crate::{Config, Error, devices};

/// Observations and messages that may wait for the daemon; senders wait beyond it.
const INBOX_MAX: usize = 1024;
/// Points are sent in batches, at most this often.
const POINTS_INTERVAL: Duration = Duration::from_millis(50);
/// Longest time to stop ranks when the daemon itself is to end, whatever grace their jobs have: whoever stops a
/// daemon (systemd, Kubernetes) kills it after 30 to 90 s.
const SHUTDOWN_GRACE_MAX: u64 = 20_000;
/// Time that killed ranks get to be gone when the daemon ends. One that the kernel does not let go of (a dead
/// file server, a hung driver) must not keep the daemon.
const KILLED_MAX: Duration = Duration::from_secs(10);
/// Time for the last reports and points to reach the coordinator when the daemon ends, and for the goodbye.
const FLUSH_MAX: Duration = Duration::from_secs(3);
const GOODBYE_MAX: Duration = Duration::from_secs(1);
/// Bytes of standard error that all exits of one Hello may carry together; a message holds 4 MiB.
const HELLO_TAILS_BYTES_MAX: usize = 1 << 20;

/// Runs a node daemon until `shutdown` is cancelled or the coordinator refuses it for good.
///
/// A coordinator that is not there is waited for, for ever. On shutdown every rank is stopped (SIGTERM, then
/// SIGKILL), the coordinator is told, and nothing is left running.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    let failed = |source| Error::DataDir { path: config.data_dir.clone(), source };
    // Ranks are told paths in it, and have working directories of their own.
    let data_dir = std::path::absolute(&config.data_dir).map_err(failed)?;
    let _lock = lock(&data_dir)?;
    let sockets = Sockets::new(&data_dir).map_err(failed)?;
    let root = Path::new("/");
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let identity = Identity {
        incarnation: uuid::Uuid::new_v4().to_string(),
        boot_id: devices::boot_id(root),
        data_id: data_id(&data_dir)?,
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
        leaving: None,
        points_at: None,
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

/// Identity of the data directory, made when it is first used.
fn data_id(data_dir: &Path) -> Result<String, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    let path = data_dir.join("id");
    match std::fs::read_to_string(&path) {
        Ok(id) if uuid::Uuid::parse_str(id.trim()).is_ok() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let id = uuid::Uuid::new_v4().to_string();
    // Renamed when whole: an empty file would give the node another identity at its next start.
    let partial = data_dir.join("id.new");
    std::fs::write(&partial, &id).and_then(|()| std::fs::rename(&partial, &path)).map_err(failed)?;
    Ok(id)
}

/// The open session, seen from here.
struct Link {
    coordinator: String,
    queues: Queues,
    subscriptions: Subscriptions,
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
    /// Why the daemon is about to end, until the coordinator has been told.
    leaving: Option<String>,
    /// When points are to be sent, if any wait.
    points_at: Option<Instant>,
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
        let grace = Duration::from_millis(SHUTDOWN_GRACE_MAX);
        if !self.is_idle_within(grace, &mut session).await {
            for runner in self.runners.values() {
                runner.tell(Command::Stop(muster_core::types::Millis(0)));
            }
            if !self.is_idle_within(KILLED_MAX, &mut session).await {
                warn!("some ranks were killed and are not gone; the kernel holds them");
            }
        }
        tokio::time::timeout(FLUSH_MAX, self.flush(&mut session)).await.ok();
        tokio::time::timeout(GOODBYE_MAX, self.say_goodbye(&mut session)).await.ok();
        keeping.abort();
        info!("worker stopped");
        refused.map_or(Ok(()), Err)
    }

    /// Goes on until nothing runs. False if something still does after `limit`.
    async fn is_idle_within(&mut self, limit: Duration, session: &mut mpsc::Receiver<Event>) -> bool {
        let turns = async {
            while !self.core.is_idle() {
                self.turn(session).await;
            }
        };
        tokio::time::timeout(limit, turns).await.is_ok()
    }

    /// Waits for one thing and deals with it. May be dropped while it waits: what it takes it deals with at once.
    async fn turn(&mut self, session: &mut mpsc::Receiver<Event>) {
        self.points_at = match self.points_at {
            _ if !self.outbox.has_unsent() => None,
            None => Some(Instant::now() + POINTS_INTERVAL),
            at => at,
        };
        // Reports go at once.
        let send_at = if self.unsent.is_empty() && self.leaving.is_none() {
            self.points_at
        } else {
            Some(Instant::now())
        };
        let bulk = self.link.as_ref().map(|link| link.queues.bulk.clone());
        let outbox = self.outbox.clone();
        tokio::select! {
            Some(observation) = self.observed.recv() => self.step(observation),
            Some(event) = session.recv() => self.on_session(event),
            // Only a coordinator that reads makes room; one that does not holds up nothing else here.
            room = room_from(send_at, bulk) => if let Some(message) = self.next_message() {
                room.send(request(message));
            },
            () = until(self.core.next_deadline()) => self.step(Input::Tick),
            // The next turn looks at it.
            () = outbox.added(), if self.points_at.is_none() => {}
        }
    }

    fn on_session(&mut self, event: Event) {
        match event {
            Event::Open { coordinator, hello, queues } => {
                let (name, incarnation) = (&self.identity.config.name, self.identity.incarnation.clone());
                let gangs = observed(&self.core);
                let reason = self.leaving_since_shutdown();
                let leaving = reason.map(|reason| v1::Leaving { reason });
                hello.send(v1::Hello { node_name: name.to_string(), incarnation, gangs, leaving }).ok();
                self.unsent.clear();
                self.leaving = None;
                // What the last session did not get acknowledged goes first: the coordinator passes over what is
                // older than what it has.
                self.outbox.rewind();
                self.link = Some(Link { coordinator, queues, subscriptions: Subscriptions::default() });
            }
            Event::Closed => self.link = None,
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
                    link.subscriptions.add(wanted, data_dir, live, link.queues.logs.clone());
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
        match &input {
            Input::Exited(gang, exit) => self.live.end(gang, exit.rank),
            Input::Gone(gang) | Input::Failed(gang, _) => {
                self.runners.remove(gang);
                self.live.remove(gang);
            }
            _ => {}
        }
        let mut effects: VecDeque<Effect> = self.core.step(boot_now(), input).into();
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Start(assignment) => {
                    let gang = assignment.gang.clone();
                    self.live.insert(gang.clone());
                    let runner = self.launcher.run(*assignment, self.context.clone(), self.events.clone());
                    self.runners.insert(gang, runner);
                }
                Effect::Launch(assignment, _) => {
                    if let Some(runner) = self.runners.get(&assignment.gang) {
                        runner.tell(Command::Launch(assignment));
                    }
                }
                Effect::Fence(..) | Effect::Kill(_) => {}
                Effect::Leaving(reason) => self.leaving = Some(reason),
                Effect::Stop(gang, stop) => {
                    if let Some(runner) = self.runners.get(&gang) {
                        runner.tell(Command::Stop(stop.grace));
                    }
                }
                Effect::Release(gang) => self.outbox.end(&gang),
                Effect::Report(gang) => _ = self.unsent.insert(gang),
            }
        }
    }

    /// What is to be sent next: reports, before points. But the last points of a rank go ahead of the report that
    /// it has ended, so that the coordinator has the whole curve when it ends the job.
    fn next_message(&mut self) -> Option<Up> {
        if let Some(reason) = self.leaving.take() {
            return Some(Up::Leaving(v1::Leaving { reason }));
        }
        let mut first = None;
        for gang in self.unsent.clone() {
            let Some(report) = self.core.report(&gang) else {
                self.unsent.remove(&gang);
                continue;
            };
            match report.exits.iter().find(|exit| self.outbox.has_unsent_of(&gang, exit.rank)) {
                None => {
                    self.unsent.remove(&gang);
                    return Some(Up::Gang(convert::gang_report_to_wire(&report)));
                }
                Some(exit) => first = first.or(Some((gang, exit.rank))),
            }
        }
        let batch = match first {
            Some((gang, rank)) => self.outbox.next_batch_of(&gang, rank),
            None => self.outbox.next_batch(),
        };
        batch.map(Up::Points)
    }

    fn leaving_since_shutdown(&self) -> Option<String> {
        self.core.is_stopping().then(|| "its daemon is being stopped".to_owned())
    }

    /// Waits until the coordinator has the last reports and points.
    async fn flush(&mut self, session: &mut mpsc::Receiver<Event>) {
        while self.link.is_some() && !(self.unsent.is_empty() && self.outbox.is_empty()) {
            self.turn(session).await;
        }
    }

    async fn say_goodbye(&mut self, session: &mut mpsc::Receiver<Event>) {
        let Some(link) = self.link.take() else { return };
        let goodbye = v1::Goodbye { reason: "the daemon was stopped".to_owned() };
        link.queues.bulk.send(request(Up::Goodbye(goodbye))).await.ok();
        // The coordinator ends the stream once it has heard it.
        while !matches!(session.recv().await, Some(Event::Closed) | None) {}
    }
}

/// Every report, for a Hello. The first exit of a gang is the likeliest cause of its end; the others give up
/// their output first if all of it would not fit a message.
fn observed(core: &Core) -> Vec<v1::GangReport> {
    let mut gangs: Vec<_> = core.reports().iter().map(convert::gang_report_to_wire).collect();
    let mut room = HELLO_TAILS_BYTES_MAX;
    let mut fit = |exit: &mut v1::RankExit| match room.checked_sub(exit.stderr_tail.len()) {
        Some(left) => room = left,
        None => exit.stderr_tail.clear(),
    };
    gangs.iter_mut().filter_map(|gang| gang.exits.first_mut()).for_each(&mut fit);
    gangs.iter_mut().flat_map(|gang| gang.exits.iter_mut().skip(1)).for_each(&mut fit);
    gangs
}

/// Waits for a time on the node's clock; for ever without one.
async fn until(at: Option<Millis>) {
    match at {
        Some(at) => tokio::time::sleep(Duration::from_millis(at.since(boot_now()).0)).await,
        None => std::future::pending().await,
    }
}

/// Room in the queue, from a time on; never without a time or a queue.
async fn room_from(
    at: Option<Instant>,
    queue: Option<mpsc::Sender<v1::SessionRequest>>,
) -> mpsc::OwnedPermit<v1::SessionRequest> {
    if let (Some(at), Some(queue)) = (at, queue) {
        tokio::time::sleep_until(at).await;
        if let Ok(room) = queue.reserve_owned().await {
            return room;
        }
        // The session has broken; news of that is on its way.
    }
    std::future::pending().await
}
