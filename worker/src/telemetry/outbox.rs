//! Points on their way to the coordinator: numbered, sent in batches, kept until acknowledged.

use std::collections::{BTreeMap, VecDeque};
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
/// Points in one message, as the API allows.
const BATCH_MAX: usize = 512;
/// Ranks of ended gangs whose last points still wait; beyond it the oldest are given up.
const ENDED_MAX: usize = 1024;

/// Every rank's points.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    ranks: Mutex<BTreeMap<(GangId, Rank), Waiting>>,
    added: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    points: VecDeque<v1::Point>,
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
        let mut ranks = self.ranks();
        let waiting = ranks.entry((gang.clone(), rank)).or_default();
        waiting.last_seq += 1;
        if waiting.points.len() >= WAITING_MAX {
            waiting.points.pop_front();
            waiting.dropped += 1;
            if waiting.dropped.is_power_of_two() {
                warn!(%gang, %rank, dropped = waiting.dropped, "the coordinator is away for too long; points are dropped");
            }
        }
        waiting.points.push_back(v1::Point {
            generation: gang.generation.0,
            rank: Some(rank.0),
            step: Some(reported.step),
            time: Some(timestamp_to_wire(reported.time.unwrap_or_else(unix_now))),
            values: reported.values,
            seq: waiting.last_seq,
        });
        drop(ranks);
        self.0.added.notify_one();
    }

    /// Returns once a point was added since the last call.
    pub async fn added(&self) {
        self.0.added.notified().await;
    }

    /// Whether points wait that the open session has not been given.
    pub fn has_unsent(&self) -> bool {
        self.ranks().values().any(Waiting::has_unsent)
    }

    /// The next points to send, if any wait.
    pub fn next_batch(&self) -> Option<v1::PointBatch> {
        let mut ranks = self.ranks();
        let ((gang, _), waiting) = ranks.iter_mut().find(|(_, waiting)| waiting.has_unsent())?;
        let start = waiting.points.partition_point(|point| point.seq <= waiting.sent_seq);
        let points: Vec<_> = waiting.points.range(start..).take(BATCH_MAX).cloned().collect();
        waiting.sent_seq = points.last().map_or(waiting.sent_seq, |point| point.seq);
        Some(v1::PointBatch { job_id: gang.job.to_string(), points })
    }

    /// A new session: what the old one did not acknowledge is sent again.
    pub fn rewind(&self) {
        for waiting in self.ranks().values_mut() {
            waiting.sent_seq = 0;
        }
    }

    /// The coordinator has everything up to `seq`.
    pub fn acknowledge(&self, gang: &GangId, rank: Rank, seq: u64) {
        let mut ranks = self.ranks();
        let key = (gang.clone(), rank);
        if let Some(waiting) = ranks.get_mut(&key) {
            let kept = waiting.points.partition_point(|point| point.seq <= seq);
            waiting.points.drain(..kept);
            if waiting.ended && waiting.points.is_empty() {
                ranks.remove(&key);
            }
        }
    }

    /// No rank of the gang will add anything.
    pub fn end(&self, gang: &GangId) {
        let mut ranks = self.ranks();
        ranks.retain(|(other, _), waiting| {
            waiting.ended |= other == gang;
            !(waiting.ended && waiting.points.is_empty())
        });
        let ended: Vec<_> = ranks.iter().filter(|(_, w)| w.ended).map(|(key, _)| key.clone()).collect();
        for key in ended.iter().take(ended.len().saturating_sub(ENDED_MAX)) {
            warn!(gang = %key.0, rank = %key.1, "the last points of an ended rank are given up");
            ranks.remove(key);
        }
    }

    /// Whether every point is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.ranks().values().all(|waiting| waiting.points.is_empty())
    }

    fn ranks(&self) -> MutexGuard<'_, BTreeMap<(GangId, Rank), Waiting>> {
        // Every change of the map is whole before anything can panic.
        self.0.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn has_unsent(&self) -> bool {
        self.points.back().is_some_and(|point| point.seq > self.sent_seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{Generation, JobId};

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
}
