//! Every flag. Names are those of torchrun and Slurm where they have one.

mod daemon;
mod limits;
mod submit;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use muster_coordinator::LoopbackUsers;
use muster_worker::trust::{self, Token, Trust};

use daemon::socket_address;
pub(crate) use daemon::{DaemonArgs, LogFormat};
pub(crate) use limits::LimitArgs;
pub(crate) use submit::{CoordinatorLoss, SubmitArgs};
pub(crate) use worker::{DoctorArgs, HealthcheckArgs, WorkerArgs};

use crate::exit::Failure;
use crate::output::say;
use crate::pki::PkiCommand;
use crate::run::args::RunArgs;
use crate::store::{EtcdArgs, SeveralArgs, Store, StoreCommand};
use crate::token::TokenCommand;
use crate::units::Span;

const EXIT_CODES: &str = "\
Exit codes:
  0    done; with --follow: the job succeeded
  1    the job failed, or something went wrong that is not listed here
  2    the command line or the job file is wrong
  3    no coordinator can be reached, or a node that holds the logs cannot
  4    there is no such job or node
  5    the coordinator refuses the request and says why
  6    the job was cancelled
  130  interrupted";

const RUN_EXAMPLES: &str = "\
Examples:
  muster run --standalone --nproc-per-node 4 train.py --lr 0.1
  muster run --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-1:29400 train.py
  alias torchrun='muster run'";

const SUBMIT_EXAMPLES: &str = "\
Examples:
  muster submit --nnodes 2 --nproc-per-node 4 --follow -- train.py --lr 0.1
  muster submit --nnodes 2 --gpus-per-proc 1 -- /opt/env/bin/python -m pkg.train
  muster submit --file job.toml";

const DEMO_EXAMPLE: &str = "\
Example:
  muster demo --short

Leaves nothing behind. `cargo xtask demo` also fetches and builds what it needs.";

/// Multi-node training: submit a program, every node runs its ranks, loss and logs stream back.
#[derive(Debug, Parser)]
#[command(name = "muster", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command that talks to a coordinator.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Global {
    /// URLs of the coordinators, tried in turn.
    #[arg(
        long,
        global = true,
        env = "MUSTER_COORDINATOR",
        default_value = "http://127.0.0.1:7070",
        value_delimiter = ',',
        value_name = "URL"
    )]
    pub coordinator: Vec<String>,
    /// Certificate of the authority that has signed the coordinators', in PEM: the ca.crt of `muster pki init`. For https:// URLs.
    #[arg(long, global = true, env = "MUSTER_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// File with the token that is shown to coordinators, as `muster token create` printed it. For https:// URLs.
    #[arg(long, global = true, env = "MUSTER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// How results are printed. JSON has the names that grpcurl shows; streams print an object per line.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

impl Global {
    /// Which coordinators are trusted.
    pub fn trust(&self) -> Result<Trust, Failure> {
        self.ca.as_deref().map_or(Ok(Trust::default()), Trust::from_file).map_err(Failure::Usage)
    }

    /// Returns the URLs of the coordinators as they are called.
    pub fn urls(&self) -> Result<Vec<String>, Failure> {
        trust::urls(&self.coordinator).map_err(Failure::Usage)
    }

