//! The last commit in etcd that this coordinator has seen, kept beside its metrics: an etcd that is behind it was
//! restored from a backup.

use std::path::PathBuf;

use muster_store::{Fence, Floor, went_back};
use serde::{Deserialize, Serialize};
use tracing::warn;

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Identity of the cluster's place in etcd.
    place: String,
    commits: u64,
    fence: u64,
}

/// The file, and what is newer.
#[derive(Debug)]
pub(crate) struct Seen {
    path: PathBuf,
    now: Kept,
    written: Kept,
    /// A person has said that going back is meant.
    accept: bool,
}

impl Seen {
    /// What an earlier life has seen.
    pub fn load(path: PathBuf, accept: bool) -> Self {
        let kept: Kept = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self { path, now: kept.clone(), written: kept, accept }
    }

    /// The last number of a time of leading there: the next one is higher, whatever etcd has forgotten.
    pub fn floor(&self) -> Option<Floor> {
        let floor = Floor { place: Some(self.now.place.clone()), fence: Fence(self.now.fence) };
        (!self.now.place.is_empty()).then_some(floor)
    }

    /// A time of leading begins.
    pub fn begin(&mut self, place: &str, commits: u64, fence: u64) -> Result<(), String> {
        self.note(Some(place), commits, fence)?;
        self.accept = false;
        self.keep();
        Ok(())
    }

    /// This was seen; in words, if it is less than was there before.
    pub fn note(&mut self, place: Option<&str>, commits: u64, fence: u64) -> Result<(), String> {
        let Some(place) = place else { return Ok(()) };
        if place == self.now.place {
            if commits < self.now.commits && !self.accept {
                return Err(went_back(self.now.commits, commits));
            }
            if (commits, fence) == (self.now.commits, self.now.fence) {
                return Ok(());
            }
        }
        let fence = if place == self.now.place { fence.max(self.now.fence) } else { fence };
        self.now = Kept { place: place.to_owned(), commits, fence };
        // Followers see each change; that much need not be written.
        if place != self.written.place
            || commits.abs_diff(self.written.commits) > 100
            || fence != self.written.fence
        {
            self.keep();
        }
        Ok(())
    }

    /// Writes it, whole or not at all.
    pub fn keep(&mut self) {
        if self.now == self.written {
            return;
        }
        let partial = self.path.with_extension("new");
        let written = serde_json::to_vec(&self.now)
            .map_err(std::io::Error::from)
            .and_then(|bytes| std::fs::write(&partial, bytes))
            .and_then(|()| std::fs::rename(&partial, &self.path));
        match written {
            Ok(()) => self.written = self.now.clone(),
            Err(error) => warn!(%error, path = %self.path.display(), "the last commit could not be noted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etcd_that_is_behind_is_noticed_over_restarts_unless_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let load = |accept| Seen::load(dir.path().join("seen.json"), accept);
        let mut seen = load(false);
        assert_eq!(seen.floor(), None);
        seen.begin("p", 10, 3).unwrap();
        seen.note(Some("p"), 12, 3).unwrap();
        seen.keep();
        let mut seen = load(false);
        assert_eq!(seen.floor(), Some(Floor { place: Some("p".to_owned()), fence: Fence(3) }));
        assert!(seen.begin("p", 11, 4).unwrap_err().contains("restored from a backup"));
        assert!(seen.note(None, 0, 0).is_ok(), "nothing was seen");
        let mut seen = load(true);
        seen.begin("p", 11, 4).unwrap();
        assert!(seen.note(Some("p"), 10, 4).is_err(), "once");
        assert!(load(false).begin("other", 1, 1).is_ok(), "another place is another history");
    }
}
