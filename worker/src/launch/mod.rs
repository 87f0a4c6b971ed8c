//! The only module that starts, signals and reaps processes.
//!
//! One process per rank, each in a session of its own, so that a signal reaches a rank and everything it
//! started. Ranks die with the thread that started them (PR_SET_PDEATHSIG), which is why that thread is one
//! that lives as long as the daemon.

mod environment;
mod prepare;
mod process;
mod runner;

use muster_core::types::{Assignment, GangId, Millis};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub(crate) use prepare::log_dir;
pub(crate) use runner::Context;

use crate::Error;
use muster_worker_core::Input;

/// Commands that may wait for a runner: one to launch and one to stop.
const COMMANDS_MAX: usize = 4;

/// The thread on which every rank is started and reaped.
#[derive(Debug)]
pub(crate) struct Launcher {
    runtime: tokio::runtime::Handle,
    stop: CancellationToken,
}

/// What a runner is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Launch the ranks.
    Launch(Box<Assignment>),
    /// SIGTERM, this grace, SIGKILL.
    Stop(Millis),
}

/// The daemon's end of one gang's runner.
#[derive(Debug)]
pub(crate) struct Runner(mpsc::Sender<Command>);

impl Runner {
    /// Passes a command on. A runner that has ended has nothing left to launch or stop.
    pub fn tell(&self, command: Command) {
        self.0.try_send(command).ok();
    }
}

impl Launcher {
    /// Starts the thread. It lasts until the launcher is dropped, and no rank outlives it.
    pub fn start() -> Result<Self, Error> {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name("launcher".to_owned())
            .spawn(move || runtime.block_on(stopped.cancelled()))
            .map_err(Error::Thread)?;
        Ok(Self { runtime: handle, stop })
    }

    /// Runs one gang's part: prepares at once, then follows commands. Everything it observes goes to `events`,
    /// at last [`Input::Gone`] or [`Input::Failed`].
    pub fn run(&self, assignment: Assignment, context: Context, events: mpsc::Sender<Input>) -> Runner {
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let gang: GangId = assignment.gang.clone();
        self.runtime.spawn(async move {
            let last = match runner::run(assignment, context, commands, &events).await {
                Ok(()) => Input::Gone(gang),
                Err(why) => Input::Failed(gang, why),
            };
            // The daemon only closes this channel when it ends.
            events.send(last).await.ok();
        });
        Runner(sender)
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
