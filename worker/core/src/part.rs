//! One gang's part on a node: what is wanted of it, and all that was observed.

use muster_core::types::{
    Assignment, GangReport, Millis, ObservedPhase, RankExit, RankProgress, RendezvousReport, StopMode,
    Surroundings,
};

use crate::lease::Fence;

/// What is known of the part.
#[derive(Debug)]
pub(crate) struct Part {
    pub assignment: Assignment,
    /// None until it is prepared.
    pub phase: Option<ObservedPhase>,
    pub master_port: Option<u16>,
    pub exits: Vec<RankExit>,
    pub error: Option<String>,
    pub quiet: Vec<RankProgress>,
    /// Those of its ranks, in their order.
    pub processes: Vec<u32>,
    pub rendezvous: Option<Box<RendezvousReport>>,
    pub surroundings: Option<Box<Surroundings>>,
    pub launch_sent: bool,
    /// How it was told to stop.
    pub stop_sent: Option<StopMode>,
    /// When its ranks are stopped unless the lease is renewed.
    pub fence: Option<Fence>,
    /// When its shim is killed unless it has done what it was told.
    pub kill_at: Option<Millis>,
    /// An older generation of the job still has processes here.
    pub waiting: bool,
}

impl Part {
    pub fn deadline(&self) -> Option<Millis> {
        self.kill_at.into_iter().chain(self.fence.map(|fence| fence.kill)).min()
    }

    pub fn new(assignment: Assignment) -> Self {
        Self {
            assignment,
            phase: None,
            master_port: None,
            exits: Vec::new(),
            error: None,
            quiet: Vec::new(),
            processes: Vec::new(),
            rendezvous: None,
            surroundings: None,
            launch_sent: false,
            stop_sent: None,
            fence: None,
            kill_at: None,
            waiting: false,
        }
    }

    /// Whether something of it executes, or may.
    pub fn runs(&self) -> bool {
        self.phase < Some(ObservedPhase::Killed)
    }

    /// Everything observed of it; none while it is still being prepared.
    pub fn report(&self) -> Option<GangReport> {
        Some(GangReport {
            gang: self.assignment.gang.clone(),
            phase: self.phase?,
            master_port: self.master_port,
            exits: self.exits.clone(),
            error: self.error.clone(),
            quiet: self.quiet.clone(),
            processes: self.processes.clone(),
            // The store ends with the ranks of its node.
            rendezvous: self.rendezvous.clone().filter(|_| self.phase == Some(ObservedPhase::Running)),
            surroundings: self.surroundings.clone(),
        })
    }
}
