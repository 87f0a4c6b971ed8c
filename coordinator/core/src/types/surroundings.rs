//! What a node adds to the environment of its ranks of its own accord, each with its reason. The coordinator shows it
//! and decides nothing by it.

use serde::{Deserialize, Serialize};

/// Most variables that a node derives: there are three today.
pub const VARIABLES_MAX: usize = 16;
/// Longest value: a port list of the widest machine.
pub const VALUE_BYTES_MAX: usize = 2048;
/// Longest reason.
pub const REASON_BYTES_MAX: usize = 1024;
/// Longest list of processors; one of a machine with a thousand, every other of which is meant, fits.
pub const CPUS_BYTES_MAX: usize = 4096;

/// Who has set a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum VariableSource {
    /// The node, from what the machine has.
    Node,
    /// The job.
    Job,
    /// Whoever started the daemon.
    Daemon,
}

/// A variable that a node derives, or would have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DerivedVariable {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
    /// Who has set it.
    pub source: VariableSource,
    /// Why it is so, in words.
    pub reason: String,
}

/// Where one rank runs on its node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RankBinding {
    /// Index among the ranks of its node.
    pub local_rank: u32,
    /// GPUs that it sees.
    pub gpus: Vec<u32>,
    /// Processors that it may use, as the kernel lists them; empty for all.
    pub cpus: String,
    /// Why, in words.
    pub reason: String,
}

/// How CUDA is told of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceName {
    /// Its index on the node.
    pub index: u32,
    /// Its UUID.
    pub name: String,
}

/// All that a node adds.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Surroundings {
    /// Variables.
    pub variables: Vec<DerivedVariable>,
    /// Ranks in order; empty if none is bound to anything.
    pub bindings: Vec<RankBinding>,
    /// GPUs that CUDA does not know by their index. Not told to the coordinator.
    #[serde(default)]
    pub devices: Vec<DeviceName>,
}
