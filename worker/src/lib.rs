//! The node daemon, as a library: registers a node with the coordinator, launches one process per rank, and
//! streams points, logs and exits back. `muster worker` calls [`run`].
//!
//! A small pure core (`muster-worker-core`) holds what is desired against what runs; one task owns it. The ranks of
//! each gang belong to a process of their own, its `shim`, and run on when the daemon does not.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

mod attached;
mod clock;
mod daemon;
mod data_dir;
mod devices;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod health;
mod launch;
mod os_text;
#[doc(hidden)]
pub mod load {
    //! For the load generator of the benches, which runs real sessions with no ranks behind them.
    pub use crate::clock::boot_now;
    pub use crate::session::{Event, Identity, Queues, keep, request};
}
mod credentials;
mod logs;
mod monitor;
mod pinned;
mod session;
mod shim;
#[cfg(feature = "simulation")]
#[doc(hidden)]
pub mod simulation;
mod telemetry;
pub mod trust;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use muster_core::types::surroundings::RankBinding;
use muster_core::types::{NodeName, UserName};

pub use attached::{Attached, Streams};
pub use daemon::run;
pub use devices::Given;
pub use devices::doctor;
pub use devices::network::for_others;
pub use health::Watch;
#[doc(hidden)]
pub use launch::environment::SHIM_LOG;
pub use muster_monitor::{Http, Listen, secret_file_warning};
pub use muster_worker_core::NumaBinding;
pub use muster_worker_core::doctor::{Diagnosis, Grade};
pub use shim::main as shim;
use trust::Trust;

/// Settings of a node daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// URLs of the coordinators, tried in turn.
    pub coordinators: Vec<String>,
    /// Which coordinators are trusted where connections are encrypted.
    pub trust: Trust,
    /// File with a join token, by which a node without a certificate gets one.
    pub join_token_file: Option<PathBuf>,
    /// Name of the node, unique in the cluster.
    pub name: NodeName,
    /// Directory for logs and sockets; made if it is not there, and held by one daemon at a time.
    pub data_dir: PathBuf,
    /// Address at which other nodes reach this one. Default: the one from which it reaches the coordinator.
    pub address: Option<IpAddr>,
    /// Labels for node selectors.
    pub labels: BTreeMap<String, String>,
    /// What is run as the shim of a gang, program and arguments: something that calls [`shim`].
    pub shim: Vec<OsString>,
    /// The ranks are those of `muster run`: they end with this process.
    pub attached: Option<Attached>,
    /// As whom ranks run of which the job does not say it, where this process is root; as whom it is run by default.
    pub run_as: Option<UserName>,
    /// Stands in the place of `/sys` where devices are looked for.
    pub sysfs_root: Option<PathBuf>,
    /// Says what the machine has that is not there.
    pub given: Option<Given>,
    /// Slurm's topology.conf, which says where the machine is in the network.
    pub topology_conf: Option<PathBuf>,
    /// How the machine is watched; not at all without.
    pub watch: Option<Watch>,
    /// Where `/metrics`, `/healthz` and `/readyz` are.
    pub http: Http,
    /// Longest time that ranks get to end in when the daemon itself is stopped, whatever grace their jobs have.
    pub stop_grace_max: Duration,
}

/// Whoever stops a daemon (systemd, Kubernetes) kills it after 30 to 90 s, if not told otherwise.
pub const STOP_GRACE_MAX: Duration = Duration::from_secs(20);

impl Config {
    /// Default settings for a node.
    pub fn new(coordinators: Vec<String>, name: NodeName, data_dir: PathBuf) -> Self {
        Self {
            coordinators,
            trust: Trust::default(),
            join_token_file: None,
            name,
            data_dir,
            address: None,
            labels: BTreeMap::new(),
            shim: own_shim(),
            attached: None,
            run_as: None,
            sysfs_root: None,
            given: None,
            topology_conf: None,
            watch: None,
            http: Http::OFF,
            stop_grace_max: STOP_GRACE_MAX,
        }
    }
}

/// This very program with the argument `shim`, also when it was replaced on disk meanwhile.
pub fn own_shim() -> Vec<OsString> {
    vec!["/proc/self/exe".into(), "shim".into()]
}

/// CPU cores and GPUs that ranks on this machine may use.
pub fn cores_and_gpus() -> (u32, u32) {
    let found = devices::Machine::at_a_glance(BTreeMap::new()).inventory();
    let total = found.unwrap_or_default().total;
    ((total.cpu_millis / 1000).max(1), total.gpus)
}

/// Which processors each of a node's ranks gets. The error says why it cannot be told, in words.
pub fn numa_bindings(binding: NumaBinding, procs: u32) -> Result<Vec<RankBinding>, String> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let machine = devices::Machine::at_a_glance(BTreeMap::new());
    let topology = devices::topology(&machine, visible.as_deref())?;
    let bind = |local_rank| {
        let cpus = topology.bind(binding, local_rank)?.to_string();
        Ok(RankBinding { local_rank, gpus: Vec::new(), cpus, reason: "--numa-binding".to_owned() })
    };
    (0..procs).map(bind).collect()
}

/// Why a node daemon could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A coordinator's URL cannot be used.
    #[error("{url:?} is not the URL of a coordinator: {why}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The data directory is not this user's alone.
    #[error(transparent)]
    NotOwn(#[from] muster_monitor::DataDirError),
    /// The data directory cannot be used.
    #[error("failed to use the data directory {path}: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another daemon holds the data directory.
    #[error("another node daemon uses the data directory {0}; stop it or choose another --data-dir")]
    DataDirHeld(PathBuf),
    /// The metrics cannot be served.
    #[error(transparent)]
    Http(#[from] muster_monitor::AddressError),
    /// What describes the machine cannot be used.
    #[error("failed to find out what this machine has: {0}")]
    Inventory(String),
    /// Ranks cannot run as whom they are to.
    #[error("--run-as: {0}")]
    RunAs(String),
    /// The coordinator refuses this node for good.
    #[error("the coordinator refuses this node: {0}")]
    Refused(String),
}
