//! The file of one job's points: JSON lines, appended.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tracing::warn;

use super::Point;

/// Bytes of one job's points on disk. Above it new points are only kept in memory.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Bytes at a file's end that tell the newest values, for listings.
const END_BYTES: u64 = 32 << 10;
/// Longest line taken as a point; ours are far shorter.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Reads points until a line is none, and returns the bytes of those that are.
pub(crate) fn whole_lines(mut reader: impl BufRead, mut each: impl FnMut(Point)) -> u64 {
    let mut bytes = 0;
    let mut line = Vec::new();
    while let Ok(read) = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
        let parsed = line.ends_with(b"\n").then(|| serde_json::from_slice(&line).ok());
        let Some(Some(point)) = parsed else { break };
        each(point);
        bytes += read as u64;
        line.clear();
    }
    bytes
}

/// Where a job's points go. Opened for each write: ten thousand jobs need no ten thousand open files.
#[derive(Debug)]
pub(super) struct PointFile {
    path: PathBuf,
    bytes: u64,
    /// Said once, not with every point.
    complained: bool,
}

impl PointFile {
    /// Reads every whole line. A line cut short by a crash, and whatever follows it, is not counted: the next
    /// write goes over it.
    pub fn open(path: PathBuf, each: impl FnMut(Point)) -> Self {
        let bytes = File::open(&path).map_or(0, |file| whole_lines(BufReader::new(file), each));
        Self { path, bytes, complained: false }
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

    /// Appends points. A disk that is full costs the points their place on disk, not in memory, and training
    /// nothing; it is logged once.
    pub fn write(&mut self, points: &[Point]) {
        if points.is_empty() || self.bytes >= FILE_BYTES_MAX {
            return;
        }
        let mut lines = Vec::new();
        for point in points {
            if serde_json::to_writer(&mut lines, point).is_ok() {
                lines.push(b'\n');
            }
        }
        match self.write_at_end(&lines) {
            Ok(()) => self.bytes += lines.len() as u64,
            Err(error) if !self.complained => {
                self.complained = true;
                warn!(path = %self.path.display(), %error, "metrics cannot be written; they are kept in memory only");
            }
            Err(_) => {}
        }
    }

    fn write_at_end(&self, lines: &[u8]) -> std::io::Result<()> {
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
}
