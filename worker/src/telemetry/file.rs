//! The points of one rank on disk, `points.jsonl` in its log directory. The file is the queue between the shim,
//! which writes it, and whatever daemon there is, which sends from it. The number of a line is that of its point.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use muster_core::types::{Millis, value};
use serde::{Deserialize, Serialize};

use super::parse::Reported;
use crate::clock::unix_now;
use crate::data_dir::private_file;

/// Bytes of one rank's points on disk: ten million of them. Beyond it they are dropped, so that a rank that
/// reports nonsense does not fill the disk.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// Bytes read at once: little more than the next batch takes, for what was read of a rank waits in memory. The longest line
/// that a rank may write is half of it.
const READ_BYTES_MAX: usize = 128 << 10;

/// Where a rank's points are.
pub(crate) fn path_in(log_dir: &Path) -> PathBuf {
    log_dir.join("points.jsonl")
}

/// A line.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Line {
    /// So many points could not be written; they have numbers all the same.
    Dropped { dropped: u64 },
    Point {
        step: u64,
        time: Millis,
        #[serde(with = "value")]
        values: BTreeMap<String, f64>,
    },
}

/// The shim's end.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    /// Up to the end of the last whole line.
    len: u64,
    dropped: u64,
}

impl Writer {
    pub fn open(log_dir: &Path) -> io::Result<Self> {
        let file = private_file().append(true).open(path_in(log_dir))?;
        let len = file.metadata()?.len();
        Ok(Self { file, len, dropped: 0 })
    }

    /// Adds a point. An error says why it was dropped; the next one may fit again.
    pub fn add(&mut self, reported: Reported) -> io::Result<()> {
        let time = reported.time.unwrap_or_else(unix_now);
        let point = Line::Point { step: reported.step, time, values: reported.values };
        let written = self.note_dropped().and_then(|()| self.write(&point));
        self.dropped += u64::from(written.is_err());
        written
    }

    fn note_dropped(&mut self) -> io::Result<()> {
        if self.dropped > 0 {
            self.write(&Line::Dropped { dropped: self.dropped })?;
            self.dropped = 0;
        }
        Ok(())
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        let len = self.len + bytes.len() as u64;
        if len > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let written = self.file.write_all(&bytes);
        match &written {
            Ok(()) => self.len = len,
            // Readers take whole lines only: half of one can be taken back.
            Err(_) => self.file.set_len(self.len)?,
        }
        written
    }
}

/// A place in the file: between two lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    pub offset: u64,
    /// Number of the line before.
    pub seq: u64,
}

/// Some of the lines of a file, each with the place after it; none for a line that cannot be read.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub lines: VecDeque<(Position, Option<Line>)>,
    /// More were there already.
    pub more: bool,
}

/// Reads the whole lines from a place on, as far as one look goes. A line that cannot be read has a number too.
pub(super) fn read(path: &Path, from: Position) -> io::Result<Look> {
    let mut buffer = vec![0; READ_BYTES_MAX];
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Look::default()),
        file => file?,
    };
    let filled = fill(&file, &mut buffer, from.offset)?;
    let mut at = from;
    let whole = buffer[..filled].split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let lines = whole.map(|bytes| {
        let line = serde_json::from_slice(bytes).ok();
        at.offset += bytes.len() as u64;
        let numbers = if let Some(Line::Dropped { dropped }) = line { dropped } else { 1 };
        at.seq = at.seq.saturating_add(numbers);
        (at, line)
    });
    let lines: VecDeque<_> = lines.collect();
    // Bytes without any line are none of ours, and not looked at again and again.
    Ok(Look { more: filled == READ_BYTES_MAX && !lines.is_empty(), lines })
}

/// Reads from a place on until the buffer is full or the file ends. Gives what it has read.
pub(super) fn fill(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The numbers of the lines of a file with these bytes, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn numbers(dir: &Path, bytes: &[u8]) -> Vec<u64> {
    std::fs::write(path_in(dir), bytes).ok();
    let (mut found, mut at) = (Vec::new(), Position::default());
    while let Ok(look) = read(&path_in(dir), at)
        && let Some((after, _)) = look.lines.back()
    {
        at = *after;
        found.extend(look.lines.iter().map(|(at, _)| at.seq));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64) -> Reported {
        Reported { step, time: Some(Millis(step)), values: [("loss".to_owned(), 0.1 + step as f64)].into() }
    }

    fn all(dir: &Path) -> Vec<(u64, Option<Line>)> {
        let (mut found, mut at) = (Vec::new(), Position::default());
        loop {
            let look = read(&path_in(dir), at).unwrap();
            at = look.lines.back().map_or(at, |(after, _)| *after);
            found.extend(look.lines.into_iter().map(|(at, line)| (at.seq, line)));
            if !look.more {
                return found;
            }
        }
    }

    #[test]
    fn what_is_written_is_read_in_order_over_several_looks() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(all(dir.path()), []);
        let mut writer = Writer::open(dir.path()).unwrap();
        let count = 10_000;
        for step in 1..=count {
            writer.add(point(step)).unwrap();
        }
        let found = all(dir.path());
        assert_eq!(found.len() as u64, count);
        for (number, (seq, line)) in (1..).zip(found) {
            let Reported { step, values, .. } = point(number);
            assert_eq!((seq, line), (number, Some(Line::Point { step, time: Millis(step), values })));
        }
    }

    #[test]
    fn what_does_not_fit_is_counted_and_half_a_line_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path()).unwrap();
        writer.add(point(1)).unwrap();
        let len = std::mem::replace(&mut writer.len, FILE_BYTES_MAX);
        for step in 2..=4 {
            writer.add(point(step)).unwrap_err();
        }
        writer.len = len;
        writer.add(point(5)).unwrap();
        writer.file.write_all(b"not a point\n{\"step\":").unwrap();
        let kinds: Vec<_> = all(dir.path())
            .into_iter()
            .map(|(seq, line)| match line {
                Some(Line::Point { step, .. }) => (seq, step),
                Some(Line::Dropped { .. }) => (seq, 0),
                None => (seq, 99),
            })
            .collect();
        assert_eq!(kinds, [(1, 1), (4, 0), (5, 5), (6, 99)]);
    }
}
