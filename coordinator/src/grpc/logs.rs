//! StreamLogs: output is pulled from the nodes that hold it, rank by rank, no faster than the client reads.

use muster_core::types::{Generation, NodeName, Rank};
use muster_core::{Caller, Job, not_owned};
use muster_proto::convert::{self, field_error};
use muster_proto::v1;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::{Api, Followed, followed};
use crate::view::Sight;

/// Bytes that nodes may send ahead of one client, over all ranks and streams that are read at once. As much waits for it in
/// [`QUEUE`], and twice as much encoded: 128 KiB for each of those that `answers/share.rs` lets in.
const CREDIT_BYTES: u64 = 32 << 10;
/// Least that a node may send ahead of one file: smaller pieces cost more than they hold.
const SOURCE_CREDIT_BYTES: u64 = 1 << 10;
/// Pieces that wait for the client's turn to read. Their nodes have been allowed to send more.
const QUEUE: usize = 1;
/// Pieces that may wait for that queue, per rank and stream: small writes make small pieces, so the credit alone does not
/// bound their number. Beyond it the log is subscribed to again from where it was, once they are read.
const PIECES_MAX: usize = 64;
/// Ranks whose output one call follows; more would need more queues than a terminal has lines.
const RANKS_MAX: usize = 256;
/// How soon to ask again for the logs of a node that is not connected.
const RETRY: std::time::Duration = std::time::Duration::from_secs(2);

/// One file on one node.
pub(crate) struct Source {
    node: NodeName,
    rank: Rank,
    local_rank: u32,
    stream: v1::LogStream,
}

impl Api {
    pub(super) fn stream_output(
        self,
        request: v1::StreamLogsRequest,
        by: &Caller,
    ) -> Result<Followed<v1::StreamLogsResponse>, Status> {
        let job = self.find_job(&request.job_id)?;
        if self.sight(&job, by) == Sight::Redacted {
            let message =
                format!("the output of job {} is not shown: it {}", job.id, not_owned(job.owner.as_ref()));
            return Err(convert::refusal(Code::PermissionDenied, "NOT_OWNER", message));
        }
        let generation = request.generation.map_or(job.generation, Generation);
        let sources = sources(&job, generation, &request)?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let at_once = if request.follow { sources.len() as u64 } else { 1 };
        let credit = (CREDIT_BYTES / at_once.max(1)).max(SOURCE_CREDIT_BYTES);
        tokio::spawn(async move {
            let copies = sources.into_iter().map(|source| {
                let (api, job, request, sender) =
                    (self.clone(), job.clone(), request.clone(), sender.clone());
                async move { api.copy(&job, generation, &source, &request, (&sender, credit)).await }
            });
            // With follow all ranks are read side by side; without, one after the other, so that the output
            // comes in rank order.
            let result = if request.follow {
                let mut running: tokio::task::JoinSet<_> = copies.collect();
                let mut result = Ok(());
                while let Some(done) = running.join_next().await {
                    result = result.and(done.unwrap_or_else(|e| Err(Status::internal(e.to_string()))));
                }
                result
            } else {
                let mut result = Ok(());
                for copy in copies {
                    result = copy.await;
                    if result.is_err() {
                        break;
                    }
                }
                result
            };
            if let Err(status) = result {
                sender.send(Err(status)).await.ok();
            }
        });
        Ok(followed(receiver, |chunk| v1::StreamLogsResponse { chunk: Some(chunk) }))
    }

