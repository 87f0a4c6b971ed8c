//! The checked nouns that every part of Muster shares. A value of these types needs no second check.

mod assignment;
mod cpus;
mod ids;
mod pattern;
pub mod rendezvous;
mod resources;
mod spec;
mod stop;
pub mod surroundings;
pub mod text;
pub mod value;

pub use assignment::{
    Assignment, DesiredPhase, GangReport, NodePlacement, ObservedPhase, RankExit, RankProgress,
};
pub use cpus::CpuList;
pub use ids::{
    GangId, Generation, Incarnation, JobId, NodeName, Owner, Rank, RequestId, Session, TokenName, UserName,
};
pub use pattern::{Matched, MetricPattern};
pub use rendezvous::RendezvousReport;
pub use resources::Resources;
pub use spec::{JobSpec, RESERVED_ENV, RUN_LABEL, RUN_RANK_LABEL, SpecError, limits};
pub use stop::{CoordinatorLoss, StopMode, StopSignal};
pub use surroundings::Surroundings;
pub use value::Value;

use serde::{Deserialize, Serialize};

/// A point in time, or a span of it, in milliseconds. Points in time that are stored or shown count from
/// the Unix epoch; deadlines count on whatever monotonic clock the driver feeds in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// `self + span`, at most the largest value.
    #[must_use]
    pub fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// The span from `earlier` to `self`; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// A span of whole seconds.
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1000)
    }
}
