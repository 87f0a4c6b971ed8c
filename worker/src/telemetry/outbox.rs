//! Points on their way to the coordinator: read from the ranks' files, sent in batches, and read again from where
//! they were not acknowledged when a session breaks. Nothing is kept here but places in the files.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_core::types::{Assignment, GangId, Rank};
use muster_proto::convert::timestamp_to_wire;
use muster_proto::v1;
use tokio::sync::Notify;
use tracing::warn;

use super::file::{self, Line, Position};
use crate::launch::prepare::log_dir;

/// Points of one rank that were sent and not acknowledged. Beyond it the rest waits in the file.
const WINDOW_MAX: usize = 4096;
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

/// The points of one rank.
#[derive(Debug, Default)]
struct Waiting {
    path: PathBuf,
    /// Before the first that is not acknowledged.
    kept: Position,
    /// Before the first that the open session has not been given.
    next: Position,
    /// The places after those that it was given and has not acknowledged.
    window: VecDeque<Position>,
    /// Lines that were read and not sent yet.
    read: VecDeque<(Position, Option<Line>)>,
    /// The highest number that the coordinator keeps: one that was sent by an earlier daemon is not sent again.
    known: u64,
    /// There may be more in the file.
    more: bool,
    /// The gang is forgotten; the entry goes with its last point.
    ended: bool,
}

impl Outbox {
    /// The gang's ranks may report points, or have done so.
    pub fn open(&self, assignment: &Assignment, data_dir: &Path) {
        let mut state = self.state();
        let placement = &assignment.placement;
        for local_rank in 0..placement.procs {
            let path = file::path_in(&log_dir(data_dir, &assignment.gang, local_rank));
            let rank = Rank(placement.first_rank.0 + local_rank);
            let fresh = || Waiting { path, more: true, ..Waiting::default() };
            state.ranks.entry((assignment.gang.clone(), rank)).or_insert_with(fresh);
        }
        drop(state);
        self.0.added.notify_one();
    }

    /// These ranks have reported points.
    pub fn add(&self, gang: &GangId, ranks: &[Rank]) {
        let mut state = self.state();
        for rank in ranks {
            if let Some(waiting) = state.ranks.get_mut(&(gang.clone(), *rank)) {
                waiting.more = true;
            }
        }
        drop(state);
        self.0.added.notify_one();
    }

    /// Returns once points were added since the last call.
    pub async fn added(&self) {
        self.0.added.notified().await;
    }

    /// Whether points could be sent now.
    pub fn can_send(&self) -> bool {
        self.state().ranks.values().any(Waiting::can_send)
    }

    /// Whether one rank's could.
    pub fn can_send_of(&self, gang: &GangId, rank: Rank) -> bool {
        self.state().ranks.get(&(gang.clone(), rank)).is_some_and(Waiting::can_send)
    }

    /// Whether one rank has points that the open session has not been given.
    pub fn has_unsent_of(&self, gang: &GangId, rank: Rank) -> bool {
        self.state().ranks.get(&(gang.clone(), rank)).is_some_and(Waiting::has_unsent)
    }

