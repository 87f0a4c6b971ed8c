//! The standard output of one rank, read from its file and matched by the job's pattern. The program writes to the file
//! itself and notices nothing of it.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use muster_core::types::MetricPattern;

use super::file::fill;
use super::parse::Reported;
use super::source::Source;

/// Bytes of a rank's output in one look: at a look each second a rank prints less, and one that prints more is read
/// again at once.
pub(super) const LOOK_BYTES_MAX: usize = 1 << 20;
/// Longest line; one that says a loss is far shorter. A longer one is passed over.
const LINE_BYTES_MAX: usize = 16 << 10;

/// The output of one rank.
#[derive(Debug)]
pub(super) struct OutputFile {
    path: PathBuf,
    pattern: Arc<MetricPattern>,
    pub source: Source,
    /// What is before it was matched.
    offset: u64,
    /// Up to here everything was seen: a half line is not looked at again before it has grown.
    seen: u64,
    in_long_line: bool,
    /// Lines that matched.
    matched: u64,
}

impl OutputFile {
    /// Nothing of the file was read yet; it is of one generation alone.
    pub fn new(path: PathBuf, pattern: Arc<MetricPattern>, source: Source) -> Self {
        Self { path, pattern, source, offset: 0, seen: 0, in_long_line: false, matched: 0 }
    }

    /// Reads on. Says whether there is more.
    pub fn look(&mut self, buffer: &mut [u8]) -> bool {
        let read = self.read(buffer).unwrap_or_else(|error| {
            self.source.refuse(&format!("{} cannot be read: {error}", self.path.display()));
            0
        });
        let mut in_long_line = self.in_long_line;
        let used = each_line(&buffer[..read], &mut in_long_line, |line| self.add(line));
        self.in_long_line = in_long_line;
        self.offset += used as u64;
        read == buffer.len()
    }

    /// The rank has ended: what it left without an end is a line, too.
    pub fn finish(&mut self, buffer: &mut [u8]) {
        self.seen = 0;
        let read = self.read(buffer).unwrap_or_default().min(LINE_BYTES_MAX);
        if !self.in_long_line {
            self.add(&String::from_utf8_lossy(&buffer[..read]));
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if std::fs::metadata(&self.path)?.len() <= self.seen {
            return Ok(0);
        }
        let read = fill(&File::open(&self.path)?, buffer, self.offset)?;
        self.seen = self.offset + read as u64;
        Ok(read)
    }

    fn add(&mut self, line: &str) {
        if let Some(found) = self.pattern.read(line) {
            self.matched += 1;
            let step = found.step.unwrap_or(self.matched);
            self.source.add(Reported { step, time: None, values: found.values });
        }
    }
}

/// Calls for each whole line that is neither empty nor too long. A carriage return ends one, too: that is how progress
/// bars write over themselves. Gives the bytes that need not be read again.
fn each_line(bytes: &[u8], in_long_line: &mut bool, mut call: impl FnMut(&str)) -> usize {
    let mut used = 0;
    for line in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
        let Some((b'\n' | b'\r', text)) = line.split_last() else { break };
        used += line.len();
        let is_rest = std::mem::take(in_long_line);
        if !is_rest && !text.is_empty() && text.len() <= LINE_BYTES_MAX {
            call(&String::from_utf8_lossy(text));
        }
    }
    if bytes.len() - used > LINE_BYTES_MAX {
        *in_long_line = true;
        used = bytes.len();
    }
    used
}

/// The lines in some bytes that come in pieces of this size, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn lines(bytes: &[u8], piece: usize) -> Vec<String> {
    let (mut found, mut from, mut in_long_line) = (Vec::new(), 0, false);
    for to in (0..bytes.len()).step_by(piece.max(1)).skip(1).chain([bytes.len()]) {
        from += each_line(&bytes[from..to], &mut in_long_line, |line| found.push(line.to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::source::Changes;
    use crate::telemetry::tests::points;
    use muster_core::types::Rank;
    use std::io::Write;

    #[test]
    fn lines_are_the_same_in_whatever_pieces_they_come() {
        let long = "x".repeat(LINE_BYTES_MAX + 1);
        let fits = &long[1..];
        let table: [(&str, &[&str]); 6] = [
            ("a\nb\n", &["a", "b"]),
            ("\r 10%\r 20%\r\n\nend", &[" 10%", " 20%"]),
            (&format!("{long}\na\n"), &["a"]),
            (&format!("{fits}\na\n"), &[fits, "a"]),
            (&format!("{long}{long}{long}"), &[]),
            ("", &[]),
        ];
        for (text, expected) in table {
            for piece in [1, 2, 3, 1000, 100_000] {
                // Each byte of a long line alone is a long time.
                if piece > 3 || text.len() < 100 {
                    assert_eq!(lines(text.as_bytes(), piece), expected, "{piece}");
                }
            }
        }
    }

    #[test]
    fn each_line_that_matches_is_one_point() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdout.log");
        let source = Source::open(Rank(0), dir.path(), Changes::default()).unwrap();
        let pattern = Arc::new(MetricPattern::new("loss (?<loss>[0-9.]+)").unwrap());
        let mut output = OutputFile::new(path.clone(), pattern, source);
        let mut buffer = vec![0; LOOK_BYTES_MAX];
        output.look(&mut buffer);
        let mut file = File::create(&path).unwrap();
        for (text, count) in [
            ("starts\nloss 4", 0),
            (".5\rloss 3.5\r\n", 2),
            ("", 2),
            (&format!("{}\nloss 2.5\n", "-".repeat(2 * LOOK_BYTES_MAX)), 3),
            ("loss 1.5", 3),
        ] {
            file.write_all(text.as_bytes()).unwrap();
            while output.look(&mut buffer) {}
            assert_eq!(points(dir.path()).len(), count, "{text}");
        }
        output.finish(&mut buffer);
        let found: Vec<_> =
            points(dir.path()).into_iter().map(|(step, values)| (step, values["loss"])).collect();
        assert_eq!(found, [(1, 4.5), (2, 3.5), (3, 2.5), (4, 1.5)]);
    }
}
