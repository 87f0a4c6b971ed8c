//! Points on their way to the coordinator: read from the ranks' files, sent in batches, and read again from where
//! they were not acknowledged when a session breaks. Nothing is kept here but places in the files.
//!
//! What is sent and not acknowledged is bounded over all ranks, so that no point fills the stream on which heartbeats and
//! reports go. No file is read while the lock is held: the daemon looks in here, too.

mod waiting;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_core::types::{Assignment, GangId, Rank};
use muster_proto::v1;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use super::file::{self, Look, Position};
use crate::launch::prepare::log_dir;
use waiting::{Key, Reading, Waiting};

/// Bytes of points, of all ranks together, that were sent and not acknowledged: about 2,500 points of one value. The rest
/// waits in the files. A heartbeat behind so much passes within a quarter of a second at 10 Mbit/s.
const WINDOW_BYTES_MAX: usize = 256 << 10;
/// Ranks of ended gangs whose last points still wait; beyond it the oldest are given up.
const ENDED_MAX: usize = 1024;
/// Time for which the news of a rank's end waits for the rank's last points. Those of a program that reports each step
/// are acknowledged sooner, and its curve is whole when its job ends; those of one that floods follow.
const EXIT_WAIT_MAX: Duration = Duration::from_millis(250);
/// Time until points are sent again for which the coordinator had no room.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Every rank's points.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    /// There may be something to send.
    added: Notify,
    /// It must not wait for more.
    hurried: Notify,
    /// The coordinator has all of a rank's points that are known of.
    settled: Notify,
}

#[derive(Debug, Default)]
struct State {
    ranks: BTreeMap<Key, Waiting>,
    /// Whose points were sent last; the next after it is served next, so that none holds up the others.
    served: Option<Key>,
    /// Nothing is sent before.
    paused_until: Option<Instant>,
}

/// What comes next.
enum Next {
    Batch(v1::PointBatch),
    /// A file must be read first.
    Read(Reading),
    Nothing,
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

    /// The gang's shim reads what its ended ranks have left, or has read all of it.
    pub fn set_draining(&self, gang: &GangId, draining: bool) {
        for (_, waiting) in self.state().ranks.iter_mut().filter(|((of, _), _)| of == gang) {
            // The last look at the file comes after the last line.
            waiting.more |= waiting.draining && !draining;
            waiting.draining = draining;
        }
        self.0.added.notify_one();
    }

    /// The rank has ended: its last points go first, and at once.
    pub fn exited(&self, gang: &GangId, rank: Rank) {
        if let Some(waiting) = self.state().ranks.get_mut(&(gang.clone(), rank)) {
            waiting.exited = Some(Instant::now());
        }
        self.0.hurried.notify_one();
    }

    /// Until when the news of the ends of the gang's ranks should wait for their last points; none if it need not.
    pub fn awaited_until(&self, gang: &GangId) -> Option<Instant> {
        let state = self.state();
        let of_gang = state.ranks.range((gang.clone(), Rank(0))..).take_while(|((g, _), _)| g == gang);
        let owing = of_gang.filter(|(_, waiting)| waiting.owes());
        let until = owing.filter_map(|(_, waiting)| Some(waiting.exited? + EXIT_WAIT_MAX)).max();
        until.filter(|until| *until > Instant::now())
    }

    /// Returns once something can be sent.
    pub async fn ready(&self) {
        loop {
            let paused_until = self.state().paused_until.filter(|until| *until > Instant::now());
            match paused_until {
                Some(until) => tokio::time::sleep_until(until).await,
                None if self.can_send() => return,
                None => self.0.added.notified().await,
            }
        }
    }

    /// Returns once the coordinator has all points of some rank that are known of.
    pub async fn settled(&self) {
        self.0.settled.notified().await;
    }

    /// Waits so long for more, unless what is there must not wait.
    pub async fn collect(&self, time: Duration) {
        tokio::time::timeout(time, self.0.hurried.notified()).await.ok();
    }

    /// Whether points could be sent now.
    pub fn can_send(&self) -> bool {
        let state = self.state();
        state.has_room() && state.ranks.values().any(Waiting::can_send)
    }

    /// The next points to send, if any wait; each rank in turn, and those that have ended before the others.
    pub async fn next_batch(&self) -> Option<v1::PointBatch> {
        loop {
            match self.next() {
                Next::Batch(batch) => return Some(batch),
                Next::Read(reading) => {
                    let looks = reading.clone();
                    let look = tokio::task::spawn_blocking(move || looks.look()).await;
                    self.looked(&reading, look.unwrap_or_default());
                }
                Next::Nothing => return None,
            }
        }
    }

