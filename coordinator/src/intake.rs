//! Points between the sessions that bring them and the files that keep them.
//!
//! A session hands its points in here and hears the next message at once: no disk holds up a heartbeat. What waits is
//! bounded, for each session and over all. A node that sends on without an acknowledgement is told which of its ranks'
//! points there was no room for, and sends those again; its own window keeps it from coming so far.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_core::types::{Generation, JobId, Rank};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc};
use tonic::Status;

use crate::metrics::Point;

/// Bytes of points that wait, of all sessions. Only a disk that hangs, or is slower than many nodes, lets so many wait.
const BYTES_MAX: usize = 64 << 20;
/// Bytes of points of one session that wait: twice what a node has on its way at once, as they lie in memory here.
const SESSION_BYTES_MAX: usize = 1 << 20;
/// Batches of one session that wait: as many as there are bytes for, if each is of a few points.
const BATCHES_MAX: usize = 1024;
/// Batches that are written at once, of whichever sessions. Each takes one of the threads on which the store commits, too.
const WRITES_MAX: usize = 4;
/// Ranks of one session that are to send again: more than a node has.
const PUT_OFF_MAX: usize = 4096;
/// What a point takes in memory beside its values, and a value beside its name.
const POINT_BYTES: usize = 128;
const VALUE_BYTES: usize = 48;

type Source = (JobId, Generation, Rank);

/// What waits of all sessions. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Intake(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    room: Arc<Semaphore>,
    writes: Semaphore,
    /// Batches that wait or are being written, by job.
    waiting: Mutex<HashMap<JobId, usize>>,
    /// A job has none any more.
    settled: Notify,
}

/// Points of one rank that wait to be written; a place is free again when they are dropped.
#[derive(Debug)]
pub(crate) struct Batch {
    pub job: JobId,
    pub points: Vec<Point>,
    _counted: Counted,
    _room: [OwnedSemaphorePermit; 2],
}

/// Counts a batch among those of its job while it lives.
#[derive(Debug)]
struct Counted(Intake, JobId);

/// What became of points that were handed in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// They will be written.
    Waits,
    /// There was no room: the node must be told to send them again.
    PutOff,
    /// The node was told already.
    PassedOver,
}

/// Where one session hands its points in.
#[derive(Debug)]
pub(crate) struct Inlet {
    intake: Intake,
    /// Whether the node sends again what it is told to.
    resends: bool,
    queue: mpsc::Sender<Batch>,
    room: Arc<Semaphore>,
    put_off: BTreeSet<Source>,
}

impl Intake {
    pub fn new() -> Self {
        Self::with_room(BYTES_MAX)
    }

    fn with_room(bytes: usize) -> Self {
        Self(Arc::new(Shared {
            room: Arc::new(Semaphore::new(bytes)),
            writes: Semaphore::new(WRITES_MAX),
            waiting: Mutex::default(),
            settled: Notify::new(),
        }))
    }

    /// Returns both ends of a session's queue.
    pub fn open(&self, resends: bool) -> (Inlet, mpsc::Receiver<Batch>) {
        let (queue, batches) = mpsc::channel(BATCHES_MAX);
        let room = Arc::new(Semaphore::new(SESSION_BYTES_MAX));
        (Inlet { intake: self.clone(), resends, queue, room, put_off: BTreeSet::new() }, batches)
    }

    /// Waits for a turn to write, held until it is dropped.
    pub async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.0.writes.acquire().await.ok()
    }

    /// Returns once no point of a job waits.
    pub async fn settled(&self, job: &JobId) {
        loop {
            let settled = self.0.settled.notified();
            tokio::pin!(settled);
            // Before the look, so that none is missed.
            settled.as_mut().enable();
            if !self.waiting().contains_key(job) {
                return;
            }
            settled.await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<JobId, usize>> {
        // Every change is whole before anything can panic.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    fn new(intake: &Intake, job: &JobId) -> Self {
        *intake.waiting().entry(job.clone()).or_default() += 1;
        Self(intake.clone(), job.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        if let Some(count) = waiting.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.1);
                self.0.0.settled.notify_waiters();
            }
        }
    }
}

impl Inlet {
    /// Takes points of one rank, at once. Only a daemon that cannot send them again waits for room, as its session does.
    pub async fn take(&mut self, job: JobId, points: Vec<Point>, resumes: bool) -> Result<Taken, Status> {
        let Some(last) = points.last() else { return Ok(Taken::Waits) };
        let source = (job.clone(), last.generation, last.rank);
        if self.put_off.contains(&source) && !resumes {
            return Ok(Taken::PassedOver);
        }
        let Some(room) = self.room(&points).await else {
            self.put_off.insert(source);
            if self.put_off.len() > PUT_OFF_MAX {
                return Err(Status::resource_exhausted("points of too many ranks are to be sent again"));
            }
            return Ok(Taken::PutOff);
        };
        self.put_off.remove(&source);
        let counted = Counted::new(&self.intake, &job);
        let batch = Batch { job, points, _counted: counted, _room: room };
        let stopped = |_| Status::unavailable("points are not taken any more");
        self.queue.send(batch).await.map_err(stopped)?;
        Ok(Taken::Waits)
    }

