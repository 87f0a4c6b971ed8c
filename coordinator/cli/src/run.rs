//! `muster run`: torchrun's command line on a coordinator and a node daemon inside this process.
//!
//! They speak over a Unix socket in a directory that only this user can enter, and nothing outlives the command: the shim
//! kills its ranks when this process ends, however it ends.

pub(crate) mod args;
mod program;
mod report;
mod tee;

use std::fs::DirBuilder;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use muster_core::types::{Generation, NodeName};
use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;
use muster_worker::{Attached, Streams};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::args::{Global, Output};
use crate::client::Client;
use crate::exit::Failure;
use crate::{show, submit};
use args::{ProcsPerNode, RunArgs};
use tee::Tees;

/// The daemon and the coordinator are one process, and neither can lose the other: a lease says nothing.
const LEASE: Duration = Duration::from_hours(24);

/// `muster run`.
pub(crate) async fn run(args: RunArgs) -> Result<(), Failure> {
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .log_internal_errors(false)
            .init();
    }
    program::say_what_has_no_effect(&args)?;
    let mut signals = listen(&args)?;
    let procs = procs_per_node(args.nproc_per_node)?;
    let run_id = if args.standalone { uuid::Uuid::new_v4().to_string() } else { args.rdzv_id.clone() };
    let scratch = Scratch::new()?;
    let attached = attached(&args, procs, &run_id, &scratch)?;
    let (client, _daemons) = start(&scratch, attached.clone()).await?;

    let job = submit::submit(&client, run_id, spec(&args, procs)?).await?;
    let mut tees = Tees::new(&args, attached, procs);
    let job = follow(&client, &job.id, &mut signals, &mut tees).await?;
    tees.finish().await;
    if job.state() == v1::JobState::Succeeded {
        return Ok(());
    }
    report::print(&job, tees.attached());
    Err(Failure::JobFailed)
}

/// A directory of this run's own, which goes with it.
struct Scratch {
    dir: tempfile::TempDir,
    /// Held open: its path under /proc is short, as a socket's must be, whatever TMPDIR says.
    open: std::fs::File,
}

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let made = tempfile::Builder::new().prefix("muster-run-").tempdir();
        let dir = made.context("failed to make a temporary directory; TMPDIR says where")?;
        let open = std::fs::File::open(dir.path()).context("failed to open the temporary directory")?;
        Ok(Self { dir, open })
    }

    fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/coordinator", self.open.as_raw_fd()))
    }
}

/// Starts a coordinator and a daemon in this process. They end when the handle is dropped.
async fn start(scratch: &Scratch, attached: Attached) -> Result<(Client, AbortOnDropHandle<()>), Failure> {
    let dir = scratch.dir.path();
    let socket = scratch.socket();
    let listener =
        UnixListener::bind(&socket).context("failed to make a socket in the temporary directory")?;
    let coordinator = muster_coordinator::Config {
        store: muster_coordinator::StoreKind::Memory,
        lease: LEASE,
        heartbeat: LEASE / 4,
        ..muster_coordinator::Config::new(dir.join("coordinator-data"))
    };
    let url = format!("unix:{}", socket.display());
    let worker = muster_worker::Config {
        attached: Some(attached),
        ..muster_worker::Config::new(vec![url.clone()], node_name(), dir.join("node"))
    };
    let serve = async move {
        let connections = UnixListenerStream::new(listener);
        let coordinator =
            muster_coordinator::run_on(coordinator, connections, || (), CancellationToken::new());
        let worker = muster_worker::run(worker, CancellationToken::new());
        let (coordinator, worker) = tokio::join!(coordinator, worker);
        // Neither ends by itself, unless it cannot go on.
        let why =
            [coordinator.err().map(|error| error.to_string()), worker.err().map(|error| error.to_string())];
        for why in why.into_iter().flatten() {
            eprintln!("muster run: {why}");
        }
    };
    let serving = AbortOnDropHandle::new(tokio::spawn(serve));
    let client = Client::connect(&Global { coordinator: vec![url], output: Output::Text }).await?;
    Ok((client, serving))
}

/// This machine's name, as far as it can be one.
fn node_name() -> NodeName {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let named =
        host.and_then(|host| NodeName::new(host).ok()).or_else(|| NodeName::new("localhost".to_owned()).ok());
    named.unwrap_or_else(|| unreachable!("localhost is a name"))
}

