//! torchrun's command line. A flag means what it means there, `_` and `-` are one in its name, and each can be given by
//! the variable `PET_<NAME>`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{FalseyValueParser, OsStringValueParser, TypedValueParser};
use muster_core::types::limits::PROCS_PER_NODE_MAX;
use muster_worker::NumaBinding;

use crate::units::{NodeRange, Span};

/// Every flag of torch 2.11's torchrun, and a few of ours.
#[derive(Clone, Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of torchrun's")]
pub(crate) struct RunArgs {
    /// Nodes, or the fewest and the most.
    #[arg(long, env = "PET_NNODES", default_value = "1:1", value_name = "N|MIN:MAX")]
    pub nnodes: NodeRange,
    /// Ranks per node: a number, or auto, gpu or cpu for as many as there are. Parts of GPUs (MIG)
    /// that CUDA_VISIBLE_DEVICES names are counted, and where it names several each rank sees its
    /// own.
    #[arg(long, alias = "nproc_per_node", env = "PET_NPROC_PER_NODE", default_value = "1", value_name = "N")]
    pub nproc_per_node: ProcsPerNode,
    /// How the nodes meet: static (--master-addr, --node-rank), c10d (--rdzv-endpoint), or muster (a coordinator).
    #[arg(
        long,
        alias = "rdzv_backend",
        env = "PET_RDZV_BACKEND",
        default_value = "static",
        value_name = "BACKEND"
    )]
    pub rdzv_backend: String,
    /// Where the nodes meet, as host:port; a coordinator that speaks TLS as https://host:port.
    #[arg(
        long,
        alias = "rdzv_endpoint",
        env = "PET_RDZV_ENDPOINT",
        default_value = "",
        value_name = "HOST:PORT"
    )]
    pub rdzv_endpoint: String,
    /// Names the run: nodes with the same one meet.
    #[arg(long, alias = "rdzv_id", env = "PET_RDZV_ID", default_value = "none", value_name = "ID")]
    pub rdzv_id: String,
    /// Settings of the rendezvous, as key=value,key=value: join_timeout, last_call_timeout.
    #[arg(long, alias = "rdzv_conf", env = "PET_RDZV_CONF", default_value = "", value_name = "CONF")]
    pub rdzv_conf: String,
    /// One node, this one; flags of the rendezvous are passed over.
    #[arg(long, env = "PET_STANDALONE", value_parser = FalseyValueParser::new())]
    pub standalone: bool,
    /// How often the ranks may start again after a fault.
    #[arg(long, alias = "max_restarts", env = "PET_MAX_RESTARTS", default_value_t = 0, value_name = "N")]
    pub max_restarts: u32,
    /// Nothing is polled here, so this changes nothing.
    #[arg(long, alias = "monitor_interval", env = "PET_MONITOR_INTERVAL", value_name = "SECONDS")]
    pub monitor_interval: Option<f64>,
    /// Ranks are programs of their own here, so this changes nothing.
    #[arg(long, alias = "start_method", env = "PET_START_METHOD", value_parser = ["spawn", "fork", "forkserver"])]
    pub start_method: Option<String>,
    /// Where torchrun records its events, which are not there: null or console, and neither changes anything.
    #[arg(
        long,
        alias = "event_log_handler",
        env = "PET_EVENT_LOG_HANDLER",
        default_value = "null",
        value_name = "NAME"
    )]
    pub event_log_handler: String,
    /// Name of the ranks' role, in ROLE_NAME and before lines of --tee.
    #[arg(long, env = "PET_ROLE", default_value = "default")]
    pub role: String,
    /// The program is a Python module, as with python -m.
    #[arg(short = 'm', long, env = "PET_MODULE", value_parser = FalseyValueParser::new())]
    pub module: bool,
    /// The program is no Python script, and is run as it is.
    #[arg(long, alias = "no_python", env = "PET_NO_PYTHON", value_parser = FalseyValueParser::new())]
    pub no_python: bool,
    /// The script is run by runpy.run_path, under its absolute path.
    #[arg(long, alias = "run_path", env = "PET_RUN_PATH", value_parser = FalseyValueParser::new())]
    pub run_path: bool,
    /// Directory of the logs, in which each run makes one of its own. Default: a temporary one that goes with the run.
    #[arg(
        long,
        alias = "log_dir",
        env = "PET_LOG_DIR",
        value_name = "DIR",
        value_parser = OsStringValueParser::new().map(PathBuf::from)
    )]
    pub log_dir: Option<PathBuf>,
    /// Streams that go to files: 1 standard output, 2 standard error, 3 both; or by local rank, as 0:1,1:2.
    #[arg(short = 'r', long, env = "PET_REDIRECTS", default_value = "0", value_name = "STREAMS")]
    pub redirects: Std,
    /// Streams that go to files and to the terminal, with the rank before each line.
    #[arg(short = 't', long, env = "PET_TEE", default_value = "0", value_name = "STREAMS")]
    pub tee: Std,
    /// Local ranks whose output is shown, as 0,1; that of the others is only in their files. Default: all.
    #[arg(
        long,
        alias = "local_ranks_filter",
        env = "PET_LOCAL_RANKS_FILTER",
        default_value = "",
        value_name = "RANKS"
    )]
    pub local_ranks_filter: RankSet,
    /// Lines of standard output that hold one of these are written to filtered_stdout.log as well; ,, is a comma.
    #[arg(
        long,
        alias = "duplicate_stdout_filters",
        env = "PET_DUPLICATE_STDOUT_FILTERS",
        value_name = "TEXTS"
    )]
    pub duplicate_stdout_filters: Option<Filters>,
    /// The same for standard error, to filtered_stderr.log.
    #[arg(
        long,
        alias = "duplicate_stderr_filters",
        env = "PET_DUPLICATE_STDERR_FILTERS",
        value_name = "TEXTS"
    )]
    pub duplicate_stderr_filters: Option<Filters>,
    /// With --rdzv-backend static: which node this is, from 0, the default; the first one serves the rendezvous.
    #[arg(long, alias = "node_rank", env = "PET_NODE_RANK", value_name = "N")]
    pub node_rank: Option<u32>,
    /// With --rdzv-backend static: address of the first node. Default: 127.0.0.1.
    #[arg(long, alias = "master_addr", env = "PET_MASTER_ADDR", value_name = "HOST")]
    pub master_addr: Option<String>,
    /// With --rdzv-backend static: port at which nodes and ranks meet there. Default: 29500, or any that is free where there is
    /// one node.
    #[arg(long, alias = "master_port", env = "PET_MASTER_PORT", value_name = "PORT")]
    pub master_port: Option<u16>,
    /// Address of this node, at which the others reach it. Default: the one from which it reaches the rendezvous.
    #[arg(long, alias = "local_addr", env = "PET_LOCAL_ADDR", value_name = "HOST")]
    pub local_addr: Option<String>,
    /// With an endpoint of https://, where --token-file is a submitter's: file with a join token, by which this node joins for the run.
    #[arg(long, env = "MUSTER_JOIN_TOKEN_FILE", value_name = "FILE")]
    pub join_token_file: Option<PathBuf>,
    /// A Python class of torchrun's, which cannot be loaded here; only default is taken.
    #[arg(long, alias = "logs_specs", value_name = "NAME")]
    pub logs_specs: Option<String>,
    /// Processors of each rank, near the GPU of its local rank: all of the GPU's NUMA node, all of its socket, a part of the node's
    /// cores that no other rank has, or a core complex of the node.
    #[arg(long, alias = "numa_binding", value_name = "node|socket|exclusive|core-complex")]
    pub numa_binding: Option<NumaBinding>,
    /// Signals that are passed on to the ranks, and end the run. SIGHUP stays ignored under nohup.
    #[arg(
        long,
        alias = "signals_to_handle",
        env = "PET_SIGNALS_TO_HANDLE",
        default_value = "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        value_name = "SIGNALS"
    )]
    pub signals_to_handle: Signals,
    /// Every rank has LOCAL_RANK 0, and sees its own GPU as the first.
    #[arg(long, alias = "virtual_local_rank", env = "PET_VIRTUAL_LOCAL_RANK", value_parser = FalseyValueParser::new())]
    pub virtual_local_rank: bool,
    /// Time between the signal that ends ranks and SIGKILL. Not torchrun's, which has 30s.
    #[arg(long, alias = "stop_grace", env = "PET_STOP_GRACE", default_value = "30s", value_name = "SPAN")]
    pub stop_grace: Span,
    /// The script, and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "SCRIPT")]
    pub command: Vec<OsString>,
}

