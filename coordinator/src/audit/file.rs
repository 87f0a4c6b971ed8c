//! The file of the audit: only its owner reads it, and it does not grow without bound.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use muster_core::types::text::escape_json;
use serde::Serialize;

/// Largest file: some hundred thousand lines.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Files of earlier lines that are kept, the newest as `.1`.
const OLD_FILES: u32 = 3;

/// The file, opened when there is something to write.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    bytes_max: u64,
    open: Option<(fs::File, u64)>,
}

impl File {
    pub fn new(path: PathBuf) -> Self {
        Self { path, bytes_max: FILE_BYTES_MAX, open: None }
    }

    #[cfg(test)]
    pub fn with_bytes_max(self, bytes_max: u64) -> Self {
        Self { bytes_max, ..self }
    }

    /// Writes one line. After a failure the next line opens the file again.
    pub fn write(&mut self, record: &impl Serialize) -> io::Result<()> {
        let json = serde_json::to_string(record)?;
        let line = format!("{}\n", escape_json(&json));
        let written = self.append(line.as_bytes());
        if written.is_err() {
            self.open = None;
        }
        written
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.open.as_ref().is_some_and(|(_, bytes)| *bytes >= self.bytes_max) {
            self.open = None;
            self.rotate()?;
        }
        let (file, bytes) = match &mut self.open {
            Some(open) => open,
            closed => closed.insert(open(&self.path)?),
        };
        file.write_all(line)?;
        *bytes += line.len() as u64;
        Ok(())
    }

    fn rotate(&self) -> io::Result<()> {
        let old = |number: u32| self.path.with_extension(format!("jsonl.{number}"));
        for number in (1..OLD_FILES).rev() {
            match fs::rename(old(number), old(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        fs::rename(&self.path, old(1))
    }
}

fn open(path: &Path) -> io::Result<(fs::File, u64)> {
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let bytes = file.metadata()?.len();
    // A line that was cut off by a full disk must not take the next one with it.
    if bytes > 0 && !ends_with_line(path, bytes)? {
        file.write_all(b"\n")?;
    }
    Ok((file, bytes))
}

fn ends_with_line(path: &Path, bytes: u64) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut last = [0];
    fs::File::open(path)?.read_exact_at(&mut last, bytes - 1)?;
    Ok(last == *b"\n")
}