    /// What coordinators are shown.
    pub fn token(&self) -> Result<Option<Token>, Failure> {
        if let Some(warning) = self.token_file.as_deref().and_then(muster_worker::secret_file_warning) {
            say!("warning: {warning}");
        }
        self.token_file.as_deref().map(Token::from_file).transpose().map_err(Failure::Usage)
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the coordinator: submission, rendezvous, scheduling.
    #[command(after_help = "Example:\n  muster coordinator --data-dir /var/lib/muster\n  \
                            muster coordinator --listen '[::]:7070' --tls-dir /etc/muster/tls")]
    Coordinator(Box<CoordinatorArgs>),
    /// Run the node daemon: launches the ranks of this machine.
    #[command(
        after_help = "Example:\n  muster worker --coordinator http://10.0.0.1:7070 --data-dir /var/lib/muster-worker"
    )]
    Worker(WorkerArgs),
    /// Hold the ranks of one gang; the node daemon starts it.
    #[command(hide = true)]
    Shim,
    /// Run a program as torchrun does, with torchrun's command line.
    #[command(after_help = RUN_EXAMPLES, infer_long_args = true, args_override_self = true)]
    Run(Box<RunArgs>),
    /// Submit a job; prints its id.
    #[command(after_help = SUBMIT_EXAMPLES)]
    Submit(Box<SubmitArgs>),
    /// List jobs, newest first.
    #[command(after_help = "Example:\n  muster jobs --state running")]
    Jobs(JobsArgs),
    /// Show one job.
    #[command(after_help = "Example:\n  muster job k3v9x2ma --output json")]
    Job(ShowJobArgs),
    /// Say why a job is where it is, and what to do.
    #[command(after_help = "Example:\n  muster explain k3v9x2ma")]
    Explain(JobArgs),
    /// Print what a job's ranks wrote.
    #[command(after_help = "Example:\n  muster logs k3v9x2ma --rank 0 -f")]
    Logs(LogsArgs),
    /// Print the values that a job's ranks reported.
    #[command(after_help = "Example:\n  muster metrics k3v9x2ma -f --rank 0")]
    Metrics(MetricsArgs),
    /// Draw a curve, such as the loss, in the terminal.
    #[command(after_help = "Example:\n  muster plot k3v9x2ma --key accuracy")]
    Plot(PlotArgs),
    /// List nodes.
    #[command(after_help = "Example:\n  muster nodes --output json")]
    Nodes,
    /// Show one node.
    #[command(after_help = "Example:\n  muster node gpu-7")]
    Node(NodeArgs),
    /// Say what is wrong with this host before its first job, and how to mend it.
    #[command(
        after_help = "Example:\n  muster doctor --coordinator http://10.0.0.1:7070 --peer gpu-7 --peer gpu-8"
    )]
    Doctor(DoctorArgs),
    /// Exit with 0 if a coordinator serves and with 1 if not, for probes that run a program.
    #[command(
        after_help = "Example:\n  muster healthcheck --coordinator http://127.0.0.1:7070 --service live"
    )]
    Healthcheck(HealthcheckArgs),
    /// Stop a job for good.
    #[command(after_help = "Example:\n  muster cancel k3v9x2ma --reason 'wrong data'")]
    Cancel(CancelArgs),
    /// Give a node no new work; what runs there goes on.
    #[command(after_help = "Example:\n  muster cordon gpu-7 --reason 'fan replaced on Monday'")]
    Cordon(CordonArgs),
    /// Empty a node: its jobs are stopped in good order and start again elsewhere, without spending a restart.
    #[command(after_help = "Example:\n  muster drain gpu-7 --timeout 5m --reason 'new kernel'")]
    Drain(DrainArgs),
    /// Give a cordoned or drained node work again.
    #[command(after_help = "Example:\n  muster uncordon gpu-7")]
    Uncordon(NodeArgs),
    /// Make the keys and certificates for encrypted connections.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Make, list and revoke the tokens that callers and nodes show.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Move a cluster between kinds of store, or keep a copy of it.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Start a coordinator and two workers here, and train a small network with DDP on them.
    #[command(after_help = DEMO_EXAMPLE)]
    Demo(DemoArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CoordinatorArgs {
    /// Address to serve gRPC on; port 0 takes any free one and prints it in the first line of the
    /// log. `[::]` is every address of this machine, of IPv6 and IPv4.
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDRESS", value_parser = socket_address)]
    pub listen: SocketAddr,
    /// Directory for the store and the metrics.
    #[arg(long, default_value = "muster-coordinator", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Where jobs and nodes are kept: `redb`, a file in the data directory; `memory`, gone with the
    /// process; or `etcd://HOST:PORT,HOST:PORT/NAME`, which makes this coordinator one of several
    /// (NAME is the cluster's; by default muster). Addresses of IPv6 stand in brackets; a user goes
    /// with --etcd-user, never into the URL.
    #[arg(long, default_value = "redb", value_name = "STORE")]
    pub store: Store,
    #[command(flatten)]
    pub etcd: EtcdArgs,
    #[command(flatten)]
    pub several: SeveralArgs,
    /// Time without a heartbeat after which a node is lost.
    #[arg(long, default_value = "10s")]
    pub lease: Span,
    /// Time between heartbeats, at most a third of the lease.
    #[arg(long, default_value = "1s")]
    pub heartbeat: Span,
    /// Directory with tls.crt, tls.key and ca.crt, as `muster pki init` makes it: connections are encrypted, and clients call by
    /// https:// with --ca and --token-file. The files may change while it runs.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// How long certificates of nodes are good; they renew them by themselves. For --tls-dir, whose ca.key signs them.
    #[arg(long, default_value = "24h", value_name = "SPAN")]
    pub node_cert_lifetime: Span,
    /// Serve on an address that is not loopback: whoever reaches it can run programs on every node.
    #[arg(long)]
    pub insecure: bool,
    /// Users of this machine who may call on a port of loopback without TLS, by name or id, besides root and the user who runs
    /// the coordinator; or `any`. Ranks and node daemons of other users need it.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = loopback_users, value_name = "NAME,…|any")]
    pub loopback_users: LoopbackUsers,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Address of a second port that serves nothing but the gRPC health service, in plain text: for probes of Kubernetes,
    /// which neither encrypt nor say who they are. Ready is who leads; the service `live` is well while the process is.
    #[arg(long, value_name = "ADDRESS", value_parser = socket_address)]
    pub health_listen: Option<SocketAddr>,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

fn loopback_users(names: &str) -> Result<LoopbackUsers, String> {
    let id = |name: &str| match name.parse() {
        Ok(id) => Ok(id),
        Err(_) => match nix::unistd::User::from_name(name) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            Ok(None) => Err(format!("this machine has no user {name:?}")),
            Err(error) => Err(format!("user {name:?} cannot be looked up: {error}")),
        },
    };
    match names {
        "" => Ok(LoopbackUsers::Own),
        "any" => Ok(LoopbackUsers::Any),
        names => Ok(LoopbackUsers::Also(names.split(',').map(id).collect::<Result<_, _>>()?)),
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct JobsArgs {
    /// Only jobs in this state, such as running; may be repeated.
    #[arg(long = "state", value_name = "STATE")]
    pub states: Vec<String>,
    /// Only jobs of this owner, as the list names it.
    #[arg(long, value_name = "NAME")]
    pub owner: Option<String>,
    /// Only jobs of who calls.
    #[arg(long, conflicts_with = "owner")]
    pub mine: bool,
    /// Jobs that have ended, too; without it the last ten of them.
    #[arg(long, short)]
    pub all: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct JobArgs {
    /// The job's id.
    #[arg(value_name = "ID")]
    pub job_id: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ShowJobArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Only what its nodes add to the environment of the ranks of their own accord, and why.
    #[arg(long)]
    pub env: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Stay and print what comes, until the ranks have ended.
    #[arg(long, short)]
    pub follow: bool,
    /// Only this rank; then its bytes are printed as they are.
    #[arg(long)]
    pub rank: Option<u32>,
    /// Only this stream. Each goes to the same one here: standard error to standard error.
    #[arg(long, value_enum)]
    pub stream: Option<LogStream>,
    /// An earlier start of the job.
    #[arg(long)]
    pub generation: Option<u32>,
}

/// A stream of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

#[derive(Debug, clap::Args)]
pub(crate) struct MetricsArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Stay and print what comes, until the job has ended.
    #[arg(long, short)]
    pub follow: bool,
    /// Only this rank.
    #[arg(long)]
    pub rank: Option<u32>,
    /// Print every point that was kept, in place of the thinned curve of a long run.
    #[arg(long)]
    pub full: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlotArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Name of the value to draw.
    #[arg(long, default_value = "loss")]
    pub key: String,
    /// The rank whose values are drawn.
    #[arg(long, default_value_t = 0)]
    pub rank: u32,
    /// Stay and draw again as values come, until the job has ended.
    #[arg(long, short)]
    pub follow: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    /// The node's name.
    #[arg(value_name = "NODE")]
    pub node_name: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CordonArgs {
    #[command(flatten)]
    pub node: NodeArgs,
    /// Why, for whoever wonders.
    #[arg(long, default_value = "")]
    pub reason: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    pub node: NodeArgs,
    /// Why, for whoever wonders.
    #[arg(long, default_value = "")]
    pub reason: String,
    /// Longest time that ranks get to end in before they are killed. Default: each job's --stop-grace.
    #[arg(long, value_name = "SPAN")]
    pub timeout: Option<Span>,
    /// Return at once rather than when the node is empty.
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CancelArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Why, for whoever wonders.
    #[arg(long, default_value = "")]
    pub reason: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// A few seconds of training on a part of the data, without a bar for the accuracy.
    #[arg(long)]
    pub short: bool,
    /// Keep the daemons' directory with its logs, and say where it is.
    #[arg(long)]
    pub keep: bool,
    /// Further arguments of `muster-trainer vision`.
    #[arg(last = true, value_name = "TRAINER ARGS")]
    pub trainer: Vec<String>,
}
