//! What the recovery bench hurts: the same two nodes of ranks, under Muster or under torchrun.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use muster_tests::{Bed, Settings, is_running, processes_with};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// torchrun as its options allow it to be at best: it notices what its agents see at once, and its rendezvous loses a
/// node after three seconds.
const TUNED: [&str; 2] = [
    "--monitor-interval=0.02",
    "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60,read_timeout=60",
];
/// What both sides' ranks have in their environment.
const COMMON: [(&str, &str); 2] = [("OMP_NUM_THREADS", "1"), ("GLOO_SOCKET_IFNAME", "lo")];
/// Longest wait for what was killed to be gone.
const GONE_MAX: Duration = Duration::from_secs(10);

/// The job that is started, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// As `--nnodes` takes it; there are two nodes.
    pub nnodes: &'static str,
    /// Ranks of a node.
    pub nproc: &'static str,
}

impl Shape {
    /// Ranks of both nodes.
    pub(crate) fn ranks(self) -> usize {
        2 * self.nproc.parse::<usize>().unwrap()
    }
}

/// A line of a rank.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// Unix seconds.
    pub time: f64,
    pub what: String,
    pub pid: i32,
    /// The same for all ranks of a generation.
    pub token: String,
    pub world: usize,
}

/// One side with its job.
pub(crate) enum Subject {
    Muster(Box<Bed>),
    Torchrun(Torchrun),
}

impl Subject {
    /// Muster with this lease; empty for its own.
    pub(crate) fn muster(shape: Shape, lease: &'static str, python: &Path, probe: &Path) -> Self {
        let [omp, gloo] = COMMON.map(|(key, value)| format!("{key}={value}"));
        let flags = ["--nnodes", shape.nnodes, "--nproc-per-node", shape.nproc, "--max-restarts", "3"];
        let flags = [&flags[..], &["--env", &omp, "--env", &gloo]].concat();
        let rank = format!("exec {} {}\n", python.display(), probe.display());
        Self::Muster(Box::new(Bed::start(Settings { lease, ..Settings::default() }, &flags, &rank)))
    }

    /// torchrun, as it comes or tuned.
    pub(crate) fn torchrun(shape: Shape, tuned: bool, python: &Path, probe: &Path) -> Self {
        Self::Torchrun(Torchrun::start(shape, tuned, python, probe))
    }

    /// Everything that the ranks said.
    pub(crate) fn events(&self) -> Vec<Event> {
        let dir = match self {
            Self::Muster(bed) => bed.cluster.dir.path().join("bed"),
            Self::Torchrun(torchrun) => torchrun.dir.path().to_owned(),
        };
        let text = std::fs::read_to_string(dir.join("events")).unwrap_or_default();
        let parse = |line: &str| {
            let mut words = line.split(' ');
            Some(Event {
                time: words.next()?.parse().ok()?,
                what: words.next()?.to_owned(),
                pid: words.next()?.parse().ok()?,
                token: words.next()?.to_owned(),
                world: words.next()?.parse().ok()?,
            })
        };
        text.lines().filter_map(parse).collect()
    }

    /// Processes of the second node: first its daemon, then what that has started.
    pub(crate) fn second_node(&self) -> Vec<i32> {
        match self {
            Self::Muster(bed) => {
                [vec![bed.cluster.workers[1].pid()], bed.shims(Some("n2")), bed.ranks(Some("n2"))].concat()
            }
            Self::Torchrun(torchrun) => torchrun.node("b"),
        }
    }

    /// What the job consists of on both nodes; torchrun's agents are of it.
    fn job(&self) -> Vec<i32> {
        match self {
            Self::Muster(bed) => [bed.shims(None), bed.ranks(None)].concat(),
            Self::Torchrun(torchrun) => torchrun.node(""),
        }
    }

    /// Starts the daemon of the second node again, as what supervises it does.
    pub(crate) fn restart_daemon(&mut self) {
        match self {
            // Its guard reaps the old one; that is dead already.
            Self::Muster(bed) => bed.restart_worker(1, Duration::ZERO),
            Self::Torchrun(torchrun) => {
                let again = torchrun.agent("c");
                torchrun.agents.push(again);
            }
        }
    }

