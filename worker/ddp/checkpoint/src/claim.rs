//! Who may write: numbered claims, the newest of which counts.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::error::During as _;
use crate::latest::{entries, list};
use crate::{Error, manifest};

/// Begins the names of claims.
const CLAIM: &str = ".claim-";

/// Who writes: one start of one job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The job's id; empty without one.
    pub job: String,
    /// Its generation, which rises with each start; 0 without one.
    pub generation: u64,
}

impl Owner {
    /// As MUSTER_JOB_ID and MUSTER_GENERATION say. Without them it is nobody's, and each later writer replaces it.
    pub fn from_env() -> Self {
        let text = |name| std::env::var(name).unwrap_or_default();
        Self { job: text("MUSTER_JOB_ID"), generation: text("MUSTER_GENERATION").parse().unwrap_or(0) }
    }

    fn words(&self) -> String {
        words(&self.job, self.generation)
    }
}

fn words(job: &str, generation: u64) -> String {
    if job.is_empty() {
        "a process without a job".to_owned()
    } else {
        format!("generation {generation} of job {job}")
    }
}

pub(crate) fn superseded(dir: &Path, ours: &Owner, job: &str, generation: u64) -> Error {
    Error::Superseded { dir: dir.to_owned(), ours: ours.words(), newer: words(job, generation) }
}

/// Takes the next number. Two writers that do so at once get different ones, and the later one counts.
pub(crate) fn take(disk: &dyn Disk, dir: &Path, owner: &Owner) -> Result<u64, Error> {
    loop {
        let newest = newest(dir)?;
        if let Some((_, there)) = &newest
            && there.job == owner.job
            && there.generation > owner.generation
        {
            return Err(superseded(dir, owner, &there.job, there.generation));
        }
        // Beyond the checkpoints, too: somebody may have removed the claims and left those.
        let written =
            list(dir)?.whole.last().map(|(_, manifest): &(PathBuf, manifest::Manifest)| manifest.claim);
        let claim = newest.map(|(claim, _)| claim).max(written).unwrap_or(0) + 1;
        let path = dir.join(format!("{CLAIM}{claim}"));
        #[expect(clippy::expect_used, reason = "a string and a number are always valid JSON")]
        let text = serde_json::to_string(owner).expect("an owner is valid JSON");
        match disk.write(&path, &[text.as_bytes()]) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                // Half a claim would stand in the way of everybody's.
                disk.remove(&path).ok();
                return Err(error).during("claim", dir);
            }
            Ok(()) => return Ok(claim),
        }
    }
}

/// Makes a claim durable.
pub(crate) fn sync(disk: &dyn Disk, dir: &Path, claim: u64) -> Result<(), Error> {
    let path = dir.join(format!("{CLAIM}{claim}"));
    disk.sync(&path).during("synchronise", &path)?;
    disk.sync(dir).during("synchronise", dir)
}

/// An error if there is a newer claim than this.
pub(crate) fn check(dir: &Path, claim: u64, ours: &Owner) -> Result<(), Error> {
    match newest(dir)? {
        Some((newer, owner)) if newer > claim => Err(superseded(dir, ours, &owner.job, owner.generation)),
        Some(_) | None => Ok(()),
    }
}

/// Removes claims that no longer count.
pub(crate) fn forget_older(disk: &dyn Disk, dir: &Path, claim: u64) -> Result<(), Error> {
    for (number, path) in claims(dir)? {
        if number < claim {
            disk.remove(&path).during("remove", &path)?;
        }
    }
    Ok(())
}

/// A claim whose writer was killed while it wrote it is nobody's, and counts all the same.
fn newest(dir: &Path) -> Result<Option<(u64, Owner)>, Error> {
    let Some((claim, path)) = claims(dir)?.into_iter().max() else { return Ok(None) };
    let owner = std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    Ok(Some((claim, owner.unwrap_or_default())))
}

fn claims(dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix(CLAIM)?.parse().ok();
    Ok(entries(dir)?.into_iter().filter_map(|path| Some((number(&path)?, path))).collect())
}
