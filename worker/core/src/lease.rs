//! How long ranks may run without word from the coordinator.
//!
//! The coordinator counts a lease from when it *hears* a heartbeat, the node from when it *sent* the one that was
//! acknowledged: the node's lease ends first. Its ranks are asked to end when a quarter of it is left and killed when a
//! tenth is left, so that nothing of them runs when the coordinator may start them elsewhere. The margin also covers
//! clocks that run up to a tenth apart.

use muster_core::bugs::{Bug, planted};
use muster_core::types::{CoordinatorLoss, Millis};
use serde::{Deserialize, Serialize};

/// When ranks are stopped unless the lease is renewed, on the node's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// They are asked to end.
    pub term: Millis,
    /// They are killed.
    pub kill: Millis,
    /// The lease's length.
    pub lease: Millis,
}

impl Fence {
    fn at(until: Millis, lease: Millis) -> Self {
        let before = |parts: u64| Millis(until.0.saturating_sub(lease.0 / parts));
        Self { term: before(4), kill: before(10), lease }
    }

    /// Time that a shim gets to kill its ranks before it is killed itself: half of what is left of the lease.
    pub(crate) fn slack(self) -> Millis {
        Millis(self.lease.0 / 20)
    }
}

/// The node's lease.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lease {
    span: Millis,
    /// Until when the coordinator replaces nothing of this node.
    until: Millis,
    /// Until when it does not because there is none.
    gone_until: Millis,
}

impl Lease {
    /// A heartbeat that was sent then has been acknowledged.
    pub fn renewed(&mut self, now: Millis, sent: Millis, span: Millis) {
        let from = if planted(Bug::LeaseFromAck) { now } else { sent };
        self.span = span;
        self.until = self.until.max(from.plus(span));
    }

    /// No coordinator ran then: one that starts later gives every node a whole lease.
    pub fn coordinator_gone(&mut self, at: Millis) {
        self.gone_until = self.gone_until.max(at.plus(self.span));
    }

    /// Takes up what an earlier daemon knew.
    pub fn adopt(&mut self, fence: Fence) {
        if self.span == Millis(0) {
            self.span = fence.lease;
        }
        self.until = self.until.max(fence.kill.plus(Millis(fence.lease.0 / 10)));
    }

    /// When ranks of a job with this policy are stopped; none while there was never a lease.
    pub fn fence(&self, policy: CoordinatorLoss) -> Option<Fence> {
        let until = match policy {
            _ if planted(Bug::NoSelfFence) => Millis(u64::MAX),
            CoordinatorLoss::Run => self.until.max(self.gone_until),
            CoordinatorLoss::Stop => self.until,
        };
        (self.span > Millis(0)).then(|| Fence::at(until, self.span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_from_when_the_heartbeat_was_sent() {
        let mut lease = Lease::default();
        assert_eq!(lease.fence(CoordinatorLoss::Run), None);
        lease.renewed(Millis(5000), Millis(1000), Millis(10_000));
        let fence = lease.fence(CoordinatorLoss::Run).unwrap();
        assert_eq!((fence.term, fence.kill), (Millis(8500), Millis(10_000)));
        lease.coordinator_gone(Millis(9000));
        let run = lease.fence(CoordinatorLoss::Run).unwrap();
        let stop = lease.fence(CoordinatorLoss::Stop).unwrap();
        assert_eq!((run.kill, stop.kill), (Millis(18_000), Millis(10_000)));
    }
}
