//! `muster coordinator` and `muster worker`: logging, signals, and the libraries that do the work.

use std::fs::OpenOptions;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use muster_coordinator::Listen;
use muster_core::types::NodeName;
use muster_worker::trust;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::{CoordinatorArgs, DaemonArgs, Global, LogFormat, WorkerArgs};
use crate::exit::Failure;
use crate::signals::Hangup;
use crate::{log, output};

/// Where a coordinator's metrics are unless it is told otherwise. A worker's are nowhere: hosts of several workers are the
/// rule where people try things out, and clusters say where they scrape.
const COORDINATOR_HTTP: Listen = Listen::Perhaps(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7071));

/// `muster coordinator`.
pub(crate) async fn coordinator(args: CoordinatorArgs) -> Result<(), Failure> {
    private_files();
    let shutdown = start_logging(&args.daemon)?;
    let store = args.store.kind(&args.etcd)?;
    let advertise = args.several.advertise.map(|url| trust::urls(&[url])).transpose();
    let advertise = advertise.map_err(|why| Failure::Usage(format!("--advertise: {why}")))?;
    let advertise = advertise.and_then(|mut urls| urls.pop());
    let config = muster_coordinator::Config {
        listen: args.listen,
        insecure: args.insecure,
        health_listen: args.health_listen,
        tls_dir: args.tls_dir,
        node_certificate_life: args.node_cert_lifetime.0,
        socket: None,
        loopback_names_only: false,
        loopback_users: args.loopback_users,
        open_jobs: args.limits.open_jobs,
        queue_max: args.limits.queue_max(),
        priority_max: args.limits.priority_max,
        reflection: true,
        http: args.daemon.http(COORDINATOR_HTTP),
        data_dir: args.data_dir,
        audit: true,
        store,
        lease: args.lease.0,
        heartbeat: args.heartbeat.0,
        advertise,
        leader_lease: args.several.leader_lease.0,
        accept_restored_store: args.several.accept_restored_store,
    };
    raise_files();
    // Its message holds its causes already.
    Ok(muster_coordinator::run(config, shutdown).await.map_err(|error| anyhow::anyhow!("{error}"))?)
}

/// Has every file that this process makes be its user's alone. It starts no programs of others, which
/// would inherit that.
pub(crate) fn private_files() {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
}

/// Each node is an open connection, and the limit that most systems begin with is 1024 files: it may be raised to the hard
/// one, which is meant for that.
fn raise_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
    });
    if let Err(error) = raised {
        warn!(%error, "the limit of open files could not be raised; it bounds how many nodes can connect");
    }
}

/// Lifts the limit of locked memory for the ranks, which inherit it: RDMA locks its buffers. Only root may, or who has
/// CAP_SYS_RESOURCE. For others the limit stays what it is, and `muster doctor` and the node say so.
fn lift_locked_memory() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).ok();
}

/// `muster worker`.
pub(crate) async fn worker(args: WorkerArgs, global: &Global) -> Result<(), Failure> {
    if let Some(job) = std::env::var_os("SLURM_JOB_ID").filter(|_| !names_a_coordinator()) {
        return Err(Failure::Usage(format!(
            "this is in job {} of Slurm, and no coordinator is named: set MUSTER_COORDINATOR, which srun hands on with --export=ALL, \
             or --coordinator",
            job.display()
        )));
    }
    let name = match args.name {
        Some(name) => name,
        None => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .ok_or_else(|| Failure::Usage("this machine has no host name; set --name".to_owned()))?,
    };
    let name = NodeName::new(name).map_err(|why| Failure::Usage(format!("{why}; set --name")))?;
    let shutdown = start_logging(&args.daemon)?;
    lift_locked_memory();
    let config = muster_worker::Config {
        coordinators: global.urls()?,
        trust: global.trust()?,
        join_token_file: args.join_token_file,
        name,
        data_dir: args.data_dir,
        address: args.address,
        labels: args.labels.into_iter().map(|pair| (pair.0, pair.1)).collect(),
        run_as: args.run_as,
        shim: muster_worker::own_shim(),
        attached: None,
        given: args.machine.given(),
        topology_conf: args.topology_conf,
        watch: Some(args.watch.into()),
        stop_grace_max: args.stop_grace_max.0,
        sysfs_root: args.machine.sysfs_root,
        http: args.daemon.http(Listen::Off),
    };
    let mut hangup = Hangup::listen().context("failed to listen for SIGHUP")?;
    tokio::select! {
        ended = muster_worker::run(config, shutdown) => {
            Ok(ended.map_err(|error| anyhow::anyhow!("{error}"))?)
        }
        () = hangup.recv() => {
            info!("SIGHUP: ending; the ranks run on, and the next daemon with this data directory takes them over");
            Ok(())
        }
    }
}

/// Whether the command line or the environment names a coordinator. The default is one on this machine, which on the nodes of
/// an allocation none but the first has.
fn names_a_coordinator() -> bool {
    let names = |word: std::ffi::OsString| {
        word == "--coordinator" || word.as_encoded_bytes().starts_with(b"--coordinator=")
    };
    std::env::var_os("MUSTER_COORDINATOR").is_some() || std::env::args_os().any(names)
}

/// The log of a shim: on standard error, which its daemon has pointed at a file, or in the file that the shim of
/// `muster run` is told of, whose standard error is the ranks'.
pub(crate) fn start_shim_log() {
    let file = std::env::var_os(muster_worker::SHIM_LOG)
        .and_then(|path| OpenOptions::new().create(true).append(true).mode(0o600).open(path).ok());
    let writer = match file {
        Some(file) => BoxMakeWriter::new(std::sync::Arc::new(file)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    log::text(EnvFilter::new("info"), false, writer).init();
}

/// Sets up the log on standard error, and a token that SIGTERM, SIGINT and, if asked for, the end of standard
/// input cancel.
fn start_logging(args: &DaemonArgs) -> Result<CancellationToken, Failure> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    match args.log_format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            log::text(filter, std::io::stderr().is_terminal(), || output::Log).init();
        }
        LogFormat::Json => {
            output::gaps_in_json();
            log::json(filter, || output::Log).init();
        }
    }
    muster_monitor::announce_by(|line| output::say_lines([line]));
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let token = shutdown.clone();
    tokio::spawn(async move {
        for count in 1.. {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if count > 1 {
                warn!("signalled again; ending at once");
                output::drain([output::PAUSE_MAX; 2]).await.ok();
                std::process::exit(130);
            }
            info!("signalled; ending in good order");
            token.cancel();
        }
    });
    if args.exit_with_stdin {
        let token = shutdown.clone();
        std::thread::spawn(move || {
            let mut input = std::io::stdin().lock();
            while matches!(input.read(&mut [0; 64]), Ok(1..)) {}
            token.cancel();
        });
    }
    Ok(shutdown)
}
