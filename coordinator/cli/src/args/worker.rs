//! Flags of the node daemon, and what they say about its machine: where its devices are looked for, what it has that is not
//! there, and how it is watched.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use muster_cli::messages;
use muster_core::types::UserName;
use muster_worker::{Given, Watch};

use super::DaemonArgs;
use crate::units::{KeyValue, Span};

/// Looks are no closer than this.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

fn user_name(text: &str) -> Result<UserName, String> {
    UserName::new(text)
}

#[derive(Debug, clap::Args)]
pub(crate) struct WorkerArgs {
    /// Name of the node, unique in the cluster. Default: the host name.
    #[arg(long)]
    pub name: Option<String>,
    /// File with a join token, as `muster token create --role node` printed it: the node gets its certificate for it, and keeps
    /// that in the data directory. For https:// URLs.
    #[arg(long, env = "MUSTER_JOIN_TOKEN_FILE", value_name = "FILE")]
    pub join_token_file: Option<PathBuf>,
    /// User that runs the ranks, where this daemon is root, unless their job names one. Default: root as well. Ranks of
    /// another user get PATH, LD_LIBRARY_PATH, language, time zone, proxies and the variables of CUDA, NCCL, UCX and the
    /// like from the daemon's environment, and nothing else of it.
    #[arg(long, env = "MUSTER_RUN_AS", value_name = "USER", value_parser = user_name)]
    pub run_as: Option<UserName>,
    /// Directory for logs; one daemon at a time.
    #[arg(long, default_value = "muster-worker", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Address at which other nodes reach this one. Default: the one from which it reaches the
    /// coordinator; where that is loopback behind a name, as in Debian's /etc/hosts, the one of the
    /// default route.
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
    /// Label for node selectors; may be repeated. Where the node is in the network is taken from zone, spine and leaf, or as
    /// Kubernetes and clouds name them (topology.kubernetes.io/zone, network.topology.nvidia.com/leaf).
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<KeyValue>,
    /// Slurm's topology.conf, from which the node takes the labels leaf, spine and zone where --label names none.
    #[arg(long, value_name = "FILE")]
    pub topology_conf: Option<PathBuf>,
    /// Longest time that ranks get to end in when this daemon is stopped, less than whoever stops it gives it. They go on
    /// elsewhere, and no restart is spent.
    #[arg(long, default_value = "20s", value_name = "SPAN")]
    pub stop_grace_max: Span,
    #[command(flatten)]
    pub watch: WatchArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Another host whose ports are tried; may be repeated.
    #[arg(long = "peer", value_name = "HOST")]
    pub peers: Vec<String>,
    /// The data directory of the node daemon that is to run here.
    #[arg(long, default_value = "muster-worker", value_name = "DIR")]
    pub data_dir: PathBuf,
    #[command(flatten)]
    pub machine: MachineArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct HealthcheckArgs {
    /// What is asked for: `live`, that the process is well; or nothing, that it leads too.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    pub service: String,
    /// Time for the answer.
    #[arg(long, default_value = "3s", value_name = "SPAN")]
    pub timeout: Span,
}

/// Flags that tell a daemon, or the doctor, about its machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct MachineArgs {
    /// Directory that stands in the place of /sys where devices are looked for, for tests.
    #[arg(long, value_name = "DIR")]
    pub sysfs_root: Option<PathBuf>,
    /// What the machine has, as `muster node NAME --output json` shows it under inventory; for what is not named there the
    /// machine itself is asked. Makes a fake node, for tests.
    #[arg(long, value_name = "FILE")]
    pub inventory: Option<PathBuf>,
}

/// Flags that tell a daemon how its machine is watched.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// Directory with programs that check this machine: exit code 0 is well, 1 degraded, 2 quarantined; the first line that
    /// one writes says why, as JSON ({"reason":"fan 3 is slow"}) or plain.
    #[arg(long, value_name = "DIR")]
    pub check_dir: Option<PathBuf>,
    /// Time between looks at the machine's health; its checks run at every sixth.
    #[arg(long, default_value = "10s", value_name = "SPAN")]
    pub health_interval: Span,
}

impl From<WatchArgs> for Watch {
    fn from(args: WatchArgs) -> Self {
        Self { interval: args.health_interval.0.max(INTERVAL_MIN), check_dir: args.check_dir }
    }
}

impl MachineArgs {
    /// Reads the file at each look.
    pub fn given(&self) -> Option<Given> {
        let path = self.inventory.clone()?;
        Some(Given::new(move || read(&path).map_err(|error| format!("{error:#}"))))
    }
}

fn read(path: &Path) -> anyhow::Result<muster_proto::v1::Inventory> {
    let of_file = || format!("failed to read the inventory in {}", path.display());
    let text = std::fs::read_to_string(path).with_context(of_file)?;
    let value = serde_json::from_str(&text).context("it is not valid JSON").with_context(of_file)?;
    messages::read("Inventory", value).with_context(of_file)
}
