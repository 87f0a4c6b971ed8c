//! Checkpoints on a shared file system: each is whole or not there, and an earlier start of a job never writes one after a
//! later start has looked.
//!
//! `step-<n>` holds `data`, every part's bytes one after the other, and `manifest`, which says what is in it, with lengths
//! and SHA-256. Both are written and synchronised under another name, the manifest last, and appear by one rename.
//!
//! A writer first claims the directory: claims are numbered, and only the newest one's owner may publish. The claim is
//! made before anything is read, and what earlier writers were about to publish is moved away before, too: so whatever a
//! zombie publishes, it published before the new writer looked, and there is one line of steps.
//!
//! Knows nothing of tensors: a part is a name, a kind, a shape and bytes.

mod claim;
mod disk;
mod error;
mod latest;
mod manifest;
#[cfg(test)]
mod tests;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use claim::Owner;
use disk::{Disk, RealDisk};
use error::During as _;
pub use error::Error;
pub use latest::{Checkpoint, Found, Skipped, latest};
pub use manifest::Part;
use manifest::{DATA, MANIFEST, Manifest};

/// A directory of checkpoints, claimed for writing.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    owner: Owner,
    /// The number of our claim.
    claim: u64,
    /// How many are kept.
    keep: usize,
    disk: Box<dyn Disk>,
}

impl Checkpoints {
    /// Claims a directory, which is made if it is not there, and keeps the last `keep` checkpoints in it (at least one).
    ///
    /// [`Error::Superseded`] if a later generation of the same job has claimed it. Call [`latest`] afterwards, not before:
    /// what it gives is then what this writer goes on from.
    pub fn open(dir: &Path, owner: Owner, keep: usize) -> Result<Self, Error> {
        Self::open_on(Box::new(RealDisk), dir, owner, keep)
    }

    fn open_on(disk: Box<dyn Disk>, dir: &Path, owner: Owner, keep: usize) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).during("make the directory", dir)?;
        let claim = match claim::take(&*disk, dir, &owner) {
            // What a writer that was killed has left may be just what fills the disk.
            Err(error) if error.is_full() => {
                discard_staged(&*disk, dir, u64::MAX)?;
                claim::take(&*disk, dir, &owner)?
            }
            taken => taken?,
        };
        let this = Self { dir: dir.to_owned(), owner, claim, keep: keep.max(1), disk };
        this.settle().or_else(|error| this.unless_superseded(error))?;
        Ok(this)
    }

    /// Makes the claim durable, and puts an end to what earlier writers were about to do.
    fn settle(&self) -> Result<(), Error> {
        claim::sync(&*self.disk, &self.dir, self.claim)?;
        discard_staged(&*self.disk, &self.dir, self.claim)?;
        claim::forget_older(&*self.disk, &self.dir, self.claim)
    }

    /// Whoever has taken over has moved files away under our hands: that is the reason then.
    fn unless_superseded(&self, error: Error) -> Result<(), Error> {
        claim::check(&self.dir, self.claim, &self.owner)?;
        Err(error)
    }

    /// Writes the checkpoint of a step, and removes the oldest beyond those that are kept.
    ///
    /// On any error the checkpoints that were there are still there. [`Error::Superseded`] means that this process has
    /// been replaced and has to end; any other, that training may go on without this checkpoint.
    pub fn save(&self, step: u64, world_size: u32, parts: &[Part]) -> Result<(), Error> {
        claim::check(&self.dir, self.claim, &self.owner)?;
        let staged = self.dir.join(format!("{STAGED}{}-step-{step}", self.claim));
        let saved = self.stage(&staged, step, world_size, parts).and_then(|()| self.publish(&staged, step));
        match saved {
            Ok(()) => self.remove_old(),
            Err(error) => {
                self.disk.remove(&staged).ok();
                self.unless_superseded(error)
            }
        }
    }

    fn stage(&self, staged: &Path, step: u64, world_size: u32, parts: &[Part]) -> Result<(), Error> {
        let (job, generation) = (self.owner.job.clone(), self.owner.generation);
        let manifest = Manifest::of(parts, step, world_size, job, generation, self.claim)?;
        let (disk, data, about) = (&*self.disk, staged.join(DATA), staged.join(MANIFEST));
        disk.remove(staged).during("remove what an earlier attempt left in", staged)?;
        disk.make_dir(staged).during("make", staged)?;
        let bytes: Vec<&[u8]> = parts.iter().map(|part| part.data.as_slice()).collect();
        disk.write(&data, &bytes).during("write", &data)?;
        disk.sync(&data).during("synchronise", &data)?;
        disk.write(&about, &[manifest.encode().as_bytes()]).during("write", &about)?;
        disk.sync(&about).during("synchronise", &about)?;
        disk.sync(staged).during("synchronise", staged)
    }

    fn publish(&self, staged: &Path, step: u64) -> Result<(), Error> {
        let place = self.dir.join(manifest::dir_name(step));
        let replaced = place.with_extension(manifest::REPLACED);
        if place.exists() {
            match Manifest::read(&place) {
                Ok(there) if there.claim > self.claim => {
                    return Err(claim::superseded(&self.dir, &self.owner, &there.job, there.generation));
                }
                // Ours already, and whole: written again, it could only be lost.
                Ok(there) if there.claim == self.claim => return self.discard(staged),
                Err(_half) => self.discard(&place)?,
                // An earlier writer's, which counts until ours is there.
                Ok(_) => {
                    self.discard(&replaced)?;
                    self.disk.rename(&place, &replaced).during("make room for", &place)?;
                }
            }
        }
        claim::check(&self.dir, self.claim, &self.owner)?;
        self.disk.rename(staged, &place).during("publish", &place)?;
        self.disk.sync(&self.dir).during("synchronise", &self.dir)?;
        self.discard(&replaced)
    }

    fn remove_old(&self) -> Result<(), Error> {
        let mut all = latest::list(&self.dir)?.whole;
        all.retain(|(_, manifest)| manifest.claim <= self.claim);
        let spare = all.len().saturating_sub(self.keep);
        all.iter().take(spare).try_for_each(|(path, _)| self.discard(path))
    }

    fn discard(&self, path: &Path) -> Result<(), Error> {
        discard(&*self.disk, path)
    }
}

/// Begins the names of what is being written.
const STAGED: &str = ".new-";
/// Begins the names of what is being removed.
const DISCARDED: &str = ".old-";

/// Moves away first: a directory that is half removed is never taken for one that is whole, and who was about to publish
/// it finds nothing.
fn discard(disk: &dyn Disk, path: &Path) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let moved = path.with_file_name(format!("{DISCARDED}{}", name.trim_start_matches('.')));
    disk.remove(&moved).during("remove", &moved)?;
    match disk.rename(path, &moved) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        renamed => renamed.during("move away", path)?,
    }
    disk.remove(&moved).during("remove", &moved)
}

/// Removes what writers with earlier claims have left, published or not.
fn discard_staged(disk: &dyn Disk, dir: &Path, claim: u64) -> Result<(), Error> {
    for path in latest::entries(dir)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let writer = name.strip_prefix(STAGED).and_then(|rest| rest.split('-').next()?.parse::<u64>().ok());
        if writer.is_some_and(|writer| writer < claim) {
            discard(disk, &path)?;
        } else if name.starts_with(DISCARDED) {
            disk.remove(&path).during("remove", &path)?;
        }
    }
    Ok(())
}
