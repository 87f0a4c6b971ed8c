//! The ranks of one gang as their shim holds them: started, signalled, and waited for with all that they left.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use muster_core::types::{Assignment, Rank, RankExit};
use nix::sys::signal::Signal;
use rustix::process::{WaitOptions, WaitStatus};
use tokio::task::{JoinHandle, JoinSet};
use tracing::info;

use super::record::Order;
use crate::attached::Output;
use crate::clock::unix_now;
use crate::launch::cgroup::GangCgroup;
use crate::launch::environment::{self, RankContext};
use crate::launch::oom::{self, Counts, OutOfMemory};
use crate::launch::prepare::{Prepared, make_log_dir, start_dir};
use crate::launch::process::{self, Program, RankProcess};
use crate::launch::procfs::Process;
use crate::launch::{env_files, error_file, sweep};
use crate::telemetry::{Followed, Follower, Looker, RankSocket, Sockets};

/// What a rank has left of its reasons.
#[derive(Debug, Default)]
struct Words {
    stderr_tail: String,
    error: Option<String>,
}

/// What comes of a rank's end.
#[derive(Debug)]
pub(super) enum Ended {
    /// How it ended.
    Exit(RankExit),
    /// The points that it has left are read.
    Drained,
}

/// Every process of the gang is a descendant of this one, also one whose parents have ended: this process is their
/// subreaper. So the gang is gone when this process has no child.
#[derive(Debug)]
pub(super) struct Ranks {
    pub all: Vec<Rank>,
    /// By process id.
    running: BTreeMap<i32, Running>,
    /// Those that have ended, in that order, while the last of their output is read.
    ending: VecDeque<(RankExit, JoinHandle<Words>)>,
    /// What reads the points that they have left. The news of their end does not wait for it.
    draining: JoinSet<()>,
    /// No process of theirs was left when they were last reaped.
    are_gone: bool,
    /// Whether they were told to end, so that SIGKILL is no riddle.
    told: bool,
    cgroup: Option<GangCgroup>,
    /// What looks for points that do not come through the sockets, if the job asks for it.
    follower: Option<Follower>,
}

/// A rank that runs.
#[derive(Debug)]
struct Running {
    process: RankProcess,
    socket: RankSocket,
    output: Output,
    local_rank: u32,
    /// What the kernel had killed for want of memory before it was started.
    before: Counts,
}

impl Running {
    fn followed(&self) -> Followed {
        let stdout = self.output.stdout_file().map(Path::to_owned);
        Followed { pid: self.process.pid, source: self.socket.source().clone(), stdout }
    }
}

impl Ranks {
    /// The ranks of a gang, none of them started.
    pub fn new(assignment: &Assignment) -> Self {
        let first = assignment.placement.first_rank.0;
        let all = (first..first + assignment.placement.procs).map(Rank).collect();
        Self {
            all,
            running: BTreeMap::new(),
            ending: VecDeque::new(),
            draining: JoinSet::new(),
            are_gone: true,
            told: false,
            cgroup: None,
            follower: None,
        }
    }

    /// Starts every rank. On an error those before it are left running.
    pub fn start(
        &mut self,
        order: &Order,
        prepared: &Prepared,
        sockets: &Sockets,
        port: u16,
        cgroup: Option<GangCgroup>,
    ) -> Result<(), String> {
        self.cgroup = cgroup;
        self.are_gone = false;
        let assignment = &order.assignment;
        let mark = order.mark();
        let command = order.command();
        let from_files = env_files::read(&assignment.spec, prepared.user.as_deref())?;
        for (rank, log_dir) in self.all.iter().zip(&prepared.log_dirs) {
            let local_rank = rank.0 - assignment.placement.first_rank.0;
            let socket = sockets.open(*rank, log_dir, prepared.user.as_deref());
            let socket = socket.map_err(|error| format!("failed to make a telemetry socket: {error}"))?;
            let output = order.output(local_rank, log_dir);
            if order.attached.is_some() {
                make_log_dir(output.error_file.parent().unwrap_or(log_dir))?;
            }
            let context = RankContext {
                error_file: &output.error_file,
                telemetry: socket.path(),
                mark: &mark,
                attached: order.attached.as_ref(),
                surroundings: order.surroundings.as_deref(),
                user: prepared.user.as_deref(),
                from_files: &from_files,
            };
            let env = environment::of_rank(assignment, local_rank, port, context, std::env::vars_os());
            let working_dir = start_dir(order, log_dir, prepared.user.as_deref());
            let program = Program {
                path: &prepared.program,
                command: &command,
                working_dir: &working_dir,
                user: prepared.user.as_deref(),
            };
            let entrance = self.cgroup.as_ref().map(|group| group.entrance(local_rank)).transpose();
            let entrance = entrance.map_err(|error| format!("failed to open a control group: {error}"))?;
            let before = Counts::now(self.cgroup.as_ref().map(|group| (group, local_rank)));
            let cpus = order.cpus_of(local_rank);
            let process = process::start(*rank, program, &output, env, entrance.as_ref(), cpus.as_ref())?;
            self.running.insert(process.pid, Running { process, socket, output, local_rank, before });
        }
        let followed: Vec<Followed> = self.running.values().map(Running::followed).collect();
        let looker =
            Looker::new(assignment.spec.metric_pattern.as_deref(), prepared.events.clone(), &followed);
        self.follower = looker.map(|looker| sockets.follow(looker));
        Ok(())
    }

