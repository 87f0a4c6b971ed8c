//! The file of one job's points: JSON lines, appended.
//!
//! A point's index is its number among all points of the job. A line tells it where it is not one above that of the line
//! before: points were thinned out, or could not be written.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tracing::warn;

use super::series::Point;
use super::thin::Kept;

/// Tests have files that are shorter by this factor.
const SCALE: u64 = if cfg!(test) { 256 } else { 1 };
/// Bytes of one job's points on disk. A file that would be longer is written again: its end as it is, and before that
/// what memory keeps of the curves.
const FILE_BYTES_MAX: u64 = (256 << 20) / SCALE;
/// Bytes of a file's end that stay as they are then. It is written again each 100 MiB or so.
const TAIL_BYTES: u64 = (128 << 20) / SCALE;
/// Bytes between two places of a file of which the index is remembered.
const MARK_BYTES: u64 = (1 << 20) / SCALE;
/// Writes that are left out after a file could not be written again: the disk is full, and copying is no small thing.
const SKIPPED_WRITES: u32 = 1000;
/// Bytes at a file's end that tell the newest values, for listings.
const END_BYTES: u64 = 32 << 10;
/// Longest line taken as a point; ours are far shorter.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Begins a line that tells its index.
const INDEX: &str = "{\"index\":";

/// Returns the index that a line tells.
fn told_index(line: &[u8]) -> Option<u64> {
    let rest = line.strip_prefix(INDEX.as_bytes())?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// Appends a line. It tells its index if that does not follow the last one.
fn push_line(lines: &mut Vec<u8>, last_index: u64, index: u64, point: &Point) {
    let start = lines.len();
    let follows = last_index.checked_add(1) == Some(index);
    if !follows {
        lines.extend_from_slice(format!("{INDEX}{index},").as_bytes());
    }
    let object = lines.len();
    if serde_json::to_writer(&mut *lines, point).is_err() {
        lines.truncate(start);
        return;
    }
    if !follows {
        // The brace that begins the point's own object.
        lines.remove(object);
    }
    lines.push(b'\n');
}

/// Lines that are points, with their indices.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: R,
    line: Vec<u8>,
    index: u64,
    /// Bytes of the lines that were read.
    bytes: u64,
}

impl<R: BufRead> Lines<R> {
    /// Reads from a place after the point with this index.
    pub fn after(index: u64, reader: R) -> Self {
        Self { reader, line: Vec::new(), index, bytes: 0 }
    }

    /// Returns the bytes of the lines that were read.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = (u64, Point);

    /// Reads a line. None at the end, and for good once a line is no point.
    fn next(&mut self) -> Option<(u64, Point)> {
        self.line.clear();
        let mut limited = self.reader.by_ref().take(LINE_BYTES_MAX);
        let read = limited.read_until(b'\n', &mut self.line).ok()?;
        let point = self.line.ends_with(b"\n").then(|| serde_json::from_slice(&self.line).ok())??;
        let next = self.index.checked_add(1)?;
        self.index = told_index(&self.line).filter(|told| *told > self.index).unwrap_or(next);
        self.bytes += read as u64;
        Some((self.index, point))
    }
}

/// The file in which a job's points are kept. Opened for each write: ten thousand jobs need no ten thousand open files.
#[derive(Debug)]
pub(super) struct PointFile {
    path: PathBuf,
    bytes: u64,
    /// Index of the last point in it.
    last_index: u64,
    /// Places in it, each with the index of the point before: a reader need not begin at the beginning.
    marks: Vec<(u64, u64)>,
    /// Writes to leave out.
    skip: u32,
    /// Said once, not with every point.
    complained: bool,
}

impl PointFile {
    /// Reads every whole line. A line cut short by a crash, and whatever follows it, is not counted: the next
    /// write goes over it.
    pub fn open(path: PathBuf, mut each: impl FnMut(u64, Point)) -> Self {
        let mut file = Self { path, bytes: 0, last_index: 0, marks: Vec::new(), skip: 0, complained: false };
        let Ok(opened) = File::open(&file.path) else { return file };
        let mut lines = Lines::after(0, BufReader::new(opened));
        while let Some((index, point)) = lines.next() {
            file.count(lines.bytes() - file.bytes, index);
            each(index, point);
        }
        file
    }

