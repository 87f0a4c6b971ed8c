//! The shim's process.

mod launching;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use muster_core::types::{Assignment, Millis, StopMode};
use muster_worker_core::Fence;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::Signal;
use nix::unistd::setsid;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, warn};

use launching::dump;

use super::control::{Event, Shown, listen};
use super::progress::Progress;
use super::protocol::{Command, PROTOCOL, Phase, State};
use super::ranks::{Ended, Ranks};
use super::record::{Order, Record, StateDir, this_process};
use super::rendezvous::Rendezvous;
use crate::clock::boot_now;
use crate::launch::cgroup::GangCgroup;
use crate::launch::environment::SHIM_DIR;
use crate::launch::prepare::{self, Prepared};
use crate::launch::timer::Timer;
use crate::telemetry::{Changes, Sockets};

/// What a daemon said that may wait here.
const EVENTS_MAX: usize = 16;
/// Time for the daemon that started this process to speak to it.
const CONNECT_MAX: Millis = Millis::from_secs(30);
/// Time after SIGKILL at which what is left is called killed: the kernel holds it, and it runs no more.
const KILLED_AFTER: Millis = Millis::from_secs(10);
/// Time to describe what hangs, before it is asked to end.
const DUMP_MAX: Millis = Millis::from_secs(6);
/// Time between attempts to kill what is left: at first, and once the kernel is found to hold it.
const KILL_INTERVAL: (Millis, Millis) = (Millis(20), Millis(1000));

/// Runs the shim whose state directory is in the environment, to its end. Must be called on a thread that lasts as
/// long as the process.
pub fn main() -> ExitCode {
    let Some(dir) = std::env::var_os(SHIM_DIR) else {
        let why = format!("this command is for the node daemon, which starts it with {SHIM_DIR} set\n");
        // Nobody may be there to read it.
        io::stderr().write_all(why.as_bytes()).ok();
        return ExitCode::from(2);
    };
    match run(Path::new(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(%error, "the shim failed");
            ExitCode::FAILURE
        }
    }
}

fn run(dir: &Path) -> io::Result<()> {
    // Away from the daemon's terminal. It is no group's leader, as whoever forks is not.
    setsid().ok();
    set_child_subreaper(true)?;
    let dir = StateDir::open(dir)?;
    let order = dir.order()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(serve(dir, order));
    // A file server that does not answer holds up nothing here.
    runtime.shutdown_background();
    result
}

/// Something that happened.
enum Woken {
    Clock,
    Children,
    Control(Event),
    Prepared(Result<Result<Prepared, String>, JoinError>),
    Rank(Ended),
    /// It was written down what the ranks do that hang.
    Dumped,
    /// Somebody asks this process to end.
    Asked,
}

async fn serve(dir: StateDir, order: Order) -> io::Result<()> {
    // Listened to, so that they do not end this process; ranks get them as they were.
    let [mut children, mut asked, _hangup, _interrupt] =
        [SignalKind::child(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()]
            .map(signal);
    let (children, asked) =
        (children.as_mut().map_err(|error| error.kind())?, asked.as_mut().map_err(|error| error.kind())?);
    let (events, mut heard) = mpsc::channel(EVENTS_MAX);
    let mut timer = Timer::new()?;
    let (mut shim, shown) = Shim::new(dir, order)?;
    let listener = UnixListener::bind(shim.dir.socket())?;
    let _listening = AbortOnDropHandle::new(tokio::spawn(listen(listener, shown, events)));
    shim.dir.write_record(&shim.record)?;
    let order = shim.record.order.clone();
    let port = shim.record.order.attached.as_ref().map_or(0, |attached| attached.store_port);
    let mut preparing = Some(tokio::task::spawn_blocking(move || prepare::prepare(&order, port)));
    loop {
        shim.look();
        if shim.is_over() {
            return shim.end();
        }
        let deadline = shim.deadline();
        let woken = tokio::select! {
            biased;
            result = timer.at(deadline) => { result?; Woken::Clock }
            _ = children.recv() => Woken::Children,
            ended = shim.ranks.ended_or_drained() => Woken::Rank(ended),
            () = looked(&mut shim.progress) => Woken::Clock,
            prepared = finished(&mut preparing) => Woken::Prepared(prepared),
            _ = finished(&mut shim.dumping) => Woken::Dumped,
            _ = asked.recv() => Woken::Asked,
            Some(event) = heard.recv() => Woken::Control(event),
        };
        // This process may have been stopped for long. Before it takes what came meanwhile, it looks whether the
        // ranks may still run.
        shim.look();
        shim.wake(woken);
    }
}

async fn looked(progress: &mut Option<Progress>) {
    match progress {
        Some(progress) => progress.looked().await,
        None => std::future::pending().await,
    }
}

async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match task {
        Some(running) => {
            let result = running.await;
            *task = None;
            result
        }
        None => std::future::pending().await,
    }
}

