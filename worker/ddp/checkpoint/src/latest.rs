//! Reading: the newest checkpoint that is whole. Changes nothing, and needs no claim.

use std::path::{Path, PathBuf};

use crate::error::During as _;
use crate::manifest::{DATA, Manifest, step_of};
use crate::{Error, Part};

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where it lies.
    pub path: PathBuf,
    /// Steps that were done.
    pub step: u64,
    /// Ranks that did them.
    pub world_size: u32,
    /// The job's generation that wrote it; 0 without one.
    pub generation: u64,
    /// What it holds, in the order in which it was given.
    pub parts: Vec<Part>,
}

impl Checkpoint {
    /// The part of this name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }
}

/// What there is to go on from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The newest whole one.
    pub checkpoint: Option<Checkpoint>,
    /// Those that were passed over: worth a warning.
    pub skipped: Vec<Skipped>,
}

/// A checkpoint that is not whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Where it lies.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the checkpoint {} is not whole and was passed over: {}", self.path.display(), self.why)
    }
}

/// Finds the newest whole checkpoint, every byte of it checked, and those that are not whole.
///
/// Of two writers' checkpoints those of the later are newer, whatever their steps. An error means that the directory
/// cannot be read; one that is not there holds nothing.
pub fn latest(dir: &Path) -> Result<Found, Error> {
    let Listed { mut whole, mut skipped } = list(dir)?;
    while let Some((path, manifest)) = whole.pop() {
        let parts =
            std::fs::read(path.join(DATA)).map_err(|error| format!("its data cannot be read: {error}"));
        match parts.and_then(|data| manifest.parts(&data)) {
            Ok(parts) => {
                let Manifest { step, world_size, generation, .. } = manifest;
                let checkpoint = Some(Checkpoint { path, step, world_size, generation, parts });
                return Ok(Found { checkpoint, skipped });
            }
            Err(why) => skipped.push(Skipped { path, why }),
        }
    }
    Ok(Found { checkpoint: None, skipped })
}

/// What lies in a directory, by what the manifests say.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    /// Oldest first.
    pub whole: Vec<(PathBuf, Manifest)>,
    pub skipped: Vec<Skipped>,
}

pub(crate) fn list(dir: &Path) -> Result<Listed, Error> {
    let mut listed = Listed::default();
    for path in entries(dir)? {
        let Some(step) = step_of(&path) else { continue };
        match Manifest::read(&path) {
            Ok(manifest) if manifest.step == step => listed.whole.push((path, manifest)),
            Ok(manifest) => {
                let why = format!("its manifest is that of step {}", manifest.step);
                listed.skipped.push(Skipped { path, why });
            }
            Err(why) => listed.skipped.push(Skipped { path, why }),
        }
    }
    listed.whole.sort_by_key(|(_, manifest)| (manifest.claim, manifest.step));
    Ok(listed)
}

/// What is in a directory, if it is there, in order.
pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.during("list", dir)?,
    };
    let mut paths = Vec::new();
    for entry in read {
        paths.push(entry.during("list", dir)?.path());
    }
    paths.sort();
    Ok(paths)
}
