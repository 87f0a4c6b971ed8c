//! One job's points in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_core::types::{Generation, Millis, Rank, value};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use super::file::{Lines, PointFile};
use super::thin::{Kept, thin};

/// Bytes of one job's points in memory: 90,000 of one value. Beyond it the older ones are thinned.
const BYTES_MAX: usize = 16 << 20;
/// Bytes of the newest points, which stay as they are: whoever follows and is some seconds behind misses none.
const NEWEST_BYTES: usize = 4 << 20;
/// Bytes of the older ones once they are thinned. Between two times as many new ones come, so that each point has a small
/// part in their cost.
const OLDER_BYTES: usize = 6 << 20;
/// Different names of values of one job. A program that makes up names, one for each step, loses those beyond.
const NAMES_MAX: usize = 1000;
/// What a point takes beside its values, and a value beside its name: the nodes of the maps, and what allocation adds.
pub(super) const POINT_BYTES: usize = 128;
pub(super) const VALUE_BYTES: usize = 48;
/// Points that may be missing between two of a rank: more than a rank's file on its node holds, or than 10,000 points a
/// second for five days on a node whose disk is full. One wrong number must not make all that follow look old.
const SEQ_JUMP_MAX: u64 = 1 << 32;

/// One report of a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// Generation the rank belonged to.
    pub generation: Generation,
    /// Who reported.
    pub rank: Rank,
    /// Number among the points of its generation and rank, from 1.
    pub seq: u64,
    /// The program's step.
    pub step: u64,
    /// Unix time.
    pub time: Millis,
    /// Values by name.
    #[serde(with = "value")]
    pub values: BTreeMap<String, f64>,
}

/// A number of a point that is too far beyond the last of its rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a point has number {seq} after number {known}; at most {SEQ_JUMP_MAX} may be missing between two")]
pub(crate) struct SeqJump {
    seq: u64,
    known: u64,
}

/// The newest values of a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Latest {
    /// Highest step of any rank.
    pub step: Option<u64>,
    /// Last loss of the lowest rank that reports one.
    pub loss: Option<f64>,
}

/// One job's points. Every read and write is short; the file is written outside the lock on the points.
#[derive(Debug)]
pub(crate) struct Series {
    points: Mutex<Points>,
    file: Mutex<PointFile>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Points {
    kept: Kept,
    last_index: u64,
    /// Highest seq by rank, of the newest two generations: late points of the one before still count.
    seqs: BTreeMap<(Generation, Rank), u64>,
    latest: Option<Newest>,
    /// What `kept` takes.
    bytes: usize,
    names: BTreeSet<String>,
    /// Values whose names were too many.
    refused: u64,
}

#[derive(Debug)]
struct Newest {
    generation: Generation,
    step: u64,
    loss: Option<(Rank, f64)>,
}

impl Series {
    /// Takes up what the file holds; no file is an empty series. Blocks on the disk.
    pub fn read(path: PathBuf) -> Self {
        let mut points = Points::default();
        let file = PointFile::open(path, |index, point| {
            points.add_read(index, point);
            points.fit();
        });
        let changed = watch::channel(points.last_index).0;
        Self { points: Mutex::new(points), file: Mutex::new(file), changed }
    }

    /// A series without a file.
    #[cfg(any(test, fuzzing))]
    pub fn of(points: Vec<Point>) -> Self {
        let series = Self::read(PathBuf::new());
        for point in points {
            let mut kept = series.points();
            kept.add(point);
            kept.fit();
        }
        series
    }

    /// Takes up only the end of what the file holds: enough for [`Series::latest`]. Blocks on the disk.
    pub fn read_end(path: &Path) -> Self {
        let mut points = Points::default();
        PointFile::each_at_end(path, |point| points.add(point));
        let (file, changed) = (PointFile::open(PathBuf::new(), |_, _| ()), watch::channel(0).0);
        Self { points: Mutex::new(points), file: Mutex::new(file), changed }
    }

    /// Adds points of one generation and rank, in order of seq. Those already known are passed over: what a
    /// node sends twice is kept once. Returns the highest seq known of that rank: a node that is started anew
    /// need not send what comes before it. Blocks on the disk.
    pub fn append(&self, points: Vec<Point>) -> Option<u64> {
        let of = points.last().map(|point| (point.generation, point.rank))?;
        // Held throughout: nobody else adds points, or thins them.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (first_index, fresh): (u64, Vec<Point>) = {
            let mut kept = self.points();
            let one = |point| kept.is_fresh(&point).then(|| kept.known(point));
            let fresh = points.into_iter().filter_map(one).collect();
            (kept.last_index.saturating_add(1), fresh)
        };
        file.write(first_index, &fresh, || self.points().kept.clone());
        let mut fresh = fresh.into_iter().peekable();
        while fresh.peek().is_some() {
            let mut kept = self.points();
            while kept.bytes <= BYTES_MAX
                && let Some(point) = fresh.next()
            {
                kept.add(point);
            }
            if kept.bytes > BYTES_MAX {
                let all = kept.kept.clone();
                drop(kept);
                // Readers go on meanwhile.
                let thinned = thinned(&all);
                let old = self.points().replace(thinned);
                drop(old);
            }
        }
        let kept = self.points();
        let highest = kept.seqs.get(&of).copied();
        let index = kept.last_index;
        drop(kept);
        self.changed.send_replace(index);
        highest
    }

