//! A daemon's side of one shim: started, spoken to, and cleaned up after when it is dead.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use muster_core::types::{Assignment, GangId, Rank, Surroundings, UserName};
use muster_worker_core::{Adopted, Fence, Input, ShimRecord};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use super::protocol::{Command, Lines, News, Phase, State, send};
use super::record::{Order, Record, StateDir, is_running, kill};
use super::told::Told;
use crate::attached::Attached;
use crate::data_dir::private_file;
use crate::launch::environment::{SHIM_DIR, SHIM_LOG};
use crate::launch::prepare::{gang_log_dir, make_log_dir};
use crate::launch::sweep;
use crate::telemetry::Outbox;

/// Commands that may wait for a shim: launch, a few stops, release.
const COMMANDS_MAX: usize = 8;
/// Time for a shim to start.
const START_MAX: Duration = Duration::from_secs(30);
/// Time between looks whether it has: a few of them, for it takes a few milliseconds.
const START_POLL: Duration = Duration::from_millis(1);
/// Time between looks whether a dead one's ranks are gone.
const POLL: Duration = Duration::from_millis(5);
/// Time after SIGKILL at which what is left is called killed, and the time between attempts from then on.
const KILLED_AFTER: Duration = Duration::from_secs(10);
const KILL_INTERVAL: Duration = Duration::from_secs(1);
/// Time for one attempt to kill what a dead shim has left.
const SWEEP_MAX: Duration = Duration::from_secs(1);
/// Time for a shim to say where it is. One that does not is frozen, and is killed.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Time for a released shim to end.
const RELEASE_MAX: Duration = Duration::from_secs(5);

/// What the daemon has for all its shims.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub data_dir: PathBuf,
    pub data_id: String,
    pub boot_id: String,
    /// What is run as a shim.
    pub command: Vec<OsString>,
    pub attached: Option<Attached>,
    /// As whom ranks run of which the job does not say it.
    pub run_as: Option<UserName>,
    pub outbox: Outbox,
}

/// The daemon's end of one shim. Dropped, it leaves the shim alone.
#[derive(Debug)]
pub(crate) struct Shim {
    commands: mpsc::Sender<Command>,
    fence: watch::Sender<Option<Fence>>,
    kill: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Shim {
    /// Starts a shim. Everything it observes goes to `events`, at last [`Input::Gone`] or [`Input::Failed`].
    pub fn start(
        assignment: Assignment,
        surroundings: Box<Surroundings>,
        context: Context,
        events: mpsc::Sender<Input>,
    ) -> Self {
        #[cfg(feature = "simulation")]
        if turmoil::in_simulation() {
            return Self::with(|ends| crate::simulation::follow(assignment, ends, context.data_id, events));
        }
        Self::with(|ends| async move {
            let gang = assignment.gang.clone();
            match begin(assignment, surroundings, &context).await {
                Ok(link) => follow(link, ends, Told::default(), &context, &events).await,
                Err(why) => _ = events.send(Input::Failed(gang, why)).await,
            }
        })
    }

    /// Goes on with one that was found, of which the core knows what its record and its state say.
    pub fn adopt(link: Link, context: Context, events: mpsc::Sender<Input>) -> Self {
        let told = Told::adopted(&link.state);
        Self::with(|ends| async move { follow(link, ends, told, &context, &events).await })
    }

    fn with<F: Future<Output = ()> + Send + 'static>(task: impl FnOnce(Ends) -> F) -> Self {
        let (commands, queue) = mpsc::channel(COMMANDS_MAX);
        let (fence, fences) = watch::channel(None);
        let kill = CancellationToken::new();
        let ends = Ends { commands: queue, fence: fences, kill: kill.clone() };
        Self { commands, fence, kill, task: AbortOnDropHandle::new(tokio::spawn(task(ends))) }
    }

    /// Tells it something. What does not fit is for one that takes nothing, which will be killed.
    pub fn tell(&self, command: Command) {
        self.commands.try_send(command).ok();
    }

    /// Tells it until when its ranks may run; only the last such word matters.
    pub fn fence(&self, fence: Fence) {
        self.fence.send_replace(Some(fence));
    }

    /// Kills it, because it does not follow. Its ranks die with it, and what they leave is looked for.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    /// Lets it go, with what is kept of it. Returns when that is done.
    pub async fn release(self) {
        self.tell(Command::Release);
        self.task.await.ok();
    }
}

/// What the task of a shim gets from its [`Shim`].
pub(crate) struct Ends {
    pub commands: mpsc::Receiver<Command>,
    pub fence: watch::Receiver<Option<Fence>>,
    pub kill: CancellationToken,
}

/// A shim as its files show it, with a connection if it lives.
#[derive(Debug)]
pub(crate) struct Link {
    pub dir: StateDir,
    pub record: Record,
    /// The last that is known.
    pub state: State,
    pub stream: Option<(Lines, OwnedWriteHalf)>,
}