/// Ranks per node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcsPerNode {
    Count(u32),
    /// One for each GPU, or for each core where there is none.
    Auto,
    Gpu,
    Cpu,
}

impl FromStr for ProcsPerNode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "gpu" | "cuda" => Ok(Self::Gpu),
            "cpu" => Ok(Self::Cpu),
            _ => match text.parse() {
                Ok(count @ 1..=PROCS_PER_NODE_MAX) => Ok(Self::Count(count)),
                Ok(1..) => Err(format!("{text} is more than a node may have, {PROCS_PER_NODE_MAX}")),
                _ => Err(format!("{text:?} is neither a number from 1 nor auto, gpu or cpu")),
            },
        }
    }
}

/// Which streams of which local ranks: bit 0 is standard output, bit 1 standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Std {
    All(u8),
    ByRank(BTreeMap<u32, u8>),
}

impl Std {
    /// Whether a stream of a local rank is among them.
    pub fn has(&self, local_rank: u32, bit: u8) -> bool {
        let bits = match self {
            Self::All(bits) => *bits,
            Self::ByRank(ranks) => ranks.get(&local_rank).copied().unwrap_or(0),
        };
        bits & bit != 0
    }
}

impl FromStr for Std {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is neither 0, 1, 2 or 3 nor a list such as 0:1,1:2");
        let bits = |part: &str| match part {
            "0" => Ok(0),
            "1" => Ok(1),
            "2" => Ok(2),
            "3" => Ok(3),
            _ => Err(bad()),
        };
        if !text.contains(':') {
            return bits(text).map(Self::All);
        }
        let pair = |pair: &str| {
            let (rank, part) = pair.split_once(':').ok_or_else(bad)?;
            Ok::<_, String>((rank.trim().parse::<u32>().map_err(|_| bad())?, bits(part.trim())?))
        };
        text.split(',').map(pair).collect::<Result<_, _>>().map(Self::ByRank)
    }
}