struct Shim {
    dir: StateDir,
    record: Record,
    state: watch::Sender<State>,
    sockets: Sockets,
    ranks: Ranks,
    changes: Changes,
    progress: Option<Progress>,
    rendezvous: Option<Rendezvous>,
    prepared: Option<Prepared>,
    /// What is to be launched once it is prepared.
    launch: Option<(Box<Assignment>, Option<Fence>)>,
    fence: Option<Fence>,
    /// When the grace of the ranks ends.
    kill_at: Option<Millis>,
    /// What hangs is being described.
    dumping: Option<JoinHandle<()>>,
    /// Since when everything is being killed, and when that is tried again.
    killing: Option<(Millis, Millis)>,
    /// Not every rank could be started: the others are killed, and how they end does not matter.
    failed: bool,
    /// The open connection.
    daemon: Option<u64>,
    /// Until when the first one may take.
    connect_by: Option<Millis>,
    released: bool,
}

impl Shim {
    fn new(dir: StateDir, order: Order) -> io::Result<(Self, Shown)> {
        let changes = Changes::default();
        let for_others = order.assignment.spec.run_as.is_some() || order.run_as.is_some();
        let sockets = Sockets::new(dir.path(), for_others, changes.clone())?;
        let process = this_process(crate::devices::boot_id(Path::new("/")))?;
        let (state, shown) = watch::channel(State { pid: process.pid, ..State::default() });
        let record = Record {
            protocol: PROTOCOL,
            process,
            order,
            master_port: None,
            launched: false,
            sockets: sockets.dir().to_owned(),
            cgroup: None,
        };
        let shim = Self {
            dir,
            ranks: Ranks::new(&record.order.assignment),
            record,
            state,
            sockets,
            changes: changes.clone(),
            progress: None,
            rendezvous: None,
            prepared: None,
            launch: None,
            fence: None,
            kill_at: None,
            dumping: None,
            killing: None,
            failed: false,
            daemon: None,
            connect_by: Some(boot_now().plus(CONNECT_MAX)),
            released: false,
        };
        Ok((shim, Shown { state: shown, changes }))
    }

    fn wake(&mut self, woken: Woken) {
        match woken {
            Woken::Rank(Ended::Exit(exit)) if !self.failed => self.state.send_modify(|state| {
                state.exits.push(exit);
                state.draining = !self.ranks.are_drained();
            }),
            Woken::Rank(Ended::Drained) if self.ranks.are_drained() => {
                self.state.send_if_modified(|state| std::mem::take(&mut state.draining));
            }
            // What is due is done at each look.
            Woken::Clock | Woken::Children | Woken::Rank(_) => {}
            // A rank that hangs writes its own stacks at SIGABRT, if it is a Python program.
            Woken::Dumped => self.ranks.signal(Signal::SIGABRT),
            Woken::Prepared(prepared) => {
                self.prepared(prepared.unwrap_or_else(|error| Err(format!("failed to prepare: {error}"))));
            }
            Woken::Asked => {
                warn!("this shim was asked to end, and ends its ranks");
                let spec = &self.record.order.assignment.spec;
                self.stop(StopMode { signal: spec.stop_signal, grace: spec.stop_grace, dump_stacks: false });
            }
            Woken::Control(Event::Connected(number)) => {
                // One that never launched anything serves only the daemon that started it.
                self.released |= number > 1 && !self.record.launched;
                (self.daemon, self.connect_by) = (Some(number), None);
            }
            Woken::Control(Event::Closed(number)) => {
                if self.daemon == Some(number) {
                    self.daemon = None;
                    self.released |= !self.record.launched;
                    // Whoever ran the command has gone, and no other will ask for these ranks.
                    if self.record.order.attached.is_some() {
                        self.kill_at = Some(boot_now());
                    }
                }
            }
            Woken::Control(Event::Said(command)) => self.follow(command),
        }
    }

    fn follow(&mut self, command: Command) {
        match command {
            Command::Launch { assignment, fence } => {
                if self.phase() < Phase::Running && !self.record.launched {
                    self.launch = Some((assignment, fence));
                    self.launch_if_prepared();
                }
            }
            Command::Stop(stop) => self.stop(stop),
            Command::Fence(fence) => self.set_fence(Some(fence)),
            Command::Release => self.released |= self.phase() == Phase::Stopped,
        }
    }

    fn phase(&self) -> Phase {
        self.state.borrow().phase
    }

    /// Not worth telling: whoever connects hears the last.
    fn set_fence(&mut self, fence: Option<Fence>) {
        // What has begun to end is not taken back.
        if self.state.borrow().fenced {
            return;
        }
        self.fence = fence;
        self.state.send_if_modified(|state| {
            state.fence = fence;
            false
        });
    }