impl Link {
    pub fn gang(&self) -> &GangId {
        &self.record.order.assignment.gang
    }

    /// What the core is told of it when it was found.
    pub fn adopted(&self) -> Adopted {
        Adopted {
            assignment: self.record.order.assignment.clone(),
            master_port: self.record.master_port,
            launched: true,
            exits: self.state.exits.clone(),
            // The lease that a dead one knew of says nothing.
            fence: self.state.fence.filter(|_| self.stream.is_some()),
            surroundings: self.record.order.surroundings.clone(),
        }
    }
}

/// Connects to a shim that runs, and hears its state. None if it does not run or does not answer.
pub(super) async fn reconnect(
    dir: &StateDir,
    process: &ShimRecord,
    boot_id: &str,
) -> Option<(State, (Lines, OwnedWriteHalf))> {
    let answer = async {
        while is_running(process, boot_id) {
            if let Ok((mut lines, writer)) = connect(dir).await {
                while let Some(news) = lines.next().await {
                    if let News::State(state) = news {
                        return Some((state, (lines, writer)));
                    }
                }
            }
            tokio::time::sleep(POLL).await;
        }
        None
    };
    tokio::time::timeout(ANSWER_MAX, answer).await.ok().flatten()
}

async fn connect(dir: &StateDir) -> io::Result<(Lines, OwnedWriteHalf)> {
    let (reader, writer) = UnixStream::connect(dir.socket()).await?.into_split();
    Ok((Lines::new(reader), writer))
}

async fn begin(
    assignment: Assignment,
    surroundings: Box<Surroundings>,
    context: &Context,
) -> Result<Link, String> {
    let (data_dir, data_id) = (context.data_dir.clone(), context.data_id.clone());
    let assignment = match &context.attached {
        Some(attached) => attached.own(assignment),
        None => assignment,
    };
    let attached = context.attached.clone();
    let (surroundings, run_as) = (Some(surroundings), context.run_as.clone());
    let order = Order { assignment, data_dir, data_id, attached, surroundings, run_as };
    let log = gang_log_dir(&order.data_dir, &order.assignment.gang).join("shim.log");
    let command = context.command.clone();
    let outbox = context.outbox.clone();
    let spawning = tokio::task::spawn_blocking(move || spawn(&order, &command, &outbox));
    let (dir, mut child) = spawning.await.map_err(|error| format!("failed to start a shim: {error}"))??;
    let deadline = Instant::now() + START_MAX;
    loop {
        if let Ok(record) = dir.record() {
            let stream =
                connect(&dir).await.map_err(|error| format!("failed to speak to a shim: {error}"))?;
            return Ok(Link { dir, record, state: State::default(), stream: Some(stream) });
        }
        if let Ok(Some(status)) = child.try_wait() {
            dir.remove();
            return Err(format!(
                "the gang's shim could not start: {status}; see {} on this node",
                log.display()
            ));
        }
        if Instant::now() > deadline {
            child.kill().await.ok();
            dir.remove();
            return Err(format!("the gang's shim did not start; see {} on this node", log.display()));
        }
        tokio::time::sleep(START_POLL).await;
    }
}

fn spawn(
    order: &Order,
    command: &[OsString],
    outbox: &Outbox,
) -> Result<(StateDir, tokio::process::Child), String> {
    let gang = &order.assignment.gang;
    let log_dir = gang_log_dir(&order.data_dir, gang);
    make_log_dir(&log_dir)?;
    outbox.open(&order.assignment, &order.data_dir);
    let path = StateDir::path_of(&order.data_dir, gang);
    let dir = StateDir::create(&path).and_then(|dir| dir.write_order(order).map(|()| dir));
    let dir = dir.map_err(|error| format!("failed to make {}: {error}", path.display()))?;
    let failed = |error: io::Error| format!("failed to start a shim: {error}");
    let Some((program, args)) = command.split_first() else {
        return Err("no command for shims is set".to_owned());
    };
    let mut process = tokio::process::Command::new(program);
    process.args(args).env(SHIM_DIR, dir.path()).current_dir("/");
    let log = log_dir.join("shim.log");
    if order.attached.is_some() {
        // It hands on to the ranks what this process has; what it has to say itself goes to its log.
        process.env(SHIM_LOG, log);
    } else {
        let log = private_file().append(true).open(log).map_err(failed)?;
        process.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        // Systemd hears of the daemon from the daemon.
        process.env_remove(muster_monitor::NOTIFY_SOCKET);
    }
    let child = process.spawn();
    Ok((dir, child.map_err(failed)?))
}

