//! How the ranks of `muster run` differ from those of a daemon: they belong to whoever runs the command. They write to
//! its terminal or where it says, as under torchrun, and end when it does.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use muster_core::types::surroundings::RankBinding;
use muster_core::types::{Assignment, Generation, JobSpec};
use serde::{Deserialize, Serialize};

/// What `muster run` says of its ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Removed by whoever goes last, the command or its shim. Holds the data directory, and nothing of anybody else's.
    #[serde(with = "crate::os_text")]
    pub scratch: PathBuf,
    /// Holds `attempt_<n>/<local rank>/{stdout.log,stderr.log,error.json}`, n counted from 0. Absolute.
    #[serde(with = "crate::os_text")]
    pub log_dir: PathBuf,
    /// Program and arguments. What a coordinator says is not run: whoever reaches that of a run could say anything.
    #[serde(with = "crate::os_text::words")]
    pub command: Vec<OsString>,
    /// Where the ranks start. Absolute.
    #[serde(with = "crate::os_text")]
    pub working_dir: PathBuf,
    /// What TORCHELASTIC_RUN_ID says.
    pub run_id: String,
    /// What ROLE_NAME says.
    pub role: String,
    /// What TORCHELASTIC_SIGNALS_TO_HANDLE says.
    pub signals: String,
    /// Where the ranks' store serves on the first node; 0 for any port that is free.
    pub store_port: u16,
    /// What MASTER_ADDR and MASTER_PORT say, if not where the store serves: whoever listens there passes ranks on to it.
    pub master: Option<(String, u16)>,
    /// Where ranks run on this machine; none for wherever this process may.
    pub bindings: Vec<RankBinding>,
    /// Every rank has LOCAL_RANK 0 and sees one GPU.
    pub virtual_local_rank: bool,
    /// Standard output.
    pub stdout: Streams,
    /// Standard error.
    pub stderr: Streams,
}

/// Where one stream of the local ranks goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    /// Local ranks whose stream goes to their file.
    pub to_file: BTreeSet<u32>,
    /// Of the others, those whose stream goes nowhere. The rest have the command's own.
    pub to_nothing: BTreeSet<u32>,
}

impl Attached {
    /// Returns an assignment as it is carried out here: the coordinator of a run says when, how many and with which
    /// place, and never what runs, as whom, or with which files. Fields that are new are not taken from it either.
    /// Of words that are no text it holds what can be shown; [`Attached`] has them as they are.
    pub(crate) fn own(&self, mut assignment: Assignment) -> Assignment {
        let said = assignment.spec;
        assignment.spec = JobSpec {
            name: said.name,
            min_nodes: said.min_nodes,
            max_nodes: said.max_nodes,
            procs_per_node: said.procs_per_node,
            per_proc: said.per_proc,
            max_restarts: said.max_restarts,
            stop_grace: said.stop_grace,
            stop_signal: said.stop_signal,
            start_timeout: said.start_timeout,
            progress_timeout: said.progress_timeout,
            last_call: said.last_call,
            on_coordinator_loss: said.on_coordinator_loss,
            working_dir: Some(self.working_dir.to_string_lossy().into_owned()),
            ..JobSpec::new(self.command.iter().map(|word| word.to_string_lossy().into_owned()).collect())
        };
        assignment
    }

    /// The directory of one local rank's files.
    pub fn rank_dir(&self, generation: Generation, local_rank: u32) -> PathBuf {
        let attempt = generation.0.saturating_sub(1);
        self.log_dir.join(format!("attempt_{attempt}")).join(local_rank.to_string())
    }
}

/// Where one stream of one rank goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    File(PathBuf),
    /// The same as this process's.
    Inherited,
    Nothing,
}

impl Sink {
    fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Inherited | Self::Nothing => None,
        }
    }
}

/// Where one rank writes.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub stdout: Sink,
    pub stderr: Sink,
    pub error_file: PathBuf,
    /// Whether it may read what this process may.
    pub reads_input: bool,
}

impl Output {
    /// A daemon's rank writes to its log directory.
    pub fn in_dir(log_dir: &Path) -> Self {
        let [stdout, stderr] = ["stdout.log", "stderr.log"].map(|name| Sink::File(log_dir.join(name)));
        Self { stdout, stderr, error_file: log_dir.join("error.json"), reads_input: false }
    }