    async fn room(&self, points: &[Point]) -> Option<[OwnedSemaphorePermit; 2]> {
        // The largest message fits an empty queue.
        let bytes = points.iter().map(bytes).sum::<usize>().min(SESSION_BYTES_MAX) as u32;
        let [own, all] = [&self.room, &self.intake.0.room].map(Arc::clone);
        if self.resends {
            let is_full = self.queue.capacity() == 0;
            let own = own.try_acquire_many_owned(bytes).ok().filter(|_| !is_full)?;
            return Some([own, all.try_acquire_many_owned(bytes).ok()?]);
        }
        Some([own.acquire_many_owned(bytes).await.ok()?, all.acquire_many_owned(bytes).await.ok()?])
    }
}

/// What a point takes in memory.
fn bytes(point: &Point) -> usize {
    POINT_BYTES + point.values.keys().map(|name| VALUE_BYTES + name.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::Millis;

    const RESENDS: bool = true;

    fn job() -> JobId {
        JobId::new("j").unwrap()
    }

    /// Points that take a quarter of a session's room.
    fn quarter(rank: u32) -> Vec<Point> {
        let values = (0..3).map(|i| (format!("{i:0>100}"), 1.0)).collect();
        let (generation, rank) = (Generation(1), Rank(rank));
        let point = Point { generation, rank, seq: 1, step: 1, time: Millis(1), values };
        let count = SESSION_BYTES_MAX / 4 / bytes(&point);
        vec![point; count]
    }

    #[tokio::test]
    async fn what_there_is_no_room_for_is_put_off_once_until_it_comes_again() {
        let (mut inlet, mut batches) = Intake::new().open(RESENDS);
        for rank in 0..4 {
            assert_eq!(inlet.take(job(), quarter(rank), false).await.unwrap(), Taken::Waits);
        }
        let mut take = async |rank, resumes| inlet.take(job(), quarter(rank), resumes).await.unwrap();
        assert_eq!(take(0, false).await, Taken::PutOff);
        assert_eq!(take(0, false).await, Taken::PassedOver);
        assert_eq!(take(0, true).await, Taken::PutOff, "there is still no room");
        drop(batches.recv().await);
        assert_eq!(take(0, false).await, Taken::PassedOver, "what came between would be lost");
        assert_eq!(take(0, true).await, Taken::Waits);
        drop(batches.recv().await);
        assert_eq!(take(0, false).await, Taken::Waits);
    }

    #[tokio::test]
    async fn sessions_share_what_there_is_and_none_takes_all_of_it() {
        let intake = Intake::with_room(SESSION_BYTES_MAX * 3 / 2);
        let ((mut one, mut of_one), (mut other, _of_other)) = (intake.open(RESENDS), intake.open(RESENDS));
        let mut taken = Vec::new();
        for inlet in [&mut one, &mut other] {
            for rank in 0..5 {
                taken.push(inlet.take(job(), quarter(rank), false).await.unwrap());
            }
        }
        let waits = |taken: &[Taken]| taken.iter().filter(|taken| **taken == Taken::Waits).count();
        assert_eq!((waits(&taken[..5]), waits(&taken[5..])), (4, 2));
        drop(of_one.recv().await);
        assert_eq!(other.take(job(), quarter(2), true).await.unwrap(), Taken::Waits);
    }

    #[tokio::test]
    async fn a_daemon_that_cannot_send_again_waits_for_room() {
        let (mut inlet, mut batches) = Intake::new().open(!RESENDS);
        for rank in 0..4 {
            assert_eq!(inlet.take(job(), quarter(rank), false).await.unwrap(), Taken::Waits);
        }
        let room = tokio::spawn(async move { inlet.take(job(), quarter(0), false).await.unwrap() });
        tokio::task::yield_now().await;
        assert!(!room.is_finished());
        drop(batches.recv().await);
        assert_eq!(room.await.unwrap(), Taken::Waits);
    }

    #[tokio::test]
    async fn a_job_is_settled_once_the_last_of_its_points_is_written() {
        let intake = Intake::new();
        let (mut inlet, mut batches) = intake.open(RESENDS);
        inlet.take(job(), quarter(0), false).await.unwrap();
        let settled = tokio::spawn({
            let intake = intake.clone();
            async move { intake.settled(&job()).await }
        });
        let batch = batches.recv().await;
        tokio::task::yield_now().await;
        assert!(!settled.is_finished());
        drop(batch);
        settled.await.unwrap();
        intake.settled(&job()).await;
    }
}
