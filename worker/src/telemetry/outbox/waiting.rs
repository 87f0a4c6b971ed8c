//! The points of one rank: which were sent, and which come next.

use std::collections::VecDeque;
use std::path::PathBuf;

use muster_core::types::{GangId, Rank};
use muster_proto::convert::timestamp_to_wire;
use muster_proto::v1;
use tokio::time::Instant;
use tracing::warn;

use crate::telemetry::file::{self, Line, Look, Position};

/// Points in one message, as the API allows.
pub(super) const BATCH_MAX: usize = 512;
/// Bytes in one message: a quarter of the window, so that several ranks share it.
pub(super) const BATCH_BYTES_MAX: usize = 64 << 10;

pub(super) type Key = (GangId, Rank);

/// The points of one rank.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact by itself")]
pub(super) struct Waiting {
    pub path: PathBuf,
    /// Before the first that is not acknowledged.
    pub kept: Position,
    /// Before the first that the open session has not been given.
    pub next: Position,
    /// The places after those that it was given and has not acknowledged, each with the bytes of its point.
    pub window: VecDeque<(Position, usize)>,
    /// Lines that were read and not sent yet.
    pub read: VecDeque<(Position, Option<Line>)>,
    /// The highest number that the coordinator keeps: one that was sent by an earlier daemon is not sent again.
    pub known: u64,
    /// There may be more in the file.
    pub more: bool,
    /// The gang's shim still reads what ended ranks have left.
    pub draining: bool,
    /// The file is being read, from there on.
    pub reading: Option<Position>,
    /// The next batch begins with what the coordinator had no room for.
    pub resumes: bool,
    /// When this daemon heard of the rank's end.
    pub exited: Option<Instant>,
    /// The gang is forgotten; the entry goes with its last point.
    pub ended: bool,
}

/// A look at the file of one rank.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub key: Key,
    pub path: PathBuf,
    pub from: Position,
}

impl Reading {
    /// Reads on. Blocks on the disk.
    pub fn look(&self) -> Look {
        file::read(&self.path, self.from).unwrap_or_else(|error| {
            let (gang, rank) = &self.key;
            warn!(%gang, %rank, path = %self.path.display(), %error, "failed to read points");
            Look::default()
        })
    }
}

/// What a point takes at most, roughly, on the wire.
fn bytes(point: &v1::Point) -> usize {
    64 + point.values.keys().map(|name| name.len() + 32).sum::<usize>()
}

impl Waiting {
    pub fn has_unsent(&self) -> bool {
        self.more || self.reading.is_some() || !self.read.is_empty()
    }

    pub fn can_send(&self) -> bool {
        (self.more || !self.read.is_empty()) && self.reading.is_none()
    }

    /// Whether the coordinator lacks any of its points.
    pub fn owes(&self) -> bool {
        self.has_unsent() || self.draining || !self.window.is_empty()
    }

    pub fn is_done(&self) -> bool {
        self.ended && !self.owes()
    }

    /// Goes back to the first that is not acknowledged.
    pub fn rewind(&mut self) {
        self.more = true;
        self.next = self.kept;
        self.window.clear();
        self.read.clear();
    }

    /// The next points that the open session has not been given, of those that were read. May be none.
    pub fn take_batch(&mut self, (gang, rank): &Key) -> Vec<v1::Point> {
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
                let size = bytes(&point);
                room = room.saturating_sub(size);
                batch.push(point);
                self.window.push_back((after, size));
            } else if self.window.is_empty() {
                self.kept = after;
            }
            self.next = after;
            // The largest point takes a sixth of the room: beyond it by one does no harm.
            if room == 0 || batch.len() >= BATCH_MAX {
                break;
            }
        }
        batch
    }
}