    /// Copies one file until its end, or until the client goes.
    async fn copy(
        &self,
        job: &Job,
        generation: Generation,
        source: &Source,
        request: &v1::StreamLogsRequest,
        (sender, credit_bytes): (&mpsc::Sender<Result<v1::LogChunk, Status>>, u64),
    ) -> Result<(), Status> {
        let mut offset = request.offset;
        let node = &source.node;
        let reign = self.office.reign()?;
        // A session that breaks is taken up again where it was, as long as the node comes back.
        loop {
            let away = || {
                let message =
                    format!("node {node}, which holds the output of rank {}, is not connected", source.rank);
                convert::unavailable("NODE_NOT_CONNECTED", message, RETRY)
            };
            let link = reign.driver.links().get(node).ok_or_else(away)?;
            link.room_for_readers().await;
            let (pieces, mut incoming) = mpsc::channel(PIECES_MAX);
            let subscription = link
                .subscribe(pieces, |subscription| v1::LogSubscribe {
                    subscription,
                    job_id: job.id.to_string(),
                    generation: generation.0,
                    rank: source.rank.0,
                    stream: source.stream.into(),
                    offset,
                    follow: request.follow,
                    credit_bytes,
                    local_rank: source.local_rank,
                })
                .ok_or_else(away)?;
            loop {
                let piece = tokio::select! {
                    piece = incoming.recv() => piece,
                    () = sender.closed() => {
                        link.unsubscribe(subscription);
                        return Ok(());
                    }
                    () = reign.over.cancelled() => return Err(crate::driver::RequestError::Stopping.into()),
                };
                // The session broke, or the node overran its credit.
                let Some(piece) = piece else { break };
                if !piece.error.is_empty() {
                    return Err(convert::refusal(
                        tonic::Code::NotFound,
                        "NO_OUTPUT",
                        format!("{node}: {}", piece.error),
                    ));
                }
                if let Some(chunk) = piece.chunk.filter(|chunk| !chunk.data.is_empty()) {
                    let bytes = chunk.data.len() as u64;
                    offset = chunk.offset.saturating_add(bytes);
                    if sender.send(Ok(chunk)).await.is_err() {
                        link.unsubscribe(subscription);
                        return Ok(());
                    }
                    let credit = v1::LogCredit { subscription, bytes };
                    link.room_for_readers().await;
                    link.send(v1::session_response::Message::LogCredit(credit));
                }
                if piece.end {
                    return Ok(());
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

pub(crate) fn sources(
    job: &Job,
    generation: Generation,
    request: &v1::StreamLogsRequest,
) -> Result<Vec<Source>, Status> {
    if generation.0 == 0 {
        let message = format!("job {} has not started yet: {}", job.id, job.reason);
        return Err(convert::precondition(job.id.as_str(), message));
    }
    let placements = job.placements_of(generation).ok_or_else(|| {
        let why = format!("is {generation}, which job {} never had or which is no longer known", job.id);
        convert::invalid_argument(&[field_error("generation", why)])
    })?;
    let world: u32 = placements.iter().map(|placement| placement.procs).sum();
    if let Some(rank) = request.rank.filter(|rank| *rank >= world) {
        let why = format!("is {rank}; the job has ranks 0 to {}", world.saturating_sub(1));
        return Err(convert::invalid_argument(&[field_error("rank", why)]));
    }
    let streams = match request.stream() {
        v1::LogStream::Unspecified => vec![v1::LogStream::Stdout, v1::LogStream::Stderr],
        one @ (v1::LogStream::Stdout | v1::LogStream::Stderr) => vec![one],
    };
    let mut sources = Vec::new();
    for placement in placements {
        for rank in placement.first_rank.0..placement.first_rank.0 + placement.procs {
            if request.rank.is_some_and(|wanted| wanted != rank) {
                continue;
            }
            for stream in &streams {
                sources.push(Source {
                    node: placement.node.clone(),
                    rank: Rank(rank),
                    local_rank: rank - placement.first_rank.0,
                    stream: *stream,
                });
            }
        }
    }
    if request.follow && sources.len() > RANKS_MAX * 2 {
        let why =
            format!("is needed to follow a job of {world} ranks; at most {RANKS_MAX} are followed together");
        return Err(convert::invalid_argument(&[field_error("rank", why)]));
    }
    Ok(sources)
}