    /// Reads the points in the last part of a file.
    pub fn each_at_end(path: &Path, mut each: impl FnMut(Point)) {
        let Ok(mut file) = File::open(path) else { return };
        let start = file.metadata().map_or(0, |meta| meta.len().saturating_sub(END_BYTES));
        if file.seek(SeekFrom::Start(start)).is_err() {
            return;
        }
        // The first line may be the end of one, which is no point.
        for line in BufReader::new(file.take(END_BYTES)).split(b'\n').map_while(Result::ok) {
            if let Ok(point) = serde_json::from_slice(&line) {
                each(point);
            }
        }
    }

    /// Returns the points with an index above `after`, if there are any. It shows what the file holds now, whatever is
    /// written meanwhile.
    pub fn after(&self, after: u64) -> Option<Lines<impl BufRead + use<>>> {
        if self.last_index <= after {
            return None;
        }
        let mark = self.marks.partition_point(|(_, before)| *before <= after).checked_sub(1);
        let (offset, before) = mark.map_or((0, 0), |mark| self.marks[mark]);
        let mut file = File::open(&self.path).ok()?;
        file.seek(SeekFrom::Start(offset)).ok()?;
        Some(Lines::after(before, BufReader::new(file.take(self.bytes - offset))))
    }

    /// Appends points, of which the first has this index. What `kept` returns of older ones takes their place once the
    /// file is too long. A disk that is full costs the points their place on disk, not in memory, and training nothing;
    /// it is logged once.
    pub fn write(&mut self, first_index: u64, points: &[Point], kept: impl FnOnce() -> Kept) {
        if points.is_empty() || self.path.as_os_str().is_empty() {
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        let mut lines = Vec::new();
        let (mut last, mut sizes) = (self.last_index, Vec::with_capacity(points.len()));
        for (index, point) in (first_index..).zip(points) {
            let start = lines.len();
            push_line(&mut lines, last, index, point);
            sizes.push((lines.len() - start, index));
            last = index;
        }
        if self.bytes + lines.len() as u64 > FILE_BYTES_MAX
            && let Err(error) = self.rewrite(kept())
        {
            self.skip = SKIPPED_WRITES;
            return self.complain(&error);
        }
        match self.write_at_end(&lines) {
            Ok(()) => sizes.into_iter().for_each(|(bytes, index)| self.count(bytes as u64, index)),
            Err(error) => self.complain(&error),
        }
    }

    fn complain(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!(path = %self.path.display(), %error, "points cannot be written; they are kept in memory only");
        }
    }

    /// A line of so many bytes is at the end.
    fn count(&mut self, bytes: u64, index: u64) {
        if self.marks.last().is_none_or(|(offset, _)| self.bytes - offset >= MARK_BYTES) {
            self.marks.push((self.bytes, self.last_index));
        }
        self.bytes += bytes;
        self.last_index = index;
    }

    fn write_at_end(&self, lines: &[u8]) -> io::Result<()> {
        if self.bytes == 0
            && let Some(dir) = self.path.parent()
        {
            std::fs::create_dir_all(dir)?;
        }
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(&self.path)?;
        // Cuts off a torn line, or what an earlier write left when the disk was full.
        file.set_len(self.bytes)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(lines)
    }

    /// Writes the file again: its end as it is, and before that those of the kept points that are older.
    fn rewrite(&mut self, kept: Kept) -> io::Result<()> {
        let from = self.bytes.saturating_sub(TAIL_BYTES);
        let mark = self.marks.partition_point(|(offset, _)| *offset < from).min(self.marks.len() - 1);
        let (from, before) = self.marks[mark];
        let path = self.path.with_extension("jsonl.new");
        let mut old = File::open(&self.path)?;
        old.seek(SeekFrom::Start(from))?;
        let mut new = Self {
            path: path.clone(),
            bytes: 0,
            last_index: 0,
            marks: Vec::new(),
            skip: 0,
            complained: self.complained,
        };
        let mut out = io::BufWriter::new(File::create(&path)?);
        let mut line = Vec::new();
        let mut write = |new: &mut Self, index: u64, point: &Point| {
            line.clear();
            push_line(&mut line, new.last_index, index, point);
            new.count(line.len() as u64, index);
            out.write_all(&line)
        };
        for (index, point) in kept.iter().take_while(|(index, _)| *index <= before) {
            write(&mut new, *index, point)?;
        }
        drop(kept);
        // Its first line tells its index now, for it may not follow what is before it. The others are as they were.
        let mut lines = Lines::after(before, BufReader::new(old.take(self.bytes - from)));
        let (index, point) = lines.next().ok_or(io::ErrorKind::InvalidData)?;
        write(&mut new, index, &point)?;
        let (old_end, new_end) = (from + lines.bytes(), new.bytes);
        let copied = io::copy(&mut lines.reader, &mut out)?;
        if old_end + copied != self.bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let moved = self.marks.iter().filter(|(offset, _)| *offset >= old_end);
        new.marks.extend(moved.map(|(offset, before)| (offset - old_end + new_end, *before)));
        new.bytes += copied;
        new.last_index = self.last_index;
        // A name that is given to an empty file by a crash of the machine would cost the whole curve.
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_data()?;
        std::fs::rename(&path, &self.path)?;
        new.path = std::mem::take(&mut self.path);
        *self = new;
        Ok(())
    }
}