/// Local ranks; none stands for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RankSet(pub BTreeSet<u32>);

impl FromStr for RankSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rank =
            |part: &str| part.trim().parse().map_err(|_| format!("{text:?} is not a list such as 0,1,2"));
        if text.is_empty() {
            Ok(Self::default())
        } else {
            text.split(',').map(rank).collect::<Result<_, _>>().map(Self)
        }
    }
}

/// Texts to look for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filters(pub Vec<String>);

impl FromStr for Filters {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const COMMA: &str = "\0";
        let parts = text.replace(",,", COMMA);
        Ok(Self(
            parts.split(',').filter(|part| !part.is_empty()).map(|part| part.replace(COMMA, ",")).collect(),
        ))
    }
}

/// Signals, as they were written and as they are.
#[derive(Clone, Debug)]
pub(crate) struct Signals {
    pub text: String,
    pub known: Vec<nix::sys::signal::Signal>,
    /// Names that are no signal's, which are passed over as torchrun does it.
    pub unknown: Vec<String>,
}

impl FromStr for Signals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use nix::sys::signal::Signal;
        let (mut known, mut unknown) = (Vec::new(), Vec::new());
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match Signal::from_str(name) {
                Ok(Signal::SIGKILL | Signal::SIGSTOP) => {
                    return Err(format!("{name:?} is no signal that can be handled"));
                }
                Ok(signal) => known.push(signal),
                Err(_) => unknown.push(name.to_owned()),
            }
        }
        Ok(Self { text: text.to_owned(), known, unknown })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    fn run(line: &str) -> Result<RunArgs, String> {
        let words = ["muster", "run"].into_iter().chain(line.split_whitespace());
        match Args::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_come_before_the_script_and_its_own_after_it() {
        let args = run("--nproc_per_node=2 --nnodes 1:4 -m pkg.train --nnodes 7 -r 3 -- --x_y").unwrap();
        assert_eq!(
            (args.nproc_per_node, args.nnodes),
            (ProcsPerNode::Count(2), NodeRange { min: 1, max: 4 })
        );
        assert!(args.module && args.redirects == Std::All(0));
        assert_eq!(args.command, ["pkg.train", "--nnodes", "7", "-r", "3", "--", "--x_y"]);
        let args = run("--nproc 2 --standalone train.py").unwrap();
        assert!(args.standalone && args.nproc_per_node == ProcsPerNode::Count(2), "a name may be cut short");
    }

    #[test]
    fn the_last_of_a_flag_counts_and_what_is_empty_is_as_if_it_were_not_there() {
        let args = run("--nnodes 1 --standalone --standalone --nnodes=2 --role a --role b x").unwrap();
        assert_eq!((args.nnodes, args.role.as_str()), (NodeRange { min: 2, max: 2 }, "b"));
        let args = run("--rdzv-id= --log-dir= --local-addr= --signals-to-handle=TERM,SIGINT x").unwrap();
        assert_eq!((args.rdzv_id.as_str(), args.log_dir), ("", Some(PathBuf::new())));
        assert_eq!(args.signals_to_handle.unknown, ["TERM"]);
    }

    #[test]
    fn streams_and_filters_are_read_as_torchrun_reads_them() {
        let args =
            run("-r 0:1,1:2 -t 3 --local-ranks-filter 0,2 --duplicate-stdout-filters a,,b,c x").unwrap();
        assert_eq!(args.redirects, Std::ByRank([(0, 1), (1, 2)].into()));
        assert!(args.redirects.has(0, 1) && !args.redirects.has(0, 2) && !args.redirects.has(5, 1));
        assert!(args.tee.has(7, 1) && args.tee.has(7, 2));
        assert_eq!(args.local_ranks_filter.0, [0, 2].into());
        assert_eq!(args.duplicate_stdout_filters, Some(Filters(vec!["a,b".into(), "c".into()])));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, expected) in [
            ("--nproc-per-node 0 x", "is neither a number from 1"),
            ("--nproc-per-node 100000000 x", "100000000 is more than a node may have, 1024"),
            ("--nnodes 3:x y", "is neither N nor MIN:MAX"),
            ("-r 4 x", "is neither 0, 1, 2 or 3"),
            ("--signals-to-handle SIGKILL x", "is no signal that can be handled"),
            ("--local-ranks-filter a x", "is not a list such as"),
            ("--numa-binding all x", "is none of node, socket, exclusive and core-complex"),
            ("--nproc-per-node 2", "SCRIPT"),
        ] {
            let error = run(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
