//! One job's points in memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_core::types::{Generation, Millis, Rank, value};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use super::file::PointFile;

/// Points of one job in memory. When full, every second one of the older half goes: a long run keeps its whole
/// shape, and its end in full.
const POINTS_MAX: usize = 50_000;
/// Bytes of one job's points in memory, for jobs that report many values: 50,000 points of one value take half of it.
const BYTES_MAX: usize = 16 << 20;
/// Different names of values of one job. A program that makes up names, one for each step, loses those beyond.
const NAMES_MAX: usize = 1000;
/// What a point takes beside its values, and a value beside its name: the nodes of the maps, and what allocation adds.
const POINT_BYTES: usize = 128;
const VALUE_BYTES: usize = 48;
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
    kept: VecDeque<(u64, Arc<Point>)>,
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
        let file = PointFile::open(path, |point| points.add(point));
        let changed = watch::channel(points.last_index).0;
        Self { points: Mutex::new(points), file: Mutex::new(file), changed }
    }

    /// A series without a file.
    #[cfg(any(test, fuzzing))]
    pub fn of(points: Vec<Point>) -> Self {
        let series = Self::read(PathBuf::new());
        for point in points {
            series.points().add(point);
        }
        series
    }

    /// Takes up only the end of what the file holds: enough for [`Series::latest`]. Blocks on the disk.
    pub fn read_end(path: &Path) -> Self {
        let mut points = Points::default();
        PointFile::each_at_end(path, |point| points.add(point));
        let (file, changed) = (PointFile::open(PathBuf::new(), |_| ()), watch::channel(0).0);
        Self { points: Mutex::new(points), file: Mutex::new(file), changed }
    }

    /// Adds points of one generation and rank, in order of seq. Those already known are passed over: what a
    /// node sends twice is kept once. Returns the highest seq known of that rank: a node that is started anew
    /// need not send what comes before it. Blocks on the disk.
    pub fn append(&self, points: Vec<Point>) -> Option<u64> {
        let of = points.last().map(|point| (point.generation, point.rank))?;
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh: Vec<Point> = {
            let mut kept = self.points();
            let one = |point| kept.is_fresh(&point).then(|| kept.known(point));
            points.into_iter().filter_map(one).collect()
        };
        file.write(&fresh);
        let mut kept = self.points();
        for point in fresh {
            kept.add(point);
        }
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
        if !self.is_fresh(&point) {
            return;
        }
        let point = self.known(point);
        self.note_latest(&point);
        self.seqs.insert((point.generation, point.rank), point.seq);
        self.last_index += 1;
        self.bytes += bytes(&point);
        self.kept.push_back((self.last_index, Arc::new(point)));
        while self.kept.len() > POINTS_MAX || self.bytes > BYTES_MAX {
            self.thin();
        }
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

    fn thin(&mut self) {
        let half = self.kept.len() / 2;
        let newer = self.kept.split_off(half);
        let older = std::mem::take(&mut self.kept);
        self.kept = older.into_iter().step_by(2).chain(newer).collect();
        self.bytes = self.kept.iter().map(|(_, point)| bytes(point)).sum();
    }
}

