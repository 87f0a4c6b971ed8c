//! The job specification: checked, with its defaults filled in.

mod environment;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use environment::RESERVED_ENV;

use super::{CoordinatorLoss, MetricPattern, Millis, Resources, StopSignal, UserName, ids::is_name_char};

/// Bounds on what one job may ask for, each with its reason.
pub mod limits {
    use super::Millis;

    /// Longest name: it becomes a column in listings and a label in metrics.
    pub const NAME_BYTES_MAX: usize = 128;
    /// Most arguments of a command.
    pub const COMMAND_ARGS_MAX: usize = 1024;
    /// Longest single argument or variable: Linux's MAX_ARG_STRLEN is 128 KiB, terminator included.
    pub const ARG_BYTES_MAX: usize = 128 * 1024 - 1;
    /// All arguments and variables together: a spec travels to every node and is stored with its job.
    pub const SPEC_BYTES_MAX: usize = 256 * 1024;
    /// Most environment variables.
    pub const ENV_VARS_MAX: usize = 1024;
    /// Most variables that come from files: each is read before the ranks start.
    pub const ENV_FILES_MAX: usize = 64;
    /// Longest path, Linux's PATH_MAX.
    pub const PATH_BYTES_MAX: usize = 4096;
    /// Most labels in a node selector.
    pub const SELECTOR_LABELS_MAX: usize = 64;
    /// Longest label key or value.
    pub const NODE_LABEL_BYTES_MAX: usize = 256;
    /// Most nodes in a gang.
    pub const NODES_MAX: u32 = 16_384;
    /// Most ranks on a node: far above any number of GPUs or cores in one machine.
    pub const PROCS_PER_NODE_MAX: u32 = 1024;
    /// Most ranks in a gang: what the largest published training runs use, times four.
    pub const WORLD_SIZE_MAX: u32 = 131_072;
    /// Most restarts of a gang.
    pub const RESTARTS_MAX: u32 = 100_000;
    /// Longest grace or start timeout.
    pub const SPAN_MAX: Millis = Millis::from_secs(24 * 3600);
    /// Default time between SIGTERM and SIGKILL, torchrun's.
    pub const STOP_GRACE_DEFAULT: Millis = Millis::from_secs(30);
    /// Default time from placement until every rank runs.
    pub const START_TIMEOUT_DEFAULT: Millis = Millis::from_secs(120);
}

/// Label of nodes that a `muster run` has brought, with its run's id: they take that run's job and no other.
pub const RUN_LABEL: &str = "muster.run";
/// Label of such a node: which of the run's nodes it is, from 0, where whoever started it says so.
pub const RUN_RANK_LABEL: &str = "muster.run.rank";

/// A checked job specification. Made by [`JobSpec::check`]; the counts are at least 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Name for listings.
    pub name: String,
    /// Program and arguments; the first is not empty.
    pub command: Vec<String>,
    /// Variables added to every rank's environment.
    pub env: BTreeMap<String, String>,
    /// Variables whose values each node reads from a file of its own: the name, and the file's absolute path.
    #[serde(default)]
    pub env_files: BTreeMap<String, String>,
    /// Absolute directory the ranks start in; none means the log directory.
    pub working_dir: Option<String>,
    /// Fewest nodes.
    pub min_nodes: u32,
    /// Most nodes, at least `min_nodes`.
    pub max_nodes: u32,
    /// Ranks per node.
    pub procs_per_node: u32,
    /// What each rank holds.
    pub per_proc: Resources,
    /// Restarts allowed after faults.
    pub max_restarts: u32,
    /// Higher is placed first.
    pub priority: i32,
    /// Labels a node must carry.
    pub node_selector: BTreeMap<String, String>,
    /// Handed to the ranks as MUSTER_CHECKPOINT_DIR.
    pub checkpoint_dir: Option<String>,
    /// Time between SIGTERM and SIGKILL.
    pub stop_grace: Millis,
    /// Longest time from placement until every rank runs.
    pub start_timeout: Millis,
    /// Longest time without a sign of progress of any rank; 0 for ever.
    #[serde(default)]
    pub progress_timeout: Millis,
    /// How long the first start waits for more than the fewest nodes, once those are there.
    #[serde(default)]
    pub last_call: Millis,
    /// Asks the ranks to end.
    #[serde(default)]
    pub stop_signal: StopSignal,
    /// Whether ranks run on when only the coordinator is gone.
    #[serde(default)]
    pub on_coordinator_loss: CoordinatorLoss,
    /// Where the program writes TensorBoard event files; relative to where the ranks start.
    #[serde(default)]
    pub tensorboard_dir: Option<String>,
    /// Makes points of lines of output; a [`MetricPattern`].
    #[serde(default)]
    pub metric_pattern: Option<String>,
    /// User of the nodes as whom the ranks run; none for whom the node has for that.
    #[serde(default)]
    pub run_as: Option<UserName>,
}

