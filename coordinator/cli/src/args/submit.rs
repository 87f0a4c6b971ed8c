//! Flags of `muster submit`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::run::args::ProcsPerNode;
use crate::units::{Bytes, KeyValue, NodeRange, Span, Variable};

#[derive(Debug, clap::Args)]
pub(crate) struct SubmitArgs {
    /// A job specification as grpcurl takes it, in JSON or TOML; flags override what it says.
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Name for listings. Default: the program's.
    #[arg(long)]
    pub name: Option<String>,
    /// Nodes, or the fewest and the most.
    #[arg(long, alias = "nodes", value_name = "N|MIN:MAX")]
    pub nnodes: Option<NodeRange>,
    /// Ranks per node: a number; or auto, gpu or cpu for as many as the nodes have, which must have the same.
    #[arg(long, alias = "nproc_per_node", value_name = "P|auto|gpu|cpu")]
    pub nproc_per_node: Option<ProcsPerNode>,
    /// How often the gang may start again after a fault.
    #[arg(long, alias = "max_restarts", value_name = "R")]
    pub max_restarts: Option<u32>,
    /// GPUs for each rank.
    #[arg(long, value_name = "G")]
    pub gpus_per_proc: Option<u32>,
    /// CPU cores for each rank, such as 1.5.
    #[arg(long, value_name = "C")]
    pub cpus_per_proc: Option<f64>,
    /// Memory for each rank, such as 4GiB.
    #[arg(long, value_name = "BYTES")]
    pub memory_per_proc: Option<Bytes>,
    /// Variable for every rank, or the name of one that has the value it has here; may be repeated.
    #[arg(long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<Variable>,
    /// Variable for every rank whose value each node reads from a file of its own, right before the ranks start and as their
    /// user: an absolute path on the nodes. The value is stored and shown nowhere. May be repeated.
    #[arg(long = "env-file", value_name = "NAME=FILE")]
    pub env_file: Vec<KeyValue>,
    /// Python that runs a script.py: a path, or a name in the PATH of the nodes. Default: PYTHON_EXEC, that of the virtual
    /// environment that is active here, or python3.
    #[arg(long, value_name = "PATH")]
    pub python: Option<String>,
    /// Absolute directory in which the ranks start. Default: this one where the program or script is named by a relative path,
    /// else the log directory.
    #[arg(long, value_name = "DIR")]
    pub working_dir: Option<String>,
    /// Directory handed to the ranks as MUSTER_CHECKPOINT_DIR.
    #[arg(long, value_name = "DIR")]
    pub checkpoint_dir: Option<String>,
    /// Directory below which the program writes TensorBoard event files: their scalars are the job's metrics. Relative to
    /// where the ranks start.
    #[arg(long, value_name = "DIR")]
    pub tensorboard_dir: Option<String>,
    /// Regular expression that finds metrics in lines of standard output, such as
    /// `step (?P<step>[0-9]+).* loss (?P<loss>\S+)`.
    #[arg(long, value_name = "REGEX")]
    pub metric_pattern: Option<String>,
    /// User of the nodes as whom the ranks run, where their daemons run as root. Default: the token's, else the nodes'.
    #[arg(long, value_name = "USER")]
    pub run_as: Option<String>,
    /// Jobs of a higher priority are placed first. Above 100, or what the coordinator was told, only operators submit.
    #[arg(long, allow_negative_numbers = true)]
    pub priority: Option<i32>,
    /// Model of the GPUs that nodes must have, by words of its name in capitals or not, such as
    /// h100; the same as
    /// --node-selector gpu-model=NAME.
    #[arg(long, value_name = "NAME")]
    pub gpu_model: Option<String>,
    /// Label that a node must carry; may be repeated.
    #[arg(long = "node-selector", value_name = "KEY=VALUE")]
    pub node_selector: Vec<KeyValue>,
    /// Time between the stop signal and SIGKILL when ranks are stopped.
    #[arg(long, value_name = "SPAN")]
    pub stop_grace: Option<Span>,
    /// Longest time from placement until every rank runs.
    #[arg(long, value_name = "SPAN")]
    pub start_timeout: Option<Span>,
    /// Longest time without a point or a line of output of any rank; then the job hangs and starts again. Default: none.
    #[arg(long, value_name = "SPAN")]
    pub progress_timeout: Option<Span>,
    /// Once the fewest nodes are there, how long the first start waits for more. Default: not at all.
    #[arg(long, value_name = "SPAN")]
    pub last_call: Option<Span>,
    /// Signal that asks ranks to end, such as SIGINT. Default: SIGTERM.
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// Whether ranks run on when only the coordinator is gone. Default: run.
    #[arg(long, value_enum)]
    pub on_coordinator_loss: Option<CoordinatorLoss>,
    /// Makes a repeated call harmless. Default: a new one for each call.
    #[arg(long, value_name = "ID")]
    pub request_id: Option<String>,
    /// Stay, show progress and rank 0's output, and end with the job.
    #[arg(long, short)]
    pub follow: bool,
    /// Say where the job would go, and submit nothing.
    #[arg(long, conflicts_with = "follow")]
    pub dry_run: bool,
    /// Program and arguments. A script.py is run by --python.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// What becomes of ranks when no coordinator runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CoordinatorLoss {
    /// They run on: nobody can replace them.
    Run,
    /// They are stopped when the node's lease ends.
    Stop,
}
