//! Heartbeats, where they are heard: each session has a pulse, which acknowledges them without a
//! turn of the core. The core is told of the newest one when it has to know, which is before it
//! ends a lease or a session.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bugs::{Bug, planted};
use crate::core::Core;
use crate::input::{Heard, Input};
use crate::types::{Millis, NodeName, Session};

/// Marks a pulse that has ended; the rest is the time of the last heartbeat.
const ENDED: u64 = 1 << 63;

/// The heartbeats of one session. Whoever ends it learns the last one that was acknowledged, and
/// none is afterwards: a node never trusts in a lease that has ended here.
#[derive(Debug, Default)]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// Hears a heartbeat. True if it may be acknowledged: the node's lease lasts from this time on.
    pub fn beat(&self, now: Millis) -> bool {
        let newest = |last: u64| (last & ENDED == 0).then(|| last.max(now.0));
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, newest).is_ok()
    }

    /// Returns the time of the last heartbeat, if there was one.
    pub fn last(&self) -> Option<Millis> {
        last(self.0.load(Ordering::Acquire))
    }

    /// Ends it, and returns the time of the last heartbeat, if there was one.
    pub fn end(&self) -> Option<Millis> {
        last(self.0.fetch_or(ENDED, Ordering::AcqRel))
    }

    /// Returns the time of the last heartbeat if the lease that began with it lasts at `now`;
    /// otherwise ends the pulse.
    fn last_or_end(&self, now: Millis, lease: Millis) -> Option<Millis> {
        let lasts = |at: Millis| at.plus(lease) > now;
        let end = |value: u64| (!last(value).is_some_and(lasts)).then_some(value | ENDED);
        match self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, end) {
            Ok(_) => None,
            Err(value) => last(value),
        }
    }
}

fn last(value: u64) -> Option<Millis> {
    Some(Millis(value & !ENDED)).filter(|at| at.0 > 0)
}

impl Core {
    /// Returns what the core must be told before a step at `now`: the heartbeats of nodes whose
    /// leases would end in it, if any were heard. The pulses of the others end. Costs nothing while
    /// no lease is due.
    pub fn heard_since(
        &self,
        now: Millis,
        pulse: impl Fn(&NodeName, Session) -> Option<Arc<Pulse>>,
    ) -> Option<Input> {
        if planted(Bug::PulsesNotAsked) {
            return None;
        }
        let mut heard = Vec::new();
        for name in self.leases_due(now) {
            let Some(node) = self.nodes.get(name).filter(|node| node.lease_expires <= now) else { continue };
            let Some(session) = node.session else { continue };
            let last = pulse(name, session).and_then(|pulse| pulse.last_or_end(now, self.config.lease));
            heard.extend(last.map(|at| Heard { node: name.clone(), session, at }));
        }
        (!heard.is_empty()).then_some(Input::Heartbeats(heard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_acknowledged_after_the_end_and_the_last_one_is_known() {
        let pulse = Pulse::default();
        assert_eq!(pulse.last(), None);
        assert!(pulse.beat(Millis(100)) && pulse.beat(Millis(90)));
        assert_eq!(pulse.last(), Some(Millis(100)), "two that overtake one another");
        assert_eq!(pulse.last_or_end(Millis(109), Millis(10)), Some(Millis(100)));
        assert!(pulse.beat(Millis(105)));
        assert_eq!(pulse.last_or_end(Millis(115), Millis(10)), None);
        assert!(!pulse.beat(Millis(115)));
        assert_eq!((pulse.last(), pulse.end()), (Some(Millis(105)), Some(Millis(105))));
    }

    #[test]
    fn a_heartbeat_is_either_acknowledged_and_known_or_neither() {
        for _ in 0..200 {
            let pulse = Pulse::default();
            let (acknowledged, known) = std::thread::scope(|scope| {
                let beats = scope.spawn(|| (1..1000).take_while(|at| pulse.beat(Millis(*at))).last());
                let end = scope.spawn(|| pulse.end());
                (beats.join().unwrap(), end.join().unwrap())
            });
            assert_eq!(acknowledged.map(Millis), known);
        }
    }
}