/// Follows one shim to the end, until it is released.
async fn follow(
    mut link: Link,
    mut ends: Ends,
    mut told: Told,
    context: &Context,
    events: &mpsc::Sender<Input>,
) {
    let gang = link.gang().clone();
    context.outbox.open(&link.record.order.assignment, &context.data_dir);
    // What is known beyond what an adoption says.
    observe(&gang, &link.state, &mut told, context, events).await;
    let mut released = false;
    while let Some((mut lines, writer)) = link.stream.take() {
        let hear = async {
            while let Some(news) = lines.next().await {
                match news {
                    News::State(state) => {
                        observe(&gang, &state, &mut told, context, events).await;
                        link.state = state;
                    }
                    News::Points { ranks } => context.outbox.add(&gang, &ranks),
                }
            }
        };
        let kill = ends.kill.clone();
        released = tokio::select! {
            () = hear => false,
            () = tell(writer, &mut ends) => true,
            () = kill.cancelled() => false,
        };
        // Should it run without a connection, somebody else had connected.
        if !released
            && !kill.is_cancelled()
            && let Some((state, stream)) = reconnect(&link.dir, &link.record.process, &context.boot_id).await
        {
            observe(&gang, &state, &mut told, context, events).await;
            ends.fence.mark_changed();
            (link.state, link.stream) = (state, Some(stream));
        }
    }
    if !released {
        bury(&mut link, &mut told, context, events).await;
        loop {
            match ends.commands.recv().await {
                Some(Command::Release) => break,
                Some(_) => {}
                // The daemon ends, and leaves what it knows to the next.
                None => return,
            }
        }
    }
    let gone = async {
        while is_running(&link.record.process, &context.boot_id) {
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(RELEASE_MAX, gone).await.is_err() {
        warn!(%gang, "a shim that was released did not end and is killed");
        kill(&link.record.process, &context.boot_id);
    }
    link.dir.remove();
}

/// Passes on what the daemon says, until it releases the shim.
async fn tell(mut writer: OwnedWriteHalf, ends: &mut Ends) {
    loop {
        let command = tokio::select! {
            biased;
            command = ends.commands.recv() => command,
            Ok(()) = ends.fence.changed() => {
                let fence = *ends.fence.borrow_and_update();
                fence.map(Command::Fence)
            }
        };
        let Some(command) = command else { return std::future::pending().await };
        // If it cannot be said, the shim is dead, which shows where it is listened to.
        send(&mut writer, &command).await.ok();
        if matches!(command, Command::Release) {
            return;
        }
    }
}

async fn observe(
    gang: &GangId,
    state: &State,
    told: &mut Told,
    context: &Context,
    events: &mpsc::Sender<Input>,
) {
    context.outbox.set_draining(gang, state.draining);
    for input in told.inputs(gang, state) {
        if let Input::Exited(_, exit) = &input {
            // What the rank has reported is in its file, or comes there.
            context.outbox.add(gang, &[exit.rank]);
        }
        events.send(input).await.ok();
    }
}

/// Makes sure that a shim and everything it started are gone, and tells their end.
async fn bury(link: &mut Link, told: &mut Told, context: &Context, events: &mpsc::Sender<Input>) {
    let gang = link.gang().clone();
    let (mark, began) = (link.record.order.mark(), Instant::now());
    let ranks = link.record.order.assignment.placement.clone();
    let last = loop {
        if is_running(&link.record.process, &context.boot_id) {
            kill(&link.record.process, &context.boot_id);
        } else if let Ok(last) = link.dir.last_state() {
            break last;
        } else {
            let (mark, cgroup) = (mark.clone(), link.record.cgroup.clone());
            let sweep = move || {
                let gang = sweep::Gang { shim: None, mark: Some(&mark), cgroup: cgroup.as_ref() };
                let left = gang.kill_all(SWEEP_MAX);
                if let (true, Some(group)) = (left.is_empty(), &cgroup) {
                    group.remove_soon().ok();
                }
                left
            };
            let found = tokio::task::spawn_blocking(sweep).await;
            if found.is_ok_and(|found| found.is_empty()) {
                let error = if link.record.process.boot_id == context.boot_id {
                    "its shim was killed"
                } else {
                    "the node was restarted"
                };
                let error = link.state.error.take().or_else(|| Some(error.to_owned()));
                let (killed, draining) = (Vec::new(), false);
                break State { phase: Phase::Stopped, error, killed, draining, ..link.state.clone() };
            }
        }
        let is_held = began.elapsed() > KILLED_AFTER;
        if is_held && link.state.killed.is_empty() {
            link.state.killed = (0..ranks.procs).map(|local| Rank(ranks.first_rank.0 + local)).collect();
            observe(&gang, &link.state, told, context, events).await;
        }
        tokio::time::sleep(if is_held { KILL_INTERVAL } else { POLL }).await;
    };
    info!(%gang, error = last.error, "a shim is gone, and its ranks with it");
    // Should this daemon die too, the next one knows what this one did.
    if let Err(error) = link.dir.write_last_state(&last) {
        warn!(%gang, %error, "the end of a gang could not be noted");
    }
    observe(&gang, &last, told, context, events).await;
    link.state = last;
}
