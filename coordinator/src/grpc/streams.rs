//! WatchJob, WatchNodes and StreamMetrics: a task each, fed by the driver's changes, held to its client's pace.

use std::sync::Arc;
use std::time::Duration;

use muster_core::types::{JobId, Rank};
use muster_core::{Caller, Job, Node};
use muster_proto::{convert, v1};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::{Api, Followed, STREAM_QUEUE, followed};
use crate::metrics::{Point, Series};
use crate::monitor::Monitor;
use crate::office::Reign;
use crate::view;

/// Points taken out of a series at a time.
const POINTS_AT_ONCE: usize = 256;

/// Time for the points of a job that has ended to be written.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// A client that lets thousands of changes pile up is told, rather than given a stream with holes.
fn too_slow(monitor: &Monitor, stream: &str) -> Status {
    monitor.too_slow(stream);
    let message =
        "changes came faster than this client read them; call again to start from the present state";
    convert::refusal(Code::ResourceExhausted, "TOO_SLOW", message)
}

fn stopping() -> Status {
    crate::driver::RequestError::Stopping.into()
}

impl Api {
    pub(super) fn stream_job(
        self,
        job_id: &str,
        by: &Caller,
    ) -> Result<Followed<v1::WatchJobResponse>, Status> {
        let Reign { driver, over, .. } = self.office.reign()?;
        let (mut job, mut changes) = driver.watch_job(job_id)?;
        // Whose a job is never changes.
        let sight = self.sight(&job, by);
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE);
        tokio::spawn(async move {
            loop {
                let latest = self.metrics.series(&job.id).await.latest(job.generation);
                if sender.send(Ok((job.clone(), latest))).await.is_err() || job.state.is_terminal() {
                    return;
                }
                job = tokio::select! {
                    changed = changes.recv() => match changed {
                        Ok(job) => job,
                        Err(RecvError::Lagged(_)) => {
                            let slow = too_slow(&self.monitor, "watch_job");
                            return drop(sender.send(Err(slow)).await);
                        }
                        Err(RecvError::Closed) => return drop(sender.send(Err(stopping())).await),
                    },
                    () = over.cancelled() => return drop(sender.send(Err(stopping())).await),
                    () = sender.closed() => return,
                };
            }
        });
        Ok(followed(receiver, move |(job, latest): (Arc<Job>, _)| {
            let job = Some(view::job(&job, latest, sight));
            v1::WatchJobResponse { job }
        }))
    }

    pub(super) fn stream_nodes(self) -> Result<Followed<v1::WatchNodesResponse>, Status> {
        let Reign { driver, over, .. } = self.office.reign()?;
        let (nodes, mut changes) = driver.watch_nodes()?;
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE);
        tokio::spawn(async move {
            for node in nodes {
                if sender.send(Ok(node)).await.is_err() {
                    return;
                }
            }
            loop {
                let next = tokio::select! {
                    changed = changes.recv() => match changed {
                        Ok(node) => Ok(node),
                        Err(RecvError::Lagged(_)) => Err(too_slow(&self.monitor, "watch_nodes")),
                        Err(RecvError::Closed) => Err(stopping()),
                    },
                    () = over.cancelled() => Err(stopping()),
                    () = sender.closed() => return,
                };
                let last = next.is_err();
                if sender.send(next).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(followed(receiver, |node: Arc<Node>| v1::WatchNodesResponse { node: Some(view::node(&node)) }))
    }

    pub(super) async fn stream_points(
        self,
        request: v1::StreamMetricsRequest,
    ) -> Result<Followed<v1::StreamMetricsResponse>, Status> {
        let Reign { driver, over, .. } = self.office.reign()?;
        let (job, mut changes) = driver.watch_job(&request.job_id)?;
        let series = self.metrics.series(&job.id).await;
        let mut grown = series.watch();
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE);
        tokio::spawn(async move {
            let (mut after, mut ended) = (request.after_index, job.state.is_terminal() || !request.follow);
            if job.state.is_terminal() {
                self.points_settled(&job.id).await;
            }
            if request.full {
                let stored = send_stored(&series, after, request.rank, &sender).await;
                let Some(last) = stored else { return };
                after = last;
            }
            loop {
                // Marked seen before the points are taken, so that none that comes meanwhile is missed.
                grown.borrow_and_update();
                let points = series.after(after, POINTS_AT_ONCE);
                let whole = points.len() < POINTS_AT_ONCE;
                for (index, point) in points {
                    after = index;
                    if wanted(&point, request.rank) {
                        let response = v1::StreamMetricsResponse { point: Some(view::point(&point)), index };
                        if sender.send(Ok(Box::new(response))).await.is_err() {
                            return;
                        }
                    }
                }
                if !whole {
                    continue;
                }
                if ended {
                    return;
                }
                tokio::select! {
                    changed = grown.changed() => if changed.is_err() { return },
                    // A node sends a rank's points before it reports the rank's exit, unless they are very many: once
                    // those that have come are written, the series is whole, and one more look takes the rest.
                    () = job_ended(&mut changes) => {
                        self.points_settled(&job.id).await;
                        ended = true;
                    }
                    () = over.cancelled() => return drop(sender.send(Err(stopping())).await),
                    () = sender.closed() => return,
                }
            }
        });
        Ok(followed(receiver, |response: Box<_>| *response))
    }
}

impl Api {
    /// Waits until the points of a job that have come are written, for as long as a disk may take.
    async fn points_settled(&self, job: &JobId) {
        tokio::time::timeout(SETTLE_MAX, self.intake.settled(job)).await.ok();
    }
}

/// Sends the points of a job's file, some at a time, until none is left. Returns the index of the last; none if the client
/// has gone.
async fn send_stored(
    series: &Arc<Series>,
    mut after: u64,
    rank: Option<u32>,
    sender: &mpsc::Sender<Result<Box<v1::StreamMetricsResponse>, Status>>,
) -> Option<u64> {
    let mut lines = None;
    loop {
        let (series, taken) = (series.clone(), lines.take());
        let read = tokio::task::spawn_blocking(move || {
            let mut lines = taken.or_else(|| series.stored_after(after))?;
            let points: Vec<_> = lines.by_ref().take(POINTS_AT_ONCE).collect();
            Some((lines, points))
        });
        // A file that ended may have grown meanwhile: it is looked at again until nothing is new in it.
        let Some((rest, points)) = read.await.ok().flatten() else { return Some(after) };
        let is_end = points.len() < POINTS_AT_ONCE;
        let before = after;
        for (index, point) in points {
            if index <= after {
                continue;
            }
            after = index;
            if wanted(&point, rank) {
                let response = v1::StreamMetricsResponse { point: Some(view::point(&point)), index };
                sender.send(Ok(Box::new(response))).await.ok()?;
            }
        }
        if is_end && after == before {
            return Some(after);
        }
        lines = (!is_end).then_some(rest);
    }
}

fn wanted(point: &Point, rank: Option<u32>) -> bool {
    rank.is_none_or(|rank| point.rank == Rank(rank))
}

/// Returns once the job has ended. A watcher that lagged looks at the newest state next.
pub(super) async fn job_ended(changes: &mut broadcast::Receiver<Arc<Job>>) {
    loop {
        match changes.recv().await {
            Ok(job) if job.state.is_terminal() => return,
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}