/// Shows what becomes of the job, and passes signals on, until it has ended.
async fn follow(
    client: &Client,
    job_id: &str,
    signals: &mut [(nix::sys::signal::Signal, Signal)],
    tees: &mut Tees,
) -> Result<v1::Job, Failure> {
    let request = v1::WatchJobRequest { job_id: job_id.to_owned() };
    let mut changes = client.jobs().watch_job(request).await?.into_inner();
    let (mut restarting, mut stopping) = (0, false);
    loop {
        let change = tokio::select! {
            change = changes.message() => change?,
            signal = any(signals) => {
                if std::mem::replace(&mut stopping, true) {
                    // Whoever asks twice does not want to wait. The shim kills the ranks as this process ends.
                    return Err(Failure::JobFailed);
                }
                eprintln!("muster run: {signal}: the ranks get it too, and have their grace to end; again ends them at once");
                let request = v1::CancelJobRequest {
                    job_id: job_id.to_owned(),
                    reason: format!("{signal}"),
                    stop_signal: signal.as_str().to_owned(),
                };
                client.jobs().cancel_job(request).await?;
                continue;
            }
        };
        let Some(job) = change.and_then(|change| change.job) else {
            return Err(anyhow::anyhow!("the coordinator in this process has ended").into());
        };
        let generation = job.generation.unwrap_or(0);
        if matches!(job.state(), v1::JobState::Starting | v1::JobState::Running) {
            tees.follow(Generation(generation));
        }
        if job.state() == v1::JobState::Restarting && generation > restarting {
            restarting = generation;
            eprintln!("muster run: {}", job.reason);
        }
        if show::is_terminal(&job) {
            return Ok(job);
        }
    }
}

/// Listens to signals from the start on, so that none ends this process alone.
fn listen(args: &RunArgs) -> Result<Vec<(nix::sys::signal::Signal, Signal)>, Failure> {
    let listen = |of: &nix::sys::signal::Signal| {
        let listener = signal(SignalKind::from_raw(*of as i32));
        let listener = listener.with_context(|| format!("{of} of --signals-to-handle cannot be handled"));
        Ok::<_, anyhow::Error>((*of, listener?))
    };
    Ok(args.signals_to_handle.signals.iter().map(listen).collect::<Result<_, _>>()?)
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
    let (cores, gpus) = muster_worker::cores_and_gpus();
    match asked {
        ProcsPerNode::Count(count) => Ok(count),
        ProcsPerNode::Gpu if gpus == 0 => {
            Err(Failure::Usage("--nproc-per-node gpu: this machine shows no GPU".to_owned()))
        }
        ProcsPerNode::Auto if gpus > 0 => Ok(gpus),
        ProcsPerNode::Gpu => Ok(gpus),
        ProcsPerNode::Auto | ProcsPerNode::Cpu => Ok(cores),
    }
}

fn spec(args: &RunArgs, procs: u32) -> Result<v1::JobSpec, Failure> {
    let dir = std::env::current_dir().context("this shell's directory is gone")?;
    let working_dir =
        dir.to_str().ok_or_else(|| Failure::Usage(format!("{} is not UTF-8", dir.display())))?.to_owned();
    let (command, name) = program::command(args, &dir)?;
    Ok(v1::JobSpec {
        name,
        command,
        working_dir,
        min_nodes: Some(args.nnodes.min),
        max_nodes: args.nnodes.max,
        procs_per_node: Some(procs),
        max_restarts: Some(args.max_restarts),
        stop_grace: Some(duration_to_wire_std(args.stop_grace.0)),
        ..v1::JobSpec::default()
    })
}

/// Where the ranks write.
fn attached(args: &RunArgs, procs: u32, run_id: &str, scratch: &Scratch) -> Result<Attached, Failure> {
    let no_logs = args.log_dir.as_deref() == Some(Path::new("/dev/null"));
    let log_dir = match &args.log_dir {
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
    Ok(Attached {
        scratch: scratch.dir.path().to_owned(),
        log_dir,
        run_id: run_id.to_owned(),
        role: args.role.clone(),
        signals: args.signals_to_handle.text.clone(),
        virtual_local_rank: args.virtual_local_rank,
        stdout: streams(1),
        stderr: streams(2),
    })
}