    fn next(&self) -> Next {
        let mut state = self.state();
        if !state.has_room() {
            return Next::Nothing;
        }
        while let Some(key) = state.in_turn() {
            state.served = Some(key.clone());
            let Some(waiting) = state.ranks.get_mut(&key) else { break };
            if waiting.read.is_empty() {
                // Set again by what comes meanwhile.
                (waiting.more, waiting.reading) = (false, Some(waiting.next));
                let (path, from) = (waiting.path.clone(), waiting.next);
                return Next::Read(Reading { key, path, from });
            }
            let points = waiting.take_batch(&key);
            let resumes = !points.is_empty() && std::mem::take(&mut waiting.resumes);
            self.settle(&mut state, &key);
            if !points.is_empty() {
                return Next::Batch(v1::PointBatch { job_id: key.0.job.to_string(), points, resumes });
            }
        }
        Next::Nothing
    }

    fn looked(&self, reading: &Reading, look: Look) {
        let mut state = self.state();
        if let Some(waiting) = state.ranks.get_mut(&reading.key) {
            let from = waiting.reading.take();
            // Else it is to be read from another place.
            if from == Some(waiting.next) && waiting.read.is_empty() {
                waiting.more |= look.more;
                waiting.read = look.lines;
            }
            self.settle(&mut state, &reading.key);
        }
    }

    /// A new session: what the old one did not acknowledge is sent again.
    pub fn rewind(&self) {
        let mut state = self.state();
        state.paused_until = None;
        for waiting in state.ranks.values_mut() {
            waiting.rewind();
            // Whoever read for the old session is gone.
            (waiting.reading, waiting.resumes) = (None, false);
        }
        drop(state);
        self.0.added.notify_one();
    }

    /// A session with a coordinator that may have nothing: everything is there to be sent. It acknowledges what it has.
    pub fn rewind_to_start(&self) {
        for waiting in self.state().ranks.values_mut() {
            (waiting.kept, waiting.known) = (Position::default(), 0);
        }
        self.rewind();
    }

    /// The coordinator had no room for what comes after the last that it has acknowledged: it is sent again, later.
    pub fn again(&self, gang: &GangId, rank: Rank) {
        let mut state = self.state();
        if let Some(waiting) = state.ranks.get_mut(&(gang.clone(), rank)) {
            waiting.rewind();
            waiting.resumes = true;
            state.paused_until = Some(Instant::now() + AGAIN_AFTER);
        }
        drop(state);
        self.0.added.notify_one();
    }

    /// The coordinator has everything up to `seq`.
    pub fn acknowledge(&self, gang: &GangId, rank: Rank, seq: u64) {
        let mut state = self.state();
        let key = (gang.clone(), rank);
        if let Some(waiting) = state.ranks.get_mut(&key) {
            waiting.known = waiting.known.max(seq);
            let known = waiting.window.partition_point(|(place, _)| place.seq <= seq);
            if let Some((last, _)) = waiting.window.drain(..known).next_back() {
                waiting.kept = last;
            }
            self.settle(&mut state, &key);
        }
        drop(state);
        self.0.added.notify_one();
    }

    /// Looks whether a rank owes nothing now, and forgets it if nothing more will come.
    fn settle(&self, state: &mut State, key: &Key) {
        let Some(waiting) = state.ranks.get(key).filter(|waiting| !waiting.owes()) else { return };
        if waiting.ended {
            state.ranks.remove(key);
        }
        self.0.settled.notify_one();
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
        !self.state().ranks.values().any(Waiting::owes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is whole before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether the open session may be given more.
    fn has_room(&self) -> bool {
        let on_their_way = self.ranks.values().flat_map(|waiting| &waiting.window);
        on_their_way.map(|(_, bytes)| bytes).sum::<usize>() < WINDOW_BYTES_MAX
    }

    /// Whose points come next.
    fn in_turn(&self) -> Option<Key> {
        let after = (self.served.as_ref().map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let in_turn = || self.ranks.range::<Key, _>(after).chain(&self.ranks).filter(|(_, w)| w.can_send());
        let ended = in_turn().find(|(_, waiting)| waiting.exited.is_some());
        ended.or_else(|| in_turn().next()).map(|(key, _)| key.clone())
    }
}

#[cfg(test)]
mod tests;
