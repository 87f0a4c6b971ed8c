//! The points of a node's session: what may be taken, from whom, and how it is acknowledged.

use std::sync::Arc;

use muster_core::types::{GangId, Generation, JobId, Millis, NodeName, NodePlacement, Rank, limits};
use muster_proto::convert::{self, FieldError, field_error};
use muster_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;
use tracing::warn;

use super::Api;
use super::worker::invalid;
use crate::driver::Handle;
use crate::intake::{Batch, Inlet, Taken};
use crate::links::Link;
use crate::metrics::Point;
use crate::published::State;

/// Points in a batch, names in a point, bytes in a name; as the API says.
const POINTS_MAX: usize = 512;
const VALUES_MAX: usize = 64;
const VALUE_NAME_BYTES_MAX: usize = 128;

impl Api {
    /// Returns whether the node holds, or held, the ranks of which a batch of points is. A gang that was not assigned in
    /// this session is looked up once.
    fn holds(
        driver: &Handle,
        node: &NodeName,
        link: &Link,
        job: &JobId,
        points: &[Point],
    ) -> Result<bool, Status> {
        let Some(last) = points.last() else { return Ok(true) };
        let gang = GangId { job: job.clone(), generation: last.generation };
        let part = if let Some(part) = link.part(&gang) {
            part
        } else {
            let look = |state: &State| {
                let job = state.job(job.as_str()).ok()?;
                job.part_of(node, gang.generation).map(NodePlacement::ranks)
            };
            let part = driver.read(look)?;
            link.remember(gang, part.clone());
            part
        };
        Ok(part.is_some_and(|ranks| ranks.contains(&last.rank.0)))
    }

    /// Hands points on to whoever writes them. Never waits for a disk.
    pub(super) async fn take_points(
        &self,
        driver: &Handle,
        link: &Link,
        inlet: &mut Inlet,
        batch: v1::PointBatch,
    ) -> Result<(), Status> {
        let resumes = batch.resumes;
        let (job, points) = checked_points(batch, driver.clock().now()).map_err(invalid)?;
        let Some(last) = points.last() else { return Ok(()) };
        self.monitor.points.inc_by(points.len() as u64);
        let ack = v1::PointAck {
            job_id: job.to_string(),
            generation: last.generation.0,
            rank: last.rank.0,
            seq: 0,
            again: true,
        };
        if inlet.take(job, points, resumes).await? == Taken::PutOff {
            self.monitor.points_put_off.inc();
            link.send(v1::session_response::Message::PointAck(ack));
        }
        Ok(())
    }

    /// Writes the points of one session, and acknowledges them.
    pub(super) async fn keep_points(
        self,
        driver: Handle,
        node: NodeName,
        link: Arc<Link>,
        mut batches: mpsc::Receiver<Batch>,
    ) {
        while let Some(batch) = batches.recv().await {
            let Some(_turn) = self.intake.turn().await else { return };
            if let Err(status) = self.keep(&driver, &node, &link, batch).await {
                // The node opens another session, and sends again what was not acknowledged.
                warn!(session = %link.session, error = status.message(), "points are not kept");
                return link.close(status);
            }
        }
    }

    async fn keep(
        &self,
        driver: &Handle,
        node: &NodeName,
        link: &Link,
        mut batch: Batch,
    ) -> Result<(), Status> {
        let points = std::mem::take(&mut batch.points);
        let Some(last) = points.last() else { return Ok(()) };
        let mut ack = v1::PointAck {
            job_id: batch.job.to_string(),
            generation: last.generation.0,
            rank: last.rank.0,
            seq: last.seq,
            again: false,
        };
        let job = batch.job.clone();
        let series = if Self::holds(driver, node, link, &job, &points)? {
            self.metrics.series_of_known(driver, &job).await?
        } else {
            if self.monitor.refused("points") {
                warn!(%node, %job, generation = ack.generation, rank = ack.rank, "points of a rank that the node \
                    does not hold are refused");
            }
            None
        };
        // Points that are refused, or of a job that is no longer known, are acknowledged all the same: the node must not
        // keep them.
        if let Some(series) = series {
            let appended = tokio::task::spawn_blocking(move || series.append_checked(points))
                .await
                .map_err(|error| Status::internal(format!("failed to keep points: {error}")))?;
            match appended {
                Ok(known) => ack.seq = ack.seq.max(known.unwrap_or(0)),
                Err(jump) if self.monitor.refused("point_number") => {
                    warn!(%node, %job, rank = ack.rank, %jump, "points are refused");
                }
                Err(_) => {}
            }
        }
        drop(batch);
        link.send(v1::session_response::Message::PointAck(ack));
        Ok(())
    }
}

pub(crate) fn checked_points(batch: v1::PointBatch, now: Millis) -> Result<(JobId, Vec<Point>), FieldError> {
    let job = JobId::new(batch.job_id).map_err(|why| field_error("points.job_id", why))?;
    if batch.points.len() > POINTS_MAX {
        return Err(field_error("points.points", format!("are more than {POINTS_MAX}")));
    }
    let mut points: Vec<Point> = Vec::with_capacity(batch.points.len());
    for point in batch.points {
        let names_fit = point.values.keys().all(|name| name.len() <= VALUE_NAME_BYTES_MAX);
        if point.values.len() > VALUES_MAX || !names_fit {
            return Err(field_error("points.values", "are too many, or a name is too long"));
        }
        let point = Point {
            generation: Generation(point.generation),
            rank: Rank(point.rank.unwrap_or(0)),
            seq: point.seq,
            step: point.step.unwrap_or(0),
            time: point.time.as_ref().map_or(now, convert::millis_from_timestamp),
            values: point.values,
        };
        let follows = points.last().is_none_or(|last| {
            (last.generation, last.rank) == (point.generation, point.rank) && last.seq < point.seq
        });
        // Each rank of a job takes some memory; there cannot be more of them.
        if point.rank.0 >= limits::WORLD_SIZE_MAX {
            return Err(field_error("points.rank", format!("is {}, which no gang has", point.rank)));
        }
        if point.seq == 0 || point.generation.0 == 0 || !follows {
            return Err(field_error("points.seq", "must rise, within one generation and rank"));
        }
        points.push(point);
    }
    Ok((job, points))
}
