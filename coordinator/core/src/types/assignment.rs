//! What a coordinator wants of a node, and what a node observes: the two halves of level-triggered control.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{GangId, JobSpec, Millis, NodeName, Rank, RendezvousReport, StopMode, Surroundings};

/// One node's part of a gang.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlacement {
    /// The node.
    pub node: NodeName,
    /// Address at which the other nodes reach it.
    pub address: IpAddr,
    /// Index of the node in the gang, from 0.
    pub group_rank: u32,
    /// Global rank of the node's first process.
    pub first_rank: Rank,
    /// Processes on the node.
    pub procs: u32,
    /// GPU indices held, `per_proc.gpus` for each process in rank order.
    pub gpus: Vec<u32>,
}

impl NodePlacement {
    /// Whether `rank` runs on this node.
    pub fn holds(&self, rank: Rank) -> bool {
        self.ranks().contains(&rank.0)
    }

    /// Global ranks of this node.
    pub fn ranks(&self) -> std::ops::Range<u32> {
        self.first_rank.0..self.first_rank.0 + self.procs
    }
}

/// What shall become of a gang's part on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DesiredPhase {
    /// Check that it can run; choose the master port on the first node; launch nothing.
    Prepared,
    /// Launch the ranks.
    Running,
    /// Stop the ranks.
    Stopped,
    /// The end is stored; the node may forget it.
    Forgotten,
}

/// Where a gang's part on a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ObservedPhase {
    /// Ready to launch.
    Prepared,
    /// Every rank of the node was launched; some may have exited.
    Running,
    /// Every rank was killed and none executes anything any more, but the kernel still holds some.
    Killed,
    /// No rank runs, and none will.
    Stopped,
}

/// The whole desired state of one gang on one node. Applying it twice is the same as once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The gang.
    pub gang: GangId,
    /// What shall be.
    pub phase: DesiredPhase,
    /// Program, environment, directories and grace.
    pub spec: JobSpec,
    /// This node's part.
    pub placement: NodePlacement,
    /// Ranks in the gang.
    pub world_size: u32,
    /// Nodes in the gang.
    pub group_world_size: u32,
    /// Address of the gang's first node.
    pub master_addr: IpAddr,
    /// Port on the first node, once that node has chosen it.
    pub master_port: Option<u16>,
    /// Restarts before this generation.
    pub restart_count: u32,
    /// How it is stopped, when it is.
    pub stop: StopMode,
}

/// The whole observed state of one gang on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GangReport {
    /// The gang.
    pub gang: GangId,
    /// Where it is.
    pub phase: ObservedPhase,
    /// Port chosen for MASTER_PORT, from the gang's first node.
    pub master_port: Option<u16>,
    /// Ranks of this node that ended, in the order in which the node observed it.
    pub exits: Vec<RankExit>,
    /// Why the node could not prepare or launch.
    pub error: Option<String>,
    /// How far each rank of the node is, while none has shown progress for the job's `progress_timeout`.
    pub quiet: Vec<RankProgress>,
    /// Process ids of the node's ranks in rank order, once they were launched.
    pub processes: Vec<u32>,
    /// From the gang's first node: what its store shows while some rank does not get on there.
    pub rendezvous: Option<Box<RendezvousReport>>,
    /// What the node adds to the environment of its ranks, once it has prepared them.
    pub surroundings: Option<Box<Surroundings>>,
}

/// How far a rank is that shows no progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankProgress {
    /// Global rank.
    pub rank: Rank,
    /// Last step it reported.
    pub step: Option<u64>,
    /// Time since its last sign of progress.
    pub silent: Millis,
    /// State of its process as the kernel shows it, such as 'S' or 'T'.
    pub state: char,
}

/// How one rank ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankExit {
    /// Global rank.
    pub rank: Rank,
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Unix time at which the node observed it.
    pub time: Millis,
    /// Last lines of its standard error.
    pub stderr_tail: String,
    /// Whether the kernel ended it for want of memory.
    #[serde(default)]
    pub out_of_memory: bool,
    /// What it wrote to its error file.
    #[serde(default)]
    pub error: Option<String>,
}

impl RankExit {
    /// Whether the rank ended as a program does that has done its work.
    pub fn is_success(&self) -> bool {
        self.code == Some(0) && self.signal.is_none()
    }
}