/// One thing that is wrong with a specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {description}")]
pub struct SpecError {
    /// Field of JobSpec, by its proto name, such as `env["RANK"]`.
    pub field: String,
    /// What is wrong and what to do, as a lowercase fragment.
    pub description: String,
}

impl JobSpec {
    /// One rank of a command, with every default; not checked yet.
    pub fn new(command: Vec<String>) -> Self {
        Self {
            name: String::new(),
            command,
            env: BTreeMap::new(),
            env_files: BTreeMap::new(),
            working_dir: None,
            min_nodes: 1,
            max_nodes: 0,
            procs_per_node: 1,
            per_proc: Resources::default(),
            max_restarts: 0,
            priority: 0,
            node_selector: BTreeMap::new(),
            checkpoint_dir: None,
            stop_grace: limits::STOP_GRACE_DEFAULT,
            start_timeout: limits::START_TIMEOUT_DEFAULT,
            progress_timeout: Millis(0),
            last_call: Millis(0),
            stop_signal: StopSignal::default(),
            on_coordinator_loss: CoordinatorLoss::default(),
            tensorboard_dir: None,
            metric_pattern: None,
            run_as: None,
        }
    }

    /// Checks every rule, fills in the name, and returns every violation rather than the first.
    pub fn check(mut self) -> Result<Self, Vec<SpecError>> {
        let mut errors = Errors(Vec::new());
        self.check_command(&mut errors);
        self.check_env(&mut errors);
        self.check_counts(&mut errors);
        self.check_rest(&mut errors);
        self.check_telemetry(&mut errors);
        if errors.0.is_empty() { Ok(self) } else { Err(errors.0) }
    }

    /// Ranks in a gang of `nodes` nodes.
    pub fn world_size(&self, nodes: u32) -> u32 {
        nodes * self.procs_per_node
    }

    /// Bytes of all its texts, which are most of what it costs to keep.
    pub fn bytes(&self) -> usize {
        let pairs = |map: &BTreeMap<String, String>| -> usize {
            map.iter().map(|(key, value)| key.len() + value.len()).sum()
        };
        let texts = [&self.working_dir, &self.checkpoint_dir, &self.tensorboard_dir, &self.metric_pattern];
        let command: usize = self.command.iter().map(String::len).sum();
        let texts: usize = texts.into_iter().flatten().map(String::len).sum();
        let maps = pairs(&self.env) + pairs(&self.env_files) + pairs(&self.node_selector);
        self.name.len() + command + texts + maps
    }