    /// As [`Series::append`]; adds none if one of the numbers is too far beyond the last.
    pub fn append_checked(&self, points: Vec<Point>) -> Result<Option<u64>, SeqJump> {
        let of = points.first().map(|point| (point.generation, point.rank));
        let mut known = of.and_then(|of| self.points().seqs.get(&of).copied()).unwrap_or(0);
        for Point { seq, .. } in &points {
            if seq.saturating_sub(known) > SEQ_JUMP_MAX {
                return Err(SeqJump { seq: *seq, known });
            }
            known = known.max(*seq);
        }
        Ok(self.append(points))
    }

    /// Up to `limit` points with an index above `after`, oldest first.
    pub fn after(&self, after: u64, limit: usize) -> Vec<(u64, Arc<Point>)> {
        let points = self.points();
        let start = points.kept.partition_point(|(index, _)| *index <= after);
        points.kept.range(start..).take(limit).cloned().collect()
    }

    /// Returns the points of the file with an index above `after`, none if there are none: all that were ever reported,
    /// unless the file became too long. Blocks on the disk, as does reading them.
    pub fn stored_after(&self, after: u64) -> Option<Lines<impl BufRead + use<>>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).after(after)
    }

    /// Tells when the newest index has changed.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The newest values, if they are of this generation.
    pub fn latest(&self, generation: Generation) -> Latest {
        let points = self.points();
        let newest = points.latest.as_ref().filter(|newest| newest.generation == generation);
        newest.map_or(Latest::default(), |newest| Latest {
            step: Some(newest.step),
            loss: newest.loss.map(|(_, loss)| loss),
        })
    }

    /// What the points take in memory.
    pub fn bytes(&self) -> usize {
        self.points().bytes
    }

    fn points(&self) -> MutexGuard<'_, Points> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Points {
    fn is_fresh(&self, point: &Point) -> bool {
        let newest = self.latest.as_ref().map_or(Generation(0), |newest| newest.generation);
        let known = self.seqs.get(&(point.generation, point.rank)).copied().unwrap_or(0);
        point.seq > known && point.generation.0.saturating_add(1) >= newest.0
    }

    /// The point without values whose names are too many.
    fn known(&mut self, mut point: Point) -> Point {
        let before = point.values.len();
        point.values.retain(|name, _| {
            let known = self.names.contains(name);
            if !known && self.names.len() < NAMES_MAX {
                return self.names.insert(name.clone());
            }
            known
        });
        let refused = (before - point.values.len()) as u64;
        if refused > 0 && self.refused == 0 {
            warn!(rank = %point.rank, "a job reports more than {NAMES_MAX} different values; further names are dropped");
        }
        self.refused += refused;
        point
    }

    fn add(&mut self, point: Point) {
        self.add_read(self.last_index.saturating_add(1), point);
    }

    /// Adds a point that has an index already.
    fn add_read(&mut self, index: u64, point: Point) {
        if !self.is_fresh(&point) {
            return;
        }
        let point = self.known(point);
        self.note_latest(&point);
        self.seqs.insert((point.generation, point.rank), point.seq);
        self.last_index = index;
        self.bytes += bytes(&point);
        self.kept.push_back((index, Arc::new(point)));
    }

    fn fit(&mut self) {
        if self.bytes > BYTES_MAX {
            let thinned = thinned(&self.kept);
            self.replace(thinned);
        }
    }

    fn replace(&mut self, kept: Kept) -> Kept {
        self.bytes = kept.iter().map(|(_, point)| bytes(point)).sum();
        std::mem::replace(&mut self.kept, kept)
    }

    fn note_latest(&mut self, point: &Point) {
        let newest = self.latest.get_or_insert(Newest { generation: point.generation, step: 0, loss: None });
        if point.generation < newest.generation {
            return;
        }
        if point.generation > newest.generation {
            *newest = Newest { generation: point.generation, step: 0, loss: None };
            let oldest = Generation(point.generation.0 - 1);
            self.seqs = self.seqs.split_off(&(oldest, Rank(0)));
        }
        newest.step = newest.step.max(point.step);
        if let Some(loss) = point.values.get("loss")
            && newest.loss.is_none_or(|(rank, _)| point.rank <= rank)
        {
            newest.loss = Some((point.rank, *loss));
        }
    }
}

/// Returns the points with the older ones thinned.
fn thinned(all: &Kept) -> Kept {
    let mut newest = 0;
    let count = all.iter().rev().take_while(|(_, point)| {
        newest += bytes(point);
        newest <= NEWEST_BYTES
    });
    let mut older = all.clone();
    let mut newest = older.split_off(all.len() - count.count());
    let mut thinned = thin(&older, OLDER_BYTES);
    thinned.append(&mut newest);
    thinned
}

/// Returns what a point takes in memory.
pub(super) fn bytes(point: &Point) -> usize {
    POINT_BYTES + point.values.keys().map(|name| VALUE_BYTES + name.len()).sum::<usize>()
}

#[cfg(test)]
mod tests;
