//! Bugs that can be planted, so that the simulation can show that it would find them. Without the feature
//! `planted-bugs` nothing of this is compiled in.

/// A deliberate mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is described where it is planted")]
pub enum Bug {
    /// No mistake.
    None,
    // In the coordinator's core.
    OldReportsCount,
    GenerationReused,
    MoveSpendsRestart,
    LaunchBeforeAllPrepared,
    OneStoppedIsAll,
    DisconnectedIsGone,
    TakeoverWithoutProof,
    RestartStopsGangs,
    CancelOverridesEnd,
    RequestsForgotten,
    StuckIsFree,
    DevicesNotReserved,
    OneQuietNodeHangs,
    LeaseNotRenewed,
    LeftoversForgotten,
    LateHelloCounts,
    WaitsByWallClock,
    RoomForgottenWhileStarting,
    StrangersCount,
    PlacedJobsWait,
    PulsesNotAsked,
    // In the node's core.
    OldGenerationLaunches,
    AdoptByPidAlone,
    NoSelfFence,
    LeaseFromAck,
    FenceNotRaised,
    GoneCoordinatorIgnored,
    AdoptedExitsLost,
    // At the edges, in the simulation's model of them.
    AcknowledgeBeforeCommit,
    LeaseByWallClock,
}

/// Every bug.
pub const ALL: [Bug; 30] = [
    Bug::OldReportsCount,
    Bug::GenerationReused,
    Bug::MoveSpendsRestart,
    Bug::LaunchBeforeAllPrepared,
    Bug::OneStoppedIsAll,
    Bug::DisconnectedIsGone,
    Bug::TakeoverWithoutProof,
    Bug::RestartStopsGangs,
    Bug::CancelOverridesEnd,
    Bug::RequestsForgotten,
    Bug::StuckIsFree,
    Bug::DevicesNotReserved,
    Bug::OneQuietNodeHangs,
    Bug::LeaseNotRenewed,
    Bug::LeftoversForgotten,
    Bug::LateHelloCounts,
    Bug::WaitsByWallClock,
    Bug::RoomForgottenWhileStarting,
    Bug::StrangersCount,
    Bug::PlacedJobsWait,
    Bug::PulsesNotAsked,
    Bug::OldGenerationLaunches,
    Bug::AdoptByPidAlone,
    Bug::NoSelfFence,
    Bug::LeaseFromAck,
    Bug::FenceNotRaised,
    Bug::GoneCoordinatorIgnored,
    Bug::AdoptedExitsLost,
    Bug::AcknowledgeBeforeCommit,
    Bug::LeaseByWallClock,
];

#[cfg(feature = "planted-bugs")]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Bug> = const { Cell::new(Bug::None) };
    }

    /// Plants a bug in this thread.
    pub fn plant(bug: Bug) {
        PLANTED.set(bug);
    }

    /// Whether this bug is planted in this thread.
    pub fn planted(bug: Bug) -> bool {
        PLANTED.get() == bug
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::{plant, planted};

/// Whether this bug is planted: never, in a build like this.
#[cfg(not(feature = "planted-bugs"))]
pub const fn planted(_: Bug) -> bool {
    false
}