    fn check_command(&mut self, errors: &mut Errors) {
        match self.command.first() {
            None => errors.add("command", "is empty: name the program and its arguments".into()),
            Some(program) if program.trim().is_empty() => {
                errors.add("command[0]", "is empty: the first element is the program".into());
            }
            Some(program) if self.name.is_empty() => {
                let base = program.rsplit('/').next().unwrap_or(program);
                self.name = base.chars().map(|c| if is_name_char(c) { c } else { '-' }).take(32).collect();
            }
            Some(_) => {}
        }
        if self.command.len() > limits::COMMAND_ARGS_MAX {
            let count = self.command.len();
            errors.add("command", format!("has {count} elements; at most {} fit", limits::COMMAND_ARGS_MAX));
        }
        for (i, arg) in self.command.iter().enumerate() {
            errors.check_text(&format!("command[{i}]"), arg, limits::ARG_BYTES_MAX);
        }
        errors.check_name("name", &self.name);
    }

    fn check_counts(&mut self, errors: &mut Errors) {
        if self.max_nodes == 0 {
            self.max_nodes = self.min_nodes;
        }
        errors.check_range("min_nodes", self.min_nodes, 1, limits::NODES_MAX);
        errors.check_range("procs_per_node", self.procs_per_node, 1, limits::PROCS_PER_NODE_MAX);
        errors.check_range("max_restarts", self.max_restarts, 0, limits::RESTARTS_MAX);
        if self.max_nodes < self.min_nodes {
            errors
                .add("max_nodes", format!("is {}, less than min_nodes, {}", self.max_nodes, self.min_nodes));
        } else if self.max_nodes > limits::NODES_MAX {
            errors.check_range("max_nodes", self.max_nodes, 1, limits::NODES_MAX);
        } else if self.max_nodes.saturating_mul(self.procs_per_node) > limits::WORLD_SIZE_MAX {
            errors.add(
                "max_nodes",
                format!(
                    "times procs_per_node is {} ranks; at most {} are allowed",
                    self.max_nodes.saturating_mul(self.procs_per_node),
                    limits::WORLD_SIZE_MAX
                ),
            );
        }
    }

    fn check_rest(&self, errors: &mut Errors) {
        for (field, dir) in [("working_dir", &self.working_dir), ("checkpoint_dir", &self.checkpoint_dir)] {
            if let Some(dir) = dir {
                errors.check_text(field, dir, limits::PATH_BYTES_MAX);
                if !dir.starts_with('/') {
                    errors.add(field, format!("is {dir:?}; nodes need an absolute path"));
                }
            }
        }
        if self.node_selector.len() > limits::SELECTOR_LABELS_MAX {
            errors.add("node_selector", format!("has more than {} labels", limits::SELECTOR_LABELS_MAX));
        }
        for (key, value) in self.node_selector.iter().take(limits::SELECTOR_LABELS_MAX) {
            errors.check_text("node_selector", key, limits::NODE_LABEL_BYTES_MAX);
            errors.check_text("node_selector", value, limits::NODE_LABEL_BYTES_MAX);
        }
        if self.stop_grace > limits::SPAN_MAX {
            errors.add("stop_grace", "is longer than 24h".into());
        }
        if self.last_call > limits::SPAN_MAX {
            errors.add("last_call", "is longer than 24h".into());
        }
        if self.start_timeout > limits::SPAN_MAX || self.start_timeout < Millis::from_secs(1) {
            errors.add("start_timeout", "is not between 1s and 24h".into());
        }
        let progress = self.progress_timeout;
        if progress > limits::SPAN_MAX || (progress.0 > 0 && progress < Millis::from_secs(1)) {
            errors.add("progress_timeout", "is not between 1s and 24h, nor 0s for none".into());
        }
    }

    fn check_telemetry(&self, errors: &mut Errors) {
        if let Some(dir) = &self.tensorboard_dir {
            errors.check_text("tensorboard_dir", dir, limits::PATH_BYTES_MAX);
            if dir.contains("://") {
                errors.add("tensorboard_dir", "is a URL; nodes follow files in a directory of theirs".into());
            }
        }
        if let Some(Err(why)) = self.metric_pattern.as_deref().map(MetricPattern::new) {
            errors.add("metric_pattern", why);
        }
    }
}