    pub fn signal(&mut self, signal: Signal) {
        self.told = true;
        for running in self.running.values() {
            running.process.signal(signal);
        }
    }

    /// The processes of the ranks that run, and where their standard error goes.
    pub fn hung(&self) -> Vec<(Rank, i32, PathBuf)> {
        let of = |running: &Running| {
            let stderr = running.output.stderr_file()?.to_owned();
            Some((running.process.rank, running.process.pid, stderr))
        };
        self.running.values().filter_map(of).collect()
    }

    /// Kills everything there is. What is forked meanwhile takes another time.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        sweep::Gang { shim: Process::this(), mark: None, cgroup: self.cgroup.as_ref() }.kill();
    }

    /// Takes note of every child that has ended, and of whether anything is left.
    pub fn reap(&mut self) {
        // Nobody comes back.
        while !self.are_gone {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.ended(pid.as_raw_nonzero().get(), status),
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return,
                // That there is no child. Others may have been moved into the groups.
                Err(_) => return self.are_gone = self.cgroup.as_ref().is_none_or(GangCgroup::is_empty),
            }
        }
    }

    fn ended(&mut self, pid: i32, status: WaitStatus) {
        // Other children are what ranks have left behind.
        let Some(Running { process, socket, output, local_rank, before }) = self.running.remove(&pid) else {
            return;
        };
        process.signal(Signal::SIGKILL);
        let (code, signal) = (status.exit_status(), status.terminating_signal());
        info!(rank = process.rank.0, code, signal, "rank ended");
        let after = Counts::now(self.cgroup.as_ref().map(|group| (group, local_rank)));
        let memory = oom::judge(before, after, code, signal, self.told);
        let exit = RankExit {
            rank: process.rank,
            code: if signal.is_some() { None } else { Some(code.unwrap_or(-1)) },
            signal,
            time: unix_now(),
            stderr_tail: String::new(),
            out_of_memory: memory != OutOfMemory::No,
            error: None,
        };
        let (rank, follower) = (process.rank, self.follower.clone());
        self.draining.spawn(async move {
            socket.drain().await;
            if let Some(follower) = follower {
                follower.drain(rank).await;
            }
        });
        let read = tokio::task::spawn_blocking(move || Words {
            stderr_tail: output.stderr_file().and_then(|path| process::tail(path).ok()).unwrap_or_default(),
            error: error_file::message(&output.error_file),
        });
        self.ending.push_back((exit, read));
    }

    /// Whether the points of all ranks that have ended are read.
    pub fn are_drained(&self) -> bool {
        self.draining.is_empty()
    }

    /// Waits for the next exit, in the order in which the ranks ended, or for the points of one that has ended.
    pub async fn ended_or_drained(&mut self) -> Ended {
        let Self { ending, draining, .. } = self;
        let words = async {
            match ending.front_mut() {
                Some((_, read)) => read.await.unwrap_or_default(),
                None => std::future::pending().await,
            }
        };
        let Words { stderr_tail, error } = tokio::select! {
            biased;
            words = words => words,
            Some(_) = draining.join_next() => return Ended::Drained,
        };
        match self.ending.pop_front() {
            Some((exit, _)) => Ended::Exit(RankExit { stderr_tail, error, ..exit }),
            None => std::future::pending().await,
        }
    }

    /// The processes of the ranks that run, by rank.
    pub fn processes(&self) -> Vec<u32> {
        let ranks = self.running.values().map(|running| (running.process.rank, running.process.pid));
        let by_rank: BTreeMap<Rank, i32> = ranks.collect();
        by_rank.into_values().map(i32::cast_unsigned).collect()
    }

    /// The process of a rank that runs.
    pub fn pid_of(&self, rank: Rank) -> Option<i32> {
        self.running.iter().find(|(_, running)| running.process.rank == rank).map(|(pid, _)| *pid)
    }

    /// Whether every rank has ended; what they left may run.
    pub fn have_ended(&self) -> bool {
        self.running.is_empty()
    }

    /// Whether no process of theirs was left when they were last reaped.
    pub fn are_gone(&self) -> bool {
        self.are_gone
    }

    /// Whether every exit was given out.
    pub fn are_told(&self) -> bool {
        self.ending.is_empty()
    }

    /// The ranks of which something is left: all, if only what they left behind is.
    pub fn held(&self) -> Vec<Rank> {
        let running: Vec<Rank> = self.running.values().map(|running| running.process.rank).collect();
        if running.is_empty() { self.all.clone() } else { running }
    }
}
