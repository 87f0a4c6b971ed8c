//! Points on their way to the coordinator: numbered, sent in batches, kept until acknowledged.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_core::types::{GangId, Rank};
use muster_proto::convert::timestamp_to_wire;
use muster_proto::v1;
use tokio::sync::Notify;
use tracing::warn;

use super::parse::Reported;
use crate::clock::unix_now;

/// Points of one rank that wait for the coordinator: hours at a point a second. Beyond it the oldest go, and
/// the gap in the numbering shows how many.
const WAITING_MAX: usize = 16_384;
/// Memory that the waiting points of one rank may take: the bound above at some thirty values a point. It keeps
/// a thousand ranks that report nonsense from taking the machine's memory.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// Points in one message, as the API allows.
const BATCH_MAX: usize = 512;
/// Bytes in one message: with the longest names a batch would else be larger than any message may be (4 MiB),
/// and be refused each time it is sent again.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Ranks of ended gangs whose last points still wait; beyond it the oldest are given up.
const ENDED_MAX: usize = 1024;

/// Every rank's points.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    added: Notify,
}

type Key = (GangId, Rank);

#[derive(Debug, Default)]
struct State {
    ranks: BTreeMap<Key, Waiting>,
    /// Whose points were sent last; the next after it is served next, so that none holds up the others.
    served: Option<Key>,
}

#[derive(Debug, Default)]
struct Waiting {
    points: VecDeque<v1::Point>,
    bytes: usize,
    last_seq: u64,
    /// Highest seq handed to the session that is open now.
    sent_seq: u64,
    dropped: u64,
    /// The gang is forgotten; the entry goes with its last point.
    ended: bool,
}

impl Outbox {
    /// Numbers and keeps one point.
    pub fn add(&self, gang: &GangId, rank: Rank, reported: Reported) {
        let mut state = self.state();
        let waiting = state.ranks.entry((gang.clone(), rank)).or_default();
        waiting.last_seq += 1;
        let point = v1::Point {
            generation: gang.generation.0,
            rank: Some(rank.0),
            step: Some(reported.step),
            time: Some(timestamp_to_wire(reported.time.unwrap_or_else(unix_now))),
            values: reported.values,
            seq: waiting.last_seq,
        };
        waiting.bytes += bytes(&point);
        waiting.points.push_back(point);
        while waiting.points.len() > WAITING_MAX || waiting.bytes > WAITING_BYTES_MAX {
            let oldest = waiting.points.pop_front();
            waiting.bytes -= oldest.as_ref().map_or(0, bytes);
            waiting.dropped += 1;
            if waiting.dropped.is_power_of_two() {
                warn!(%gang, %rank, dropped = waiting.dropped, "the coordinator is away for too long; points are dropped");
            }
        }
        drop(state);
        self.0.added.notify_one();
    }

    /// Returns once a point was added since the last call.
    pub async fn added(&self) {
        self.0.added.notified().await;
    }

    /// Whether points wait that the open session has not been given.
    pub fn has_unsent(&self) -> bool {
        self.state().ranks.values().any(Waiting::has_unsent)
    }

    /// Whether one rank's points do.
    pub fn has_unsent_of(&self, gang: &GangId, rank: Rank) -> bool {
        self.state().ranks.get(&(gang.clone(), rank)).is_some_and(Waiting::has_unsent)
    }

