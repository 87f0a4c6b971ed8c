//! One event file that is followed: from its records to points, as far as it goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use nix::fcntl::OFlag;
use tracing::warn;

use super::message::{Scalars, scalars};
use super::record::{Found, first};
use crate::telemetry::file::fill;
use crate::telemetry::parse::{NAME_BYTES_MAX, Reported, VALUES_MAX, time};
use crate::telemetry::source::Source;

/// Names of values of one rank; the coordinator keeps no more of a job.
const NAMES_MAX: usize = 1000;
/// Looks that find the same damage. On a disk that nodes share, a reader may see that a file has grown before it sees the
/// bytes.
const DAMAGED_LOOKS_MAX: u32 = 5;

/// The points of one rank, from whatever files.
#[derive(Debug)]
pub(super) struct Sink {
    pub source: Source,
    names: BTreeSet<String>,
}

impl Sink {
    pub fn new(source: Source) -> Self {
        Self { source, names: BTreeSet::new() }
    }

    /// Whether a value of this name is kept.
    fn knows(&mut self, name: &str) -> bool {
        if self.names.contains(name) {
            return true;
        }
        if self.names.len() >= NAMES_MAX {
            self.source.refuse("its event files have more than 1000 different tags");
            return false;
        }
        self.names.insert(name.to_owned())
    }
}

/// A file.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    /// Whose it must be.
    uid: Option<u32>,
    /// Goes before its tags, if another file of the rank may have the same.
    prefix: String,
    /// What is before it was read. Always between two records.
    offset: u64,
    /// Up to here everything was seen.
    seen: u64,
    /// The scalars of one step, which may go on.
    pending: Option<Reported>,
    /// Looks that found the record at `offset` damaged.
    damaged: u32,
    given_up: bool,
    /// It was said that it holds what is no event.
    complained: bool,
}

impl EventFile {
    pub fn new(path: PathBuf, prefix: String, uid: Option<u32>) -> Self {
        Self {
            path,
            uid,
            prefix,
            offset: 0,
            seen: 0,
            pending: None,
            damaged: 0,
            given_up: false,
            complained: false,
        }
    }

    /// Reads on, a buffer's length at most. Says whether there is more. What a step has so far is a point once the file
    /// has not grown since the last look.
    pub fn look(&mut self, sink: &mut Sink, buffer: &mut [u8]) -> bool {
        if self.given_up {
            return false;
        }
        let read = self.read(buffer).unwrap_or_else(|error| {
            self.give_up(&error.to_string(), sink);
            0
        });
        if read == 0 {
            self.finish(sink);
            return false;
        }
        let start = self.offset;
        let mut rest = &buffer[..read];
        loop {
            match first(rest) {
                Found::Part => break,
                Found::Record(record, bytes) => {
                    self.take(record, sink);
                    rest = &rest[bytes..];
                    self.offset += bytes as u64;
                    self.damaged = 0;
                }
                Found::Large(bytes) => {
                    self.offset = self.offset.saturating_add(bytes);
                    rest = rest.get(bytes as usize..).unwrap_or_default();
                }
                Found::Damage(what) => {
                    self.damaged += 1;
                    // It is looked at again although it does not grow.
                    self.seen = 0;
                    if self.damaged >= DAMAGED_LOOKS_MAX {
                        self.give_up(what, sink);
                    }
                    return false;
                }
            }
        }
        self.offset > start && read == buffer.len()
    }

    /// What its last step has is all there is.
    pub fn finish(&mut self, sink: &Sink) {
        if let Some(point) = self.pending.take() {
            sink.source.add(point);
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if std::fs::metadata(&self.path)?.len() <= self.seen.max(self.offset) {
            return Ok(0);
        }
        // Were it a pipe by now, nobody would wait for it; nor is a link followed out of the directory.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file: File = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&self.path)?;
        let meta = file.metadata()?;
        if !meta.is_file() || self.uid.is_some_and(|uid| meta.uid() != uid) {
            return Err(io::Error::other("it is no file any more, or not one of the ranks' user"));
        }
        let read = fill(&file, buffer, self.offset)?;
        self.seen = self.offset + read as u64;
        Ok(read)
    }

    fn give_up(&mut self, why: &str, sink: &Sink) {
        self.given_up = true;
        self.finish(sink);
        warn!(path = %self.path.display(), offset = self.offset, %why, "an event file is not followed any more");
    }

    fn take(&mut self, record: &[u8], sink: &mut Sink) {
        match scalars(record) {
            Ok(Some(found)) => self.add(found, sink),
            Ok(None) => {}
            Err(why) => {
                if !std::mem::replace(&mut self.complained, true) {
                    warn!(path = %self.path.display(), offset = self.offset, %why, "it is passed over");
                }
            }
        }
    }

    fn add(&mut self, found: Scalars, sink: &mut Sink) {
        let Scalars { step, time: seconds, values } = found;
        for (tag, value) in values {
            let name = self.name(&tag);
            if !sink.knows(&name) {
                continue;
            }
            let fits = |point: &Reported| {
                point.step == step && point.values.len() < VALUES_MAX && !point.values.contains_key(&name)
            };
            if !self.pending.as_ref().is_some_and(fits) {
                self.finish(sink);
            }
            let fresh = || Reported { step, time: time(seconds), values: BTreeMap::new() };
            let point = self.pending.get_or_insert_with(fresh);
            point.values.insert(name, value);
        }
    }

    /// The end of a name that is too long tells more than its beginning.
    fn name(&self, tag: &str) -> String {
        let name = format!("{}{tag}", self.prefix);
        let cut = name.ceil_char_boundary(name.len().saturating_sub(NAME_BYTES_MAX));
        name[cut..].to_owned()
    }
}