struct Errors(Vec<SpecError>);

impl Errors {
    /// Most violations reported at once; a hostile spec must not make a giant answer.
    const MAX: usize = 32;

    fn add(&mut self, field: &str, description: String) {
        if self.0.len() < Self::MAX {
            self.0.push(SpecError { field: field.to_owned(), description });
        }
    }

    fn check_text(&mut self, field: &str, text: &str, bytes_max: usize) {
        if text.len() > bytes_max {
            self.add(field, format!("has {} bytes; at most {bytes_max} fit", text.len()));
        }
        if text.contains('\0') {
            self.add(field, "contains a NUL byte, which no program can receive".into());
        }
    }

    fn check_name(&mut self, field: &str, name: &str) {
        self.check_text(field, name, limits::NAME_BYTES_MAX);
        if let Some(bad) = name.chars().find(|c| !is_name_char(*c)) {
            self.add(field, format!("contains {bad:?}; use letters, digits, '.', '_' and '-'"));
        }
    }

    fn check_range(&mut self, field: &str, value: u32, min: u32, max: u32) {
        if !(min..=max).contains(&value) {
            self.add(field, format!("is {value}; it must be between {min} and {max}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> JobSpec {
        JobSpec::new(vec!["/usr/bin/env".into(), "true".into()])
    }

    fn one(key: &str, value: &str) -> BTreeMap<String, String> {
        [(key.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn defaults_are_filled_in() {
        let spec = valid().check().unwrap();
        assert_eq!((spec.name.as_str(), spec.max_nodes), ("env", 1));
    }

    #[test]
    fn each_violation_names_its_field() {
        type Break = fn(&mut JobSpec);
        let table: [(&str, Break); 22] = [
            ("command", |s| s.command.clear()),
            ("command[0]", |s| s.command[0] = " ".into()),
            ("command[1]", |s| s.command[1] = "a\0b".into()),
            ("command", |s| s.command = vec!["x".repeat(100_000); 3]),
            ("name", |s| s.name = "a b".into()),
            ("min_nodes", |s| s.min_nodes = 0),
            ("min_nodes", |s| s.min_nodes = u32::MAX),
            ("max_nodes", |s| (s.min_nodes, s.max_nodes) = (3, 2)),
            ("max_nodes", |s| (s.min_nodes, s.procs_per_node) = (16_384, 1024)),
            ("procs_per_node", |s| s.procs_per_node = 0),
            ("procs_per_node", |s| s.procs_per_node = 1025),
            ("env[\"RANK\"]", |s| _ = s.env.insert("RANK".into(), "1".into())),
            ("env[\"A=B\"]", |s| _ = s.env.insert("A=B".into(), "1".into())),
            ("env_files[\"RANK\"]", |s| _ = s.env_files.insert("RANK".into(), "/x".into())),
            ("env_files[\"A\"]", |s| _ = s.env_files.insert("A".into(), "x".into())),
            ("env_files[\"A\"]", |s| (s.env, s.env_files) = (one("A", "1"), one("A", "/x"))),
            ("env_files", |s| s.env_files = (0..65).map(|i| (format!("A{i}"), "/x".into())).collect()),
            ("last_call", |s| s.last_call = Millis(limits::SPAN_MAX.0 + 1)),
            ("working_dir", |s| s.working_dir = Some("relative".into())),
            ("tensorboard_dir", |s| s.tensorboard_dir = Some("s3://bucket/runs".into())),
            ("tensorboard_dir", |s| s.tensorboard_dir = Some("x".repeat(5000))),
            ("metric_pattern", |s| s.metric_pattern = Some("loss (".into())),
        ];
        for (field, break_it) in table {
            let mut spec = valid();
            break_it(&mut spec);
            let errors = spec.check().unwrap_err();
            assert!(errors.iter().any(|e| e.field == field), "{field}: {errors:?}");
        }
    }
}