fn bytes(point: &Point) -> usize {
    POINT_BYTES + point.values.keys().map(|name| VALUE_BYTES + name.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(generation: u32, rank: u32, seq: u64, loss: f64) -> Point {
        let values = BTreeMap::from([("loss".to_owned(), loss)]);
        let (generation, rank) = (Generation(generation), Rank(rank));
        Point { generation, rank, seq, step: seq.wrapping_mul(10), time: Millis(seq), values }
    }

    #[test]
    fn what_is_sent_twice_is_kept_once_and_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics/job.jsonl");
        let series = Series::read(path.clone());
        let sent = vec![point(1, 0, 1, 2.0), point(1, 0, 2, 1.5)];
        assert_eq!(series.append(sent.clone()), Some(2));
        assert_eq!(series.append(sent), Some(2));
        assert_eq!(series.append(vec![point(1, 0, 2, 1.5), point(1, 0, 3, 1.0)]), Some(3));
        for series in [series, Series::read(path)] {
            let seqs: Vec<u64> = series.after(0, 100).iter().map(|(_, p)| p.seq).collect();
            assert_eq!(seqs, [1, 2, 3]);
            assert_eq!(series.latest(Generation(1)), Latest { step: Some(30), loss: Some(1.0) });
            assert_eq!(series.latest(Generation(2)), Latest::default());
        }
        let path = dir.path().join("metrics/job.jsonl");
        let end = Series::read_end(&path).latest(Generation(1));
        assert_eq!(end, Latest { step: Some(30), loss: Some(1.0) });
    }

    #[test]
    fn values_that_are_not_finite_survive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.jsonl");
        let series = Series::read(path.clone());
        let losses = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
        series.append((1..).zip(losses).map(|(seq, loss)| point(1, 0, seq, loss)).collect());
        let end = Series::read_end(&path);
        for series in [series, Series::read(path)] {
            let kept: Vec<f64> = series.after(0, 9).iter().map(|(_, point)| point.values["loss"]).collect();
            assert_eq!(format!("{kept:?}"), format!("{losses:?}"));
            assert!(series.latest(Generation(1)).loss.is_some_and(f64::is_nan));
        }
        assert!(end.latest(Generation(1)).loss.is_some_and(f64::is_nan));
    }

    #[test]
    fn a_number_far_beyond_the_last_is_refused_and_costs_nothing() {
        let series = Series::read(PathBuf::new());
        assert_eq!(series.append_checked(vec![point(1, 0, 5, 2.0)]), Ok(Some(5)));
        for seqs in [vec![1 << 63], vec![6, u64::MAX], vec![6 + SEQ_JUMP_MAX]] {
            let jump = SeqJump { seq: *seqs.last().unwrap(), known: if seqs.len() > 1 { 6 } else { 5 } };
            let points = seqs.into_iter().map(|seq| point(1, 0, seq, 2.0)).collect();
            assert_eq!(series.append_checked(points), Err(jump));
        }
        let next = vec![point(1, 0, 5, 2.0), point(1, 0, 5 + SEQ_JUMP_MAX, 2.0)];
        assert_eq!(series.append_checked(next), Ok(Some(5 + SEQ_JUMP_MAX)));
        let kept: Vec<u64> = series.after(0, 9).iter().map(|(_, point)| point.seq).collect();
        assert_eq!(kept, [5, 5 + SEQ_JUMP_MAX]);
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.jsonl");
        Series::read(path.clone()).append(vec![point(1, 0, 1, 2.0), point(1, 0, 2, 1.5)]);
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let series = Series::read(path.clone());
            series.append(vec![point(1, 0, 9, 0.5)]);
            let again: Vec<u64> = Series::read(path.clone()).after(0, 9).iter().map(|(_, p)| p.seq).collect();
            assert_eq!(again.last(), Some(&9), "cut at {cut}");
        }
    }

    #[test]
    fn memory_is_bounded_and_the_index_keeps_rising() {
        let series = Series::read(PathBuf::new());
        for seq in 1..=(POINTS_MAX as u64 * 3) {
            series.points().add(point(1, 0, seq, 1.0));
        }
        let kept = series.after(0, usize::MAX);
        assert!(kept.len() <= POINTS_MAX);
        assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(kept.last().unwrap().0, POINTS_MAX as u64 * 3);
        assert!(kept[0].1.seq < 100, "the beginning of the curve is kept");
    }

    #[test]
    fn a_flood_of_names_is_bounded_and_costs_no_other_value() {
        let dir = tempfile::tempdir().unwrap();
        let series = Series::read(dir.path().join("job.jsonl"));
        for seq in 1..=3000 {
            let mut point = point(1, 0, seq, 1.0 / seq as f64);
            point.values.extend((0..63).map(|i| (format!("{:0>128}", seq * 63 + i), 1.0)));
            series.append(vec![point]);
            assert!(series.bytes() <= BYTES_MAX);
        }
        let kept = series.after(0, usize::MAX);
        let names: BTreeSet<_> = kept.iter().flat_map(|(_, point)| point.values.keys().cloned()).collect();
        assert!(names.len() <= NAMES_MAX, "{}", names.len());
        assert!(
            kept.iter().all(|(_, point)| point.values.contains_key("loss")),
            "the loss is in every point"
        );
        assert_eq!(series.latest(Generation(1)), Latest { step: Some(30_000), loss: Some(1.0 / 3000.0) });
    }

    #[test]
    fn points_with_many_values_are_bounded_by_their_bytes() {
        let series = Series::read(PathBuf::new());
        for seq in 1..=10_000 {
            let mut point = point(1, 0, seq, 1.0);
            point.values.extend((0..63).map(|i| (format!("{i:0>128}"), 1.0)));
            series.append(vec![point]);
        }
        assert!((BYTES_MAX / 2..=BYTES_MAX).contains(&series.bytes()), "{}", series.bytes());
        let kept = series.after(0, usize::MAX);
        assert_eq!(kept.last().unwrap().1.seq, 10_000);
        assert!(kept[0].1.seq < 100, "the beginning of the curve is kept");
    }
}