    /// The next points to send, if any wait; each rank in turn.
    pub fn next_batch(&self) -> Option<v1::PointBatch> {
        let mut state = self.state();
        let served = state.served.take();
        let waits = |(_, waiting): &(&Key, &Waiting)| waiting.has_unsent();
        let after = (served.as_ref().map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let mut in_turn = state.ranks.range::<Key, _>(after).chain(&state.ranks);
        let next = in_turn.find(waits).map(|(key, _)| key.clone());
        state.served = next.clone().or(served);
        let key = next?;
        let points = state.ranks.get_mut(&key)?.take_batch();
        Some(v1::PointBatch { job_id: key.0.job.to_string(), points })
    }

    /// The next points of one rank, if any wait.
    pub fn next_batch_of(&self, gang: &GangId, rank: Rank) -> Option<v1::PointBatch> {
        let mut state = self.state();
        let waiting = state.ranks.get_mut(&(gang.clone(), rank)).filter(|waiting| waiting.has_unsent())?;
        Some(v1::PointBatch { job_id: gang.job.to_string(), points: waiting.take_batch() })
    }

    /// A new session: what the old one did not acknowledge is sent again.
    pub fn rewind(&self) {
        for waiting in self.state().ranks.values_mut() {
            waiting.sent_seq = 0;
        }
    }

    /// The coordinator has everything up to `seq`.
    pub fn acknowledge(&self, gang: &GangId, rank: Rank, seq: u64) {
        let mut state = self.state();
        let key = (gang.clone(), rank);
        if let Some(waiting) = state.ranks.get_mut(&key) {
            let kept = waiting.points.partition_point(|point| point.seq <= seq);
            let freed: usize = waiting.points.drain(..kept).map(|point| bytes(&point)).sum();
            waiting.bytes -= freed;
            if waiting.ended && waiting.points.is_empty() {
                state.ranks.remove(&key);
            }
        }
    }

    /// No rank of the gang will add anything.
    pub fn end(&self, gang: &GangId) {
        let mut state = self.state();
        state.ranks.retain(|(other, _), waiting| {
            waiting.ended |= other == gang;
            !(waiting.ended && waiting.points.is_empty())
        });
        let ended: Vec<_> = state.ranks.iter().filter(|(_, w)| w.ended).map(|(key, _)| key.clone()).collect();
        for key in ended.iter().take(ended.len().saturating_sub(ENDED_MAX)) {
            warn!(gang = %key.0, rank = %key.1, "the last points of an ended rank are given up");
            state.ranks.remove(key);
        }
    }

    /// Whether every point is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.state().ranks.values().all(|waiting| waiting.points.is_empty())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is whole before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a point takes, roughly, in memory and at least on the wire.
fn bytes(point: &v1::Point) -> usize {
    64 + point.values.keys().map(|name| name.len() + 32).sum::<usize>()
}

impl Waiting {
    fn has_unsent(&self) -> bool {
        self.points.back().is_some_and(|point| point.seq > self.sent_seq)
    }

    /// The next points that the open session has not been given.
    fn take_batch(&mut self) -> Vec<v1::Point> {
        let start = self.points.partition_point(|point| point.seq <= self.sent_seq);
        let mut room = BATCH_BYTES_MAX;
        let mut batch = Vec::new();
        for point in self.points.range(start..).take(BATCH_MAX) {
            // A single point is far smaller than the room for all.
            let Some(left) = room.checked_sub(bytes(point)) else { break };
            room = left;
            batch.push(point.clone());
        }
        self.sent_seq = batch.last().map_or(self.sent_seq, |point| point.seq);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{Generation, JobId};
    use prost::Message;

    fn gang() -> GangId {
        GangId { job: JobId::new("j").unwrap(), generation: Generation(1) }
    }

    fn add(outbox: &Outbox, count: u64) {
        for step in 0..count {
            outbox.add(&gang(), Rank(0), Reported { step, time: None, values: BTreeMap::new() });
        }
    }

    fn seqs(batch: Option<v1::PointBatch>) -> Vec<u64> {
        batch.map(|batch| batch.points.iter().map(|point| point.seq).collect()).unwrap_or_default()
    }

    #[test]
    fn what_is_not_acknowledged_is_sent_again_and_nothing_else() {
        let outbox = Outbox::default();
        add(&outbox, 4);
        assert_eq!(seqs(outbox.next_batch()), [1, 2, 3, 4]);
        assert_eq!(outbox.next_batch(), None);
        outbox.acknowledge(&gang(), Rank(0), 2);
        outbox.rewind();
        assert_eq!(seqs(outbox.next_batch()), [3, 4]);
        outbox.end(&gang());
        assert!(!outbox.is_empty(), "the last points outlive their gang");
        outbox.acknowledge(&gang(), Rank(0), 4);
        assert!(outbox.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_the_gap_shows() {
        let outbox = Outbox::default();
        add(&outbox, WAITING_MAX as u64 + 10);
        let first = seqs(outbox.next_batch());
        assert_eq!((first.len(), first[0]), (BATCH_MAX, 11));
    }

    #[test]
    fn a_batch_of_the_largest_points_fits_a_message() {
        let outbox = Outbox::default();
        let values: BTreeMap<String, f64> = (0..64).map(|i| (format!("{i:0>128}"), 1.0)).collect();
        let count = WAITING_MAX as u64;
        for step in 0..count {
            outbox.add(&gang(), Rank(0), Reported { step, time: None, values: values.clone() });
        }
        let held: usize = outbox.state().ranks.values().map(|waiting| waiting.bytes).sum();
        assert!(held <= WAITING_BYTES_MAX, "{held} bytes");
        let batch = outbox.next_batch().unwrap();
        assert!(batch.points.len() > 50 && batch.encoded_len() < 3 << 20, "{} bytes", batch.encoded_len());
        let mut last = batch.points.last().unwrap().seq;
        while let Some(batch) = outbox.next_batch() {
            assert_eq!(batch.points[0].seq, last + 1, "no gap between batches");
            last = batch.points.last().unwrap().seq;
        }
        assert_eq!(last, count);
        outbox.acknowledge(&gang(), Rank(0), last);
        assert_eq!(outbox.state().ranks.values().map(|waiting| waiting.bytes).sum::<usize>(), 0);
    }

    #[test]
    fn a_rank_that_floods_does_not_hold_up_the_others() {
        let outbox = Outbox::default();
        add(&outbox, 3 * BATCH_MAX as u64);
        outbox.add(&gang(), Rank(1), Reported { step: 1, time: None, values: BTreeMap::new() });
        let ranks: Vec<_> = std::iter::from_fn(|| outbox.next_batch()).map(|b| b.points[0].rank).collect();
        assert_eq!(ranks, [Some(0), Some(1), Some(0), Some(0)]);
    }
}