/// Removes a job's file, and what a rewrite that was cut short has left.
pub(super) fn remove(path: &Path) {
    std::fs::remove_file(path).ok();
    std::fs::remove_file(path.with_extension("jsonl.new")).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{Generation, Millis, Rank};
    use std::sync::Arc;

    fn point(seq: u64) -> Point {
        let values = [("loss".to_owned(), 1.0 / seq as f64)].into();
        Point { generation: Generation(1), rank: Rank(0), seq, step: seq, time: Millis(seq), values }
    }

    /// What memory keeps: every hundredth.
    fn kept(last: u64) -> Kept {
        (1..=last).filter(|seq| seq % 100 == 1).map(|seq| (seq, Arc::new(point(seq)))).collect()
    }

    fn read(path: &Path) -> (PointFile, Vec<u64>) {
        let mut indices = Vec::new();
        let file = PointFile::open(path.to_owned(), |index, point| {
            assert_eq!(index, point.seq, "an index is that of its point");
            indices.push(index);
        });
        (file, indices)
    }

    #[test]
    fn a_file_that_is_too_long_keeps_its_end_and_the_shape_of_what_is_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.jsonl");
        let mut file = PointFile::open(path.clone(), |_, _| ());
        let (batch, last) = (500, 60_000);
        let mut longest = 0;
        for first in (1..=last).step_by(batch as usize) {
            let points: Vec<Point> = (first..first + batch).map(point).collect();
            file.write(first, &points, || kept(first - 1));
            longest = longest.max(std::fs::metadata(&path).unwrap().len());
            assert_eq!(std::fs::metadata(&path).unwrap().len(), file.bytes);
        }
        assert!(longest <= FILE_BYTES_MAX && longest > FILE_BYTES_MAX * 9 / 10, "{longest}");
        let (again, indices) = read(&path);
        assert_eq!((again.bytes, again.last_index), (file.bytes, last));
        assert!(!path.with_extension("jsonl.new").exists());
        let gap = indices.windows(2).position(|pair| pair[0] + 1 < pair[1]).unwrap();
        assert!(indices[0] == 1 && indices[gap + 1] > indices[gap], "its beginning is thinned");
        let full = indices.iter().rev().zip((1..=last).rev()).take_while(|(index, seq)| **index == *seq);
        assert!(full.count() > 5_000, "its end is whole");
        assert!(indices.windows(2).all(|pair| (1..=100).contains(&(pair[1] - pair[0]))), "without a gap");
        for after in [0, 1, 5_000, last / 2, last - 700, last - 1] {
            for file in [&file, &again] {
                let read: Vec<u64> = file.after(after).unwrap().map(|(index, _)| index).collect();
                let read = read.iter().filter(|index| **index > after);
                assert!(read.eq(indices.iter().filter(|index| **index > after)), "after {after}");
            }
        }
        assert!(file.after(last).is_none());
    }

    #[test]
    fn indices_stay_over_points_that_could_not_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("points/job.jsonl");
        let mut file = PointFile::open(path.clone(), |_, _| ());
        file.write(1, &[point(1), point(2)], Kept::new);
        // Its directory is away for a while, as room is on a full disk.
        std::fs::rename(dir.path().join("points"), dir.path().join("aside")).unwrap();
        file.write(3, &[point(3)], Kept::new);
        std::fs::rename(dir.path().join("aside"), dir.path().join("points")).unwrap();
        file.write(4, &[point(4), point(5)], Kept::new);
        assert_eq!(read(&path).1, [1, 2, 4, 5]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches(INDEX).count(), 1, "only where it does not follow: {text}");
    }
}