    pub fn attached(attached: &Attached, generation: Generation, local_rank: u32) -> Self {
        let dir = attached.rank_dir(generation, local_rank);
        let sink = |streams: &Streams, name: &str| match local_rank {
            rank if streams.to_file.contains(&rank) => Sink::File(dir.join(name)),
            rank if streams.to_nothing.contains(&rank) => Sink::Nothing,
            _ => Sink::Inherited,
        };
        Self {
            stdout: sink(&attached.stdout, "stdout.log"),
            stderr: sink(&attached.stderr, "stderr.log"),
            error_file: dir.join("error.json"),
            reads_input: true,
        }
    }

    /// The file of its standard output, if it is one.
    pub fn stdout_file(&self) -> Option<&Path> {
        self.stdout.file()
    }

    /// The file of its standard error, if it is one.
    pub fn stderr_file(&self) -> Option<&Path> {
        self.stderr.file()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use muster_core::types::surroundings::Surroundings;
    use muster_core::types::{
        DesiredPhase, GangId, JobId, Millis, NodeName, NodePlacement, Rank, StopMode, StopSignal, UserName,
    };

    use super::*;

    /// An assignment as a hostile coordinator of a run may send it.
    fn hostile() -> Assignment {
        let mine = |text: &str| Some(text.to_owned());
        let spec = JobSpec {
            env: [("LD_PRELOAD".to_owned(), "/tmp/evil.so".to_owned())].into(),
            env_files: [("KEY".to_owned(), "/home/ann/.ssh/id_ed25519".to_owned())].into(),
            working_dir: mine("/evil"),
            checkpoint_dir: mine("/evil"),
            tensorboard_dir: mine("/home/ann"),
            metric_pattern: mine("(?<secret>.*)"),
            run_as: Some(UserName::new("bob").unwrap()),
            max_restarts: 3,
            stop_grace: Millis(7),
            ..JobSpec::new(vec!["/evil".to_owned()])
        };
        Assignment {
            gang: GangId { job: JobId::new("k3v9x2ma").unwrap(), generation: Generation(2) },
            phase: DesiredPhase::Running,
            spec,
            placement: NodePlacement {
                node: NodeName::new("n1").unwrap(),
                address: [10, 0, 0, 1].into(),
                group_rank: 0,
                first_rank: Rank(0),
                procs: 1,
                gpus: Vec::new(),
            },
            world_size: 1,
            group_world_size: 1,
            master_addr: [10, 0, 0, 1].into(),
            master_port: None,
            restart_count: 0,
            stop: StopMode { signal: StopSignal::default(), grace: Millis(0), dump_stacks: false },
        }
    }

    #[test]
    fn a_run_says_itself_what_runs_and_takes_from_its_port_when() {
        let attached = Attached {
            command: vec!["train.py".into()],
            working_dir: "/home/ann".into(),
            ..Attached::default()
        };
        let spec = attached.own(hostile()).spec;
        let expected = JobSpec {
            working_dir: Some("/home/ann".to_owned()),
            max_restarts: 3,
            stop_grace: Millis(7),
            max_nodes: spec.max_nodes,
            ..JobSpec::new(vec!["train.py".to_owned()])
        };
        assert_eq!(spec, expected);
    }

    #[test]
    fn its_ranks_find_nothing_of_the_ports_in_their_environment() {
        use crate::launch::environment::{RankContext, of_rank};
        let attached = Attached { command: vec!["train.py".into()], ..Attached::default() };
        let surroundings = Surroundings::default();
        let context = RankContext {
            error_file: Path::new("/e"),
            telemetry: Path::new("/t"),
            mark: "m",
            attached: Some(&attached),
            surroundings: Some(&surroundings),
            user: None,
            from_files: &BTreeMap::new(),
        };
        let env = of_rank(&attached.own(hostile()), 0, 1, context, std::iter::empty());
        for name in ["LD_PRELOAD", "MUSTER_CHECKPOINT_DIR"] {
            assert!(!env.contains_key(std::ffi::OsStr::new(name)), "{name}");
        }
    }
}