    /// The next points to send, if any wait; each rank in turn.
    pub fn next_batch(&self) -> Option<v1::PointBatch> {
        let mut state = self.state();
        let served = state.served.take();
        let waits = |(_, waiting): &(&Key, &Waiting)| waiting.can_send();
        let after = (served.as_ref().map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let mut in_turn = state.ranks.range::<Key, _>(after).chain(&state.ranks);
        let next = in_turn.find(waits).map(|(key, _)| key.clone());
        state.served = next.clone().or(served);
        let key = next?;
        take_batch(&mut state, &key)
    }

    /// The next points of one rank, if any wait.
    pub fn next_batch_of(&self, gang: &GangId, rank: Rank) -> Option<v1::PointBatch> {
        take_batch(&mut self.state(), &(gang.clone(), rank))
    }

    /// A new session: what the old one did not acknowledge is sent again.
    pub fn rewind(&self) {
        for waiting in self.state().ranks.values_mut() {
            waiting.more = true;
            waiting.next = waiting.kept;
            waiting.window.clear();
            waiting.read.clear();
        }
        self.0.added.notify_one();
    }

    /// A session with a coordinator that may have nothing: everything is there to be sent. It acknowledges what it has.
    pub fn rewind_to_start(&self) {
        for waiting in self.state().ranks.values_mut() {
            (waiting.kept, waiting.known) = (Position::default(), 0);
        }
        self.rewind();
    }

    /// The coordinator has everything up to `seq`.
    pub fn acknowledge(&self, gang: &GangId, rank: Rank, seq: u64) {
        let mut state = self.state();
        let key = (gang.clone(), rank);
        if let Some(waiting) = state.ranks.get_mut(&key) {
            waiting.known = waiting.known.max(seq);
            let known = waiting.window.partition_point(|place| place.seq <= seq);
            if let Some(last) = waiting.window.drain(..known).next_back() {
                waiting.kept = last;
            }
            if waiting.is_done() {
                state.ranks.remove(&key);
            }
        }
    }

    /// No rank of the gang will add anything. Gives how many ended ranks, of whichever gang, were given up for it.
    pub fn end(&self, gang: &GangId) -> usize {
        let mut state = self.state();
        state.ranks.retain(|(other, _), waiting| {
            waiting.ended |= other == gang;
            !waiting.is_done()
        });
        let ended: Vec<_> = state.ranks.iter().filter(|(_, w)| w.ended).map(|(key, _)| key.clone()).collect();
        let beyond = ended.len().saturating_sub(ENDED_MAX);
        for key in ended.iter().take(beyond) {
            warn!(gang = %key.0, rank = %key.1, "the last points of an ended rank are given up");
            state.ranks.remove(key);
        }
        beyond
    }

    /// Whether points of the gang wait.
    pub fn holds(&self, gang: &GangId) -> bool {
        let state = self.state();
        let mut of_gang = state.ranks.range((gang.clone(), Rank(0))..).take_while(|((g, _), _)| g == gang);
        of_gang.next().is_some()
    }

    /// Whether every point is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.state().ranks.values().all(|waiting| !waiting.has_unsent() && waiting.window.is_empty())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is whole before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_batch(state: &mut State, key: &Key) -> Option<v1::PointBatch> {
    let waiting = state.ranks.get_mut(key).filter(|waiting| waiting.can_send())?;
    let points = waiting.take_batch(key);
    if waiting.is_done() {
        state.ranks.remove(key);
    }
    (!points.is_empty()).then(|| v1::PointBatch { job_id: key.0.job.to_string(), points })
}

/// What a point takes at most, roughly, on the wire.
fn bytes(point: &v1::Point) -> usize {
    64 + point.values.keys().map(|name| name.len() + 32).sum::<usize>()
}

impl Waiting {
    fn has_unsent(&self) -> bool {
        self.more || !self.read.is_empty()
    }

    fn can_send(&self) -> bool {
        self.has_unsent() && self.window.len() < WINDOW_MAX
    }

    fn is_done(&self) -> bool {
        self.ended && !self.has_unsent() && self.window.is_empty()
    }

