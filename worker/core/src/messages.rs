//! What goes into the core and what comes out.

use muster_core::types::{
    Assignment, GangId, Millis, RankExit, RankProgress, RendezvousReport, StopMode, Surroundings,
};

use crate::lease::Fence;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A shim of an earlier daemon was taken over. Comes before anything else of its gang.
    Adopted(Box<Adopted>),
    /// Everything the coordinator wants of this node.
    Welcome(Vec<Assignment>),
    /// What it wants of one gang.
    Assign(Box<Assignment>),
    /// The gang could be launched; on its first node with the master port.
    Prepared(GangId, Option<u16>),
    /// What the node adds to the environment of the gang's ranks. Comes before [`Input::Prepared`].
    Surroundings(GangId, Box<Surroundings>),
    /// Every rank was launched.
    Launched(GangId),
    /// It could not be prepared or launched; nothing runs.
    Failed(GangId, String),
    /// One rank ended.
    Exited(GangId, RankExit),
    /// Every rank was killed, and the kernel holds some of them.
    Killed(GangId),
    /// No process of the gang is left.
    Gone(GangId),
    /// The shim has begun to stop the ranks because their lease ran out.
    Fenced(GangId),
    /// None of the node's ranks has shown progress for the job's `progress_timeout`; or, if the list is empty, one
    /// has again.
    Quiet(GangId, Vec<RankProgress>),
    /// The processes of the node's ranks, in their order. Comes before [`Input::Launched`].
    Processes(GangId, Vec<u32>),
    /// What the store of the gang's ranks shows, which this node hosts; none once all get on there.
    Rendezvous(GangId, Option<Box<RendezvousReport>>),
    /// The coordinator has acknowledged a heartbeat.
    Renewed {
        /// When it was sent.
        sent: Millis,
        /// The lease's length.
        lease: Millis,
    },
    /// No coordinator runs: each refused a connection, or took it and stayed silent.
    CoordinatorGone {
        /// When that was tried.
        at: Millis,
    },
    /// The daemon is to end: stop everything.
    Shutdown,
    /// A deadline has passed.
    Tick,
}

/// What a shim says when it is taken over.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// What it was told last.
    pub assignment: Assignment,
    /// The port it holds for rank 0.
    pub master_port: Option<u16>,
    /// Whether its ranks were launched.
    pub launched: bool,
    /// Ranks that have ended.
    pub exits: Vec<RankExit>,
    /// When it stops its ranks by itself.
    pub fence: Option<Fence>,
    /// What it was told to add to their environment.
    pub surroundings: Option<Box<Surroundings>>,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Check and prepare, in a shim of its own.
    Start(Box<Assignment>),
    /// Tell the shim to launch, and when to stop by itself.
    Launch(Box<Assignment>, Option<Fence>),
    /// Tell the shim to stop.
    Stop(GangId, StopMode),
    /// Tell the shim when to stop by itself, in the place of what it was told before.
    Fence(GangId, Fence),
    /// The shim does not do what it must: kill it, and whatever is left of the gang.
    Kill(GangId),
    /// Tell the coordinator that this daemon is about to end, before anything else.
    Leaving(String),
    /// Give up what is kept for the gang beside its logs.
    Release(GangId),
    /// Send the gang's whole observed state.
    Report(GangId),
}
