//! `muster run`: torchrun's command line on a coordinator and a node daemon inside this process.
//!
//! They speak over a Unix socket in a directory that only this user can enter, and nothing outlives the command: the shim
//! kills its ranks when this process ends, however it ends.

mod answer;
pub(crate) mod args;
mod meet;
mod meeting;
mod node;
mod port;
mod program;
mod report;
mod tee;

use std::fs::{DirBuilder, Permissions};
use std::io::IsTerminal;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use muster_core::types::surroundings::RankBinding;
use muster_core::types::{Generation, RUN_LABEL};
use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;
use muster_worker::{Attached, Streams};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::Status;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::Global;
use crate::exit::Failure;
use crate::output::say;
use crate::{log, output, show, signals, submit, usage};
use args::{ProcsPerNode, RunArgs};
use meeting::{Meeting, Place};
use node::Node;
use tee::Tees;

/// Nodes come within seconds of each other; when they do not, it is said what the run waits for.
const WAITING_SHOWN_AFTER: Duration = Duration::from_secs(3);

/// `muster run`.
pub(crate) async fn run(args: RunArgs, global: &Global) -> Result<(), Failure> {
    if std::env::var_os("RUST_LOG").is_some() {
        log::text(EnvFilter::from_default_env(), std::io::stderr().is_terminal(), || output::Log).init();
    }
    usage::refuse_unknown_flag(&args.command)?;
    program::say_what_has_no_effect(&args)?;
    let signals = listen(&args)?;
    let meeting = Meeting::of(&args)?;
    let procs = procs_per_node(args.nproc_per_node)?;
    let run_id = run_id(&args, &meeting);
    let scratch = Scratch::new()?;
    let (attached, name) = attached(&args, &meeting, procs, &run_id, &scratch)?;
    let tees = Tees::new(&args, attached.clone(), procs);
    let spec = v1::JobSpec {
        name: name.clone(),
        command: vec![name],
        min_nodes: Some(args.nnodes.min),
        max_nodes: args.nnodes.max,
        procs_per_node: Some(procs),
        max_restarts: Some(args.max_restarts),
        stop_grace: Some(duration_to_wire_std(args.stop_grace.0)),
        last_call: Some(duration_to_wire_std(meeting.last_call)),
        node_selector: [(RUN_LABEL.to_owned(), run_id.clone())].into(),
        // Whoever serves the run was the only one to know what becomes of it.
        on_coordinator_loss: match meeting.place {
            Place::Coordinator => v1::CoordinatorLossPolicy::Run,
            Place::Alone | Place::Peers(_) => v1::CoordinatorLossPolicy::Stop,
        }
        .into(),
        ..v1::JobSpec::default()
    };
    let mut follower =
        Follower { signals, tees, restarting: 0, stopping: false, hurries: false, waiting: String::new() };
    let node = tokio::select! {
        node = Node::enter(&meeting, (&args, global), &run_id, &scratch, attached) => node?,
        signal = any(&mut follower.signals) => {
            say!("muster run: {signal} before anything ran");
            return Err(Failure::JobFailed);
        }
    };
    let job = follower.follow(&node, &run_id, spec).await;
    // The other nodes do not wait for a reader here.
    let (job, ()) = tokio::join!(node.leave(job), follower.tees.finish(follower.hurries));
    let job = job?;
    if job.state() == v1::JobState::Succeeded {
        return Ok(());
    }
    report::print(&job, &node.name, follower.tees.attached());
    Err(Failure::JobFailed)
}

/// Names the run. torchrun makes up a name for an empty one, each node its own; nodes that are to meet cannot.
fn run_id(args: &RunArgs, meeting: &Meeting) -> String {
    const DEFAULT: &str = "none";
    let is_alone = meeting.place == Place::Alone;
    match args.rdzv_id.as_str() {
        _ if args.standalone => uuid::Uuid::new_v4().to_string(),
        "" if is_alone => uuid::Uuid::new_v4().to_string(),
        "" => {
            say!("muster run: --rdzv-id is empty; the nodes meet as the run {DEFAULT:?}");
            DEFAULT.to_owned()
        }
        id => id.to_owned(),
    }
}

/// A directory of this run's own, which goes with it.
struct Scratch {
    dir: tempfile::TempDir,
    /// Held open: its path under /proc is short, as a socket's must be, whatever TMPDIR says.
    open: std::fs::File,
}

impl Scratch {
    fn new() -> Result<Self, Failure> {
        // Its socket is open to whoever reaches it.
        let private = Permissions::from_mode(0o700);
        let made = tempfile::Builder::new().prefix("muster-run-").permissions(private).tempdir();
        let dir = made.context("failed to make a temporary directory; TMPDIR says where")?;
        let open = std::fs::File::open(dir.path()).context("failed to open the temporary directory")?;
        Ok(Self { dir, open })
    }

    fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/socket", self.open.as_raw_fd()))
    }
}

/// Shows what becomes of the job, and passes signals on.
struct Follower {
    signals: Vec<(nix::sys::signal::Signal, Signal)>,
    tees: Tees,
    /// The last generation of which it was said that it ends.
    restarting: u32,
    stopping: bool,
    /// Somebody asked twice.
    hurries: bool,
    /// What the run waits for.
    waiting: String,
}

impl Follower {
    /// Submits the job, as each node of the run does, and follows it to its end.
    async fn follow(&mut self, node: &Node, run_id: &str, spec: v1::JobSpec) -> Result<v1::Job, Failure> {
        let submitted = async {
            let job = submit::submit(&node.client, run_id.to_owned(), spec.clone()).await?;
            // A coordinator that is there for longer may have had a run of this name before.
            for again in 1.. {
                if !show::is_terminal(&job) || node.is_own {
                    break;
                }
                let job = submit::submit(&node.client, format!("{run_id}/{again}"), spec.clone()).await?;
                if !show::is_terminal(&job) {
                    return Ok(job);
                }
            }
            Ok::<_, Failure>(job)
        };
        let job = tokio::select! {
            job = submitted => job?,
            () = node.broken.cancelled() => return Err(Failure::JobFailed),
            signal = any(&mut self.signals) => {
                say!("muster run: {signal} before anything ran");
                return Err(Failure::JobFailed);
            }
        };
        let late = tokio::time::sleep(node.join_timeout);
        let patient = tokio::time::sleep(WAITING_SHOWN_AFTER);
        tokio::pin!(late, patient);
        let (mut retries, mut has_started, mut says) = (node.retries(), false, false);
        loop {
            let request = v1::WatchJobRequest { job_id: job.id.clone() };
            let mut changes = match node.client.jobs().watch_job(request).await {
                Ok(response) => response.into_inner(),
                Err(status) => {
                    retries.pause(status).await.map_err(|lost| node.lost(lost))?;
                    continue;
                }
            };
            let broken = loop {
                let change = tokio::select! {
                    change = changes.message() => change,
                    signal = any(&mut self.signals) => {
                        self.pass_on(signal, node, &job.id).await?;
                        continue;
                    }
                    () = node.broken.cancelled() => return Err(Failure::JobFailed),
                    () = &mut patient, if !says => {
                        says = true;
                        self.say_waiting();
                        continue;
                    }
                    () = &mut late, if !has_started => return Err(self.too_late(node, &job.id).await),
                };
                match change {
                    Ok(Some(v1::WatchJobResponse { job: Some(job) })) => {
                        retries.reset();
                        has_started |= job.generation.unwrap_or(0) > 0;
                        self.show(node, &job);
                        if says {
                            self.say_waiting();
                        }
                        if show::is_terminal(&job) {
                            return Ok(job);
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break Status::unavailable("the coordinator ended the stream"),
                    Err(status) => break status,
                }
            };
            retries.pause(broken).await.map_err(|lost| node.lost(lost))?;
        }
    }

    fn show(&mut self, node: &Node, job: &v1::Job) {
        let generation = job.generation.unwrap_or(0);
        if matches!(job.state(), v1::JobState::Starting | v1::JobState::Running) {
            let here = job.placement.iter().find(|part| part.node_name == node.name.as_str());
            let first_rank = here.and_then(|part| part.first_rank).unwrap_or(0);
            self.tees.follow(Generation(generation), first_rank);
        }
        node.store.send_replace(job.master.parse().ok());
        let waits = job.state() == v1::JobState::Queued;
        self.waiting = if waits { job.reason.clone() } else { String::new() };
        if job.state() == v1::JobState::Restarting && generation > self.restarting {
            self.restarting = generation;
            say!("muster run: {}", job.reason);
        }
    }

    /// Once: what has been said is forgotten.
    fn say_waiting(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        if !waiting.is_empty() {
            say!("muster run: {waiting}");
        }
    }

    async fn pass_on(
        &mut self,
        signal: nix::sys::signal::Signal,
        node: &Node,
        job_id: &str,
    ) -> Result<(), Failure> {
        if std::mem::replace(&mut self.stopping, true) {
            // Whoever asks twice does not want to wait. The shim kills the ranks as this process ends.
            self.hurries = true;
            return Err(Failure::JobFailed);
        }
        say!(
            "muster run: {signal}: the ranks get it too, and have their grace to end; again ends them at once"
        );
        let request = v1::CancelJobRequest {
            job_id: job_id.to_owned(),
            reason: format!("{signal}"),
            stop_signal: signal.as_str().to_owned(),
        };
        node.client.jobs().cancel_job(request).await?;
        Ok(())
    }

    async fn too_late(&self, node: &Node, job_id: &str) -> Failure {
        let request = v1::GetJobRequest { job_id: job_id.to_owned() };
        let job =
            node.client.jobs().get_job(request).await.ok().and_then(|response| response.into_inner().job);
        let why = job.map(|job| job.reason).unwrap_or_default();
        say!("muster run: not all nodes came within {} s (join_timeout): {why}", node.join_timeout.as_secs());
        Failure::JobFailed
    }
}

/// Listens to signals from the start on, so that none ends this process alone.
fn listen(args: &RunArgs) -> Result<Vec<(nix::sys::signal::Signal, Signal)>, Failure> {
    let listen = |of: &nix::sys::signal::Signal| {
        let listener = signal(SignalKind::from_raw(*of as i32));
        let listener = listener.with_context(|| format!("{of} of --signals-to-handle cannot be handled"));
        Ok::<_, anyhow::Error>((*of, listener?))
    };
    let known = args.signals_to_handle.known.iter();
    // Under nohup a terminal that goes is no reason to end.
    let heard =
        known.filter(|of| **of != nix::sys::signal::Signal::SIGHUP || !signals::is_ignored(**of as i32));
    Ok(heard.map(listen).collect::<Result<_, _>>()?)
}

/// The next signal.
async fn any(signals: &mut [(nix::sys::signal::Signal, Signal)]) -> nix::sys::signal::Signal {
    std::future::poll_fn(|context| {
        let mut ready = signals
            .iter_mut()
            .filter_map(|(of, listener)| listener.poll_recv(context).is_ready().then_some(*of));
        ready.next().map_or(std::task::Poll::Pending, std::task::Poll::Ready)
    })
    .await
}

fn procs_per_node(asked: ProcsPerNode) -> Result<u32, Failure> {
    // It takes a moment to look, and a number needs no look.
    let found = muster_worker::cores_and_gpus;
    match asked {
        ProcsPerNode::Count(count) => Ok(count),
        ProcsPerNode::Cpu => Ok(found().0),
        ProcsPerNode::Gpu => match found() {
            (_, 0) => Err(Failure::Usage("--nproc-per-node gpu: this machine shows no GPU".to_owned())),
            (_, gpus) => Ok(gpus),
        },
        ProcsPerNode::Auto => match found() {
            (cores, 0) => Ok(cores),
            (_, gpus) => Ok(gpus),
        },
    }
}

/// Where the ranks run on this machine, if --numa-binding says so.
fn bindings(args: &RunArgs, procs: u32) -> Result<Vec<RankBinding>, Failure> {
    let Some(binding) = args.numa_binding else { return Ok(Vec::new()) };
    muster_worker::numa_bindings(binding, procs)
        .map_err(|why| Failure::Usage(format!("--numa-binding: {why}")))
}

/// What the ranks run and where they write, and a name for it.
fn attached(
    args: &RunArgs,
    meeting: &Meeting,
    procs: u32,
    run_id: &str,
    scratch: &Scratch,
) -> Result<(Attached, String), Failure> {
    let dir = std::env::current_dir().context("this shell's directory is gone")?;
    let (command, name) = program::command(args, &dir)?;
    let no_logs = args.log_dir.as_deref() == Some(Path::new("/dev/null"));
    // An empty name is none.
    let log_dir = match args.log_dir.as_ref().filter(|dir| !dir.as_os_str().is_empty()) {
        Some(dir) if !no_logs => {
            let failed = || format!("failed to make a directory in --log-dir {}", dir.display());
            let dir = std::path::absolute(dir).with_context(failed)?;
            DirBuilder::new().recursive(true).mode(0o755).create(&dir).with_context(failed)?;
            let made =
                tempfile::Builder::new().prefix(&format!("{}_", run_id.replace('/', "_"))).tempdir_in(&dir);
            made.with_context(failed)?.keep()
        }
        _ => scratch.dir.path().join("logs"),
    };
    let streams = |bit: u8| {
        let shown =
            |rank: u32| args.local_ranks_filter.0.is_empty() || args.local_ranks_filter.0.contains(&rank);
        let is_file = |rank: &u32| args.redirects.has(*rank, bit) || args.tee.has(*rank, bit);
        let (to_file, rest): (Vec<u32>, Vec<u32>) = (0..procs).partition(is_file);
        let to_nothing = rest.into_iter().filter(|rank| !shown(*rank)).collect();
        Streams { to_file: to_file.into_iter().collect(), to_nothing }
    };
    let attached = Attached {
        scratch: scratch.dir.path().to_owned(),
        log_dir,
        command,
        working_dir: dir,
        run_id: run_id.to_owned(),
        role: args.role.clone(),
        signals: args.signals_to_handle.text.clone(),
        virtual_local_rank: args.virtual_local_rank,
        store_port: meeting.store_port,
        bindings: bindings(args, procs)?,
        master: meeting.shares_port().then(|| (meeting.host.clone(), meeting.port)),
        stdout: streams(1),
        stderr: streams(2),
    };
    Ok((attached, name))
}