    /// The next points that the open session has not been given. May be none although more follow: one look at the
    /// file is short.
    fn take_batch(&mut self, (gang, rank): &Key) -> Vec<v1::Point> {
        if self.read.is_empty() {
            let looked = file::read(&self.path, self.next);
            let look = looked.unwrap_or_else(|error| {
                warn!(%gang, %rank, path = %self.path.display(), %error, "failed to read points");
                file::Look::default()
            });
            (self.more, self.read) = (look.more, look.lines);
        }
        let mut room = BATCH_BYTES_MAX;
        let mut batch = Vec::new();
        while let Some((after, line)) = self.read.pop_front() {
            if let Some(Line::Point { step, time, values }) = line
                && after.seq > self.known
            {
                let point = v1::Point {
                    generation: gang.generation.0,
                    rank: Some(rank.0),
                    step: Some(step),
                    time: Some(timestamp_to_wire(time)),
                    values,
                    seq: after.seq,
                };
                room = room.saturating_sub(bytes(&point));
                batch.push(point);
                self.window.push_back(after);
            } else if self.window.is_empty() {
                self.kept = after;
            }
            self.next = after;
            // The largest point takes a hundredth of the room: beyond it by one does no harm.
            if room == 0 || batch.len() >= BATCH_MAX || self.window.len() >= WINDOW_MAX {
                break;
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::file::Writer;
    use crate::telemetry::parse::Reported;
    use muster_core::types::{Generation, JobId, Millis};
    use prost::Message;

    /// An outbox for two ranks, and the files from which it sends.
    struct World {
        outbox: Outbox,
        files: [Writer; 2],
        dir: tempfile::TempDir,
    }

    fn gang() -> GangId {
        GangId { job: JobId::new("j").unwrap(), generation: Generation(1) }
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let file = |rank: u32| {
                let log_dir = log_dir(dir.path(), &gang(), rank);
                std::fs::create_dir_all(&log_dir).unwrap();
                Writer::open(&log_dir).unwrap()
            };
            let files = [file(0), file(1)];
            Self { outbox: outbox(dir.path()), files, dir }
        }

        fn add(&mut self, rank: u32, count: u64, values: &BTreeMap<String, f64>) {
            for step in 0..count {
                let reported = Reported { step, time: Some(Millis(1)), values: values.clone() };
                self.files[rank as usize].add(reported).unwrap();
            }
            self.outbox.add(&gang(), &[Rank(rank)]);
        }

        /// What is given to the session until nothing more can be.
        fn sent(&self) -> Vec<u64> {
            sent(&self.outbox)
        }
    }

    fn outbox(dir: &Path) -> Outbox {
        let outbox = Outbox::default();
        let mut state = outbox.state();
        for rank in 0..2 {
            let path = file::path_in(&log_dir(dir, &gang(), rank));
            state.ranks.insert((gang(), Rank(rank)), Waiting { path, more: true, ..Waiting::default() });
        }
        drop(state);
        outbox
    }

    fn sent(outbox: &Outbox) -> Vec<u64> {
        let mut seqs = Vec::new();
        while outbox.can_send() {
            seqs.extend(
                outbox.next_batch().into_iter().flat_map(|batch| batch.points).map(|point| point.seq),
            );
        }
        seqs
    }

    #[test]
    fn what_is_not_acknowledged_is_sent_again_and_nothing_else() {
        let mut world = World::new();
        world.add(0, 4, &BTreeMap::new());
        assert_eq!(world.sent(), [1, 2, 3, 4]);
        assert!(world.sent().is_empty());
        world.outbox.acknowledge(&gang(), Rank(0), 2);
        world.outbox.rewind();
        assert_eq!(world.sent(), [3, 4]);
        world.outbox.rewind_to_start();
        assert_eq!(world.sent(), [1, 2, 3, 4], "another coordinator may lack what this one has");
        world.outbox.end(&gang());
        assert!(world.outbox.holds(&gang()), "the last points outlive their gang");
        world.outbox.acknowledge(&gang(), Rank(0), 4);
        assert!(world.outbox.is_empty() && !world.outbox.holds(&gang()));
    }

    #[test]
    fn a_new_daemon_skips_what_the_coordinator_keeps() {
        let mut world = World::new();
        world.add(0, 20_000, &BTreeMap::new());
        let first = world.sent();
        assert_eq!(first, (1..=WINDOW_MAX as u64).collect::<Vec<_>>(), "no more than may wait");
        let next = outbox(world.dir.path());
        assert_eq!(next.next_batch().unwrap().points.len(), BATCH_MAX);
        next.acknowledge(&gang(), Rank(0), 19_990);
        assert_eq!(sent(&next), (19_991..=20_000).collect::<Vec<_>>());
        next.acknowledge(&gang(), Rank(0), 20_000);
        assert!(next.is_empty());
    }

    #[test]
    fn a_batch_of_the_largest_points_fits_a_message() {
        let mut world = World::new();
        let values: BTreeMap<String, f64> = (0..64).map(|i| (format!("{i:0>128}"), 1.0)).collect();
        world.add(0, 1000, &values);
        let mut last = 0;
        while world.outbox.can_send() {
            let Some(batch) = world.outbox.next_batch() else { continue };
            assert!(batch.encoded_len() < 3 << 20, "{} bytes", batch.encoded_len());
            assert_eq!(batch.points[0].seq, last + 1, "no gap between batches");
            last = batch.points.last().unwrap().seq;
        }
        assert_eq!(last, 1000);
    }

    #[test]
    fn a_rank_that_floods_does_not_hold_up_the_others() {
        let mut world = World::new();
        world.add(0, 3 * BATCH_MAX as u64, &BTreeMap::new());
        world.add(1, 1, &BTreeMap::new());
        let batches = std::iter::from_fn(|| world.outbox.next_batch());
        let ranks: Vec<_> = batches.map(|batch| batch.points[0].rank).collect();
        assert_eq!(ranks, [Some(0), Some(1), Some(0), Some(0)]);
    }
}