    /// How often a second daemon has taken over its predecessor's ranks and joined.
    pub(crate) fn adoptions(&self) -> usize {
        match self {
            Self::Muster(bed) => {
                let log = bed.cluster.workers[1].log();
                let (joins, adoptions) = (log.matches(": joined "), log.matches("a shim is adopted"));
                adoptions.count().min(joins.count().saturating_sub(1))
            }
            Self::Torchrun(_) => 0,
        }
    }

    /// Its daemons' last words.
    pub(crate) fn last_words(&self) -> String {
        match self {
            Self::Muster(bed) => bed.job().to_string(),
            Self::Torchrun(torchrun) => {
                let log = std::fs::read_to_string(torchrun.dir.path().join("log")).unwrap_or_default();
                log.chars().skip(log.chars().count().saturating_sub(1000)).collect()
            }
        }
    }
}

impl Drop for Subject {
    /// Nothing of it may take the next one's time.
    fn drop(&mut self) {
        let daemons = match self {
            Self::Muster(bed) => bed.cluster.workers.iter().map(muster_tests::Daemon::pid).collect(),
            Self::Torchrun(_) => Vec::new(),
        };
        // Daemons first: they would start ranks anew.
        signal_all(&daemons, Signal::SIGKILL);
        let began = std::time::Instant::now();
        loop {
            let left: Vec<i32> = self.job().into_iter().filter(|pid| is_running(*pid)).collect();
            if left.is_empty() || began.elapsed() > GONE_MAX {
                break;
            }
            signal_all(&left, Signal::SIGKILL);
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Self::Torchrun(torchrun) = self {
            for agent in &mut torchrun.agents {
                agent.wait().ok();
            }
        }
    }
}

/// Signals each of them; some may be gone.
pub(crate) fn signal_all(pids: &[i32], signal: Signal) {
    for pid in pids {
        kill(Pid::from_raw(*pid), signal).ok();
    }
}

/// Two agents; the first hosts the rendezvous and is never hurt.
pub(crate) struct Torchrun {
    dir: tempfile::TempDir,
    agents: Vec<Child>,
    shape: Shape,
    tuned: bool,
    python: PathBuf,
    probe: PathBuf,
    endpoint: String,
    mark: String,
}

impl Torchrun {
    fn start(shape: Shape, tuned: bool, python: &Path, probe: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut this = Self {
            // A directory's name is of this run alone, so its processes are found by it.
            mark: format!("BENCH_NODE={}-", dir.path().display()),
            endpoint: format!("127.0.0.1:{}", muster_tests::free_port()),
            python: python.to_owned(),
            probe: probe.to_owned(),
            agents: Vec::new(),
            dir,
            shape,
            tuned,
        };
        this.agents = ["a", "b"].map(|node| this.agent(node)).into();
        this
    }

    fn agent(&self, node: &str) -> Child {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log"));
        let log = log.unwrap();
        let host = format!("is_host={}", u8::from(node == "a"));
        let mut args = vec![
            format!("--nnodes={}", self.shape.nnodes),
            format!("--nproc-per-node={}", self.shape.nproc),
            "--max-restarts=3".to_owned(),
            "--rdzv-backend=c10d".to_owned(),
            "--rdzv-id=bench".to_owned(),
            format!("--rdzv-endpoint={}", self.endpoint),
        ];
        if self.tuned {
            let [interval, conf] = TUNED;
            args.extend([interval.to_owned(), format!("{conf},{host}")]);
        } else {
            args.push(format!("--rdzv-conf={host}"));
        }
        let (key, value) = self.mark.split_once('=').unwrap();
        let mut command = Command::new(&self.python);
        command.args(["-m", "torch.distributed.run"]).args(args).arg(&self.probe);
        command.env(key, format!("{value}{node}")).env("BED", self.dir.path()).envs(COMMON);
        // By default it keeps one store for all attempts, and ranks that start again read the addresses of dead ones.
        command.env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    fn node(&self, node: &str) -> Vec<i32> {
        let mut pids: Vec<i32> =
            processes_with(&format!("{}{node}", self.mark)).into_iter().map(|(pid, _)| pid).collect();
        // The agent is older than its ranks.
        pids.sort_by_key(|pid| !self.agents.iter().any(|agent| i32::try_from(agent.id()) == Ok(*pid)));
        pids
    }
}