    fn stop(&mut self, stop: StopMode) {
        if !self.record.launched {
            self.launch = None;
            self.state.send_modify(|state| state.phase = Phase::Stopped);
            return;
        }
        let mut at = boot_now().plus(stop.grace);
        if stop.dump_stacks && self.kill_at.is_none() {
            // They are asked to end once it is written down what they do.
            at = at.plus(DUMP_MAX);
            if let Some(store) = self.prepared.as_ref().and_then(|prepared| prepared.store.as_ref()) {
                store.log_waits();
            }
            let hung = self.ranks.hung();
            self.dumping = Some(tokio::task::spawn_blocking(move || dump(&hung)));
        } else if self.dumping.is_none() {
            self.ranks.signal(Signal::try_from(stop.signal as i32).unwrap_or(Signal::SIGTERM));
        }
        // It may be hastened, and not put off.
        self.kill_at = Some(self.kill_at.map_or(at, |before| before.min(at)));
    }

    /// Does what is due.
    fn look(&mut self) {
        if !self.record.launched || self.phase() == Phase::Stopped {
            return;
        }
        self.ranks.reap();
        let now = boot_now();
        if let Some(fence) = self.fence
            && now >= fence.term
            && !self.state.borrow().fenced
        {
            warn!("the node's lease ends, and with it its ranks");
            self.state.send_modify(|state| state.fenced = true);
            self.ranks.signal(Signal::SIGTERM);
        }
        self.look_for_progress(now);
        self.look_at_store(now);
        let ends = [self.fence.map(|fence| fence.kill), self.kill_at];
        let is_due = self.ranks.have_ended() || ends.into_iter().flatten().any(|at| now >= at);
        if !self.ranks.are_gone() && (is_due || self.killing.is_some()) {
            let (since, again) = self.killing.unwrap_or((now, now));
            let is_held = now.since(since) >= KILLED_AFTER;
            if now >= again {
                self.ranks.kill();
                let pause = if is_held { KILL_INTERVAL.1 } else { KILL_INTERVAL.0 };
                self.killing = Some((since, now.plus(pause)));
                self.ranks.reap();
            }
            if is_held {
                let held = self.ranks.held();
                self.state
                    .send_if_modified(|state| std::mem::replace(&mut state.killed, held) != state.killed);
            }
        }
        if self.ranks.are_gone() && self.ranks.are_told() {
            self.state.send_modify(|state| {
                state.phase = Phase::Stopped;
                state.killed.clear();
            });
        }
    }

    fn look_for_progress(&mut self, now: Millis) {
        // What is told to end need not go on.
        let Some(progress) = self.progress.as_mut().filter(|_| self.kill_at.is_none()) else { return };
        progress.look(now);
        let quiet = progress.quiet(&self.changes, |rank| self.ranks.pid_of(rank));
        self.state.send_if_modified(|state| {
            let is_news = state.quiet.is_empty() != quiet.is_empty();
            if is_news {
                state.quiet = quiet;
            }
            is_news
        });
    }

    /// When something is due next.
    fn deadline(&self) -> Option<Millis> {
        if !self.record.launched || self.phase() == Phase::Stopped || self.ranks.are_gone() {
            return self.connect_by;
        }
        if let Some((_, again)) = self.killing {
            return Some(again);
        }
        let term = self.fence.filter(|_| !self.state.borrow().fenced).map(|fence| fence.term);
        let kill = self.fence.map(|fence| fence.kill);
        let progress = self.progress.as_ref().filter(|_| self.kill_at.is_none()).map(Progress::deadline);
        let rendezvous =
            self.rendezvous.as_ref().filter(|_| self.kill_at.is_none()).map(Rendezvous::deadline);
        [term, kill, self.kill_at, progress, rendezvous].into_iter().flatten().min()
    }

    fn is_over(&self) -> bool {
        match self.connect_by {
            // Its daemon may be about to hear why nothing can run here.
            Some(by) => boot_now() >= by,
            // What ranks have left is on the disk before whoever reads it there is gone.
            None if !self.ranks.are_drained() => false,
            None => self.released || (self.phase() == Phase::Stopped && self.daemon.is_none()),
        }
    }

    fn end(self) -> io::Result<()> {
        if let Some(Err(error)) = self.record.cgroup.as_ref().map(GangCgroup::remove_soon) {
            warn!(%error, "control groups are left behind");
        }
        if let Some(attached) = self.record.order.attached.as_ref().filter(|_| self.daemon.is_none()) {
            // The command has gone, and nobody is left to do it. Sockets may lie elsewhere.
            self.dir.remove();
            let removed = std::fs::remove_dir_all(&attached.scratch);
            return removed
                .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) });
        }
        if self.released || !self.record.launched {
            self.dir.remove();
            return Ok(());
        }
        // For the next daemon.
        let state = self.state.borrow().clone();
        self.dir.write_last_state(&state)
    }
}
