//! Where the points of one rank go, whichever way they came: numbered into its file, and announced.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_core::types::Rank;
use tokio::sync::Notify;
use tracing::warn;

use super::file::Writer;
use super::parse::{Reported, parse};

/// Ranks of which points were written since the last look, and how far each rank is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes(Arc<Written>);

#[derive(Debug, Default)]
struct Written {
    ranks: Mutex<BTreeSet<Rank>>,
    steps: Mutex<BTreeMap<Rank, u64>>,
    added: Notify,
}

impl Changes {
    fn add(&self, rank: Rank, step: u64) {
        lock(&self.0.ranks).insert(rank);
        lock(&self.0.steps).insert(rank, step);
        self.0.added.notify_one();
    }

    /// Returns once there are some.
    pub async fn added(&self) {
        self.0.added.notified().await;
    }

    pub fn take(&self) -> Vec<Rank> {
        std::mem::take(&mut *lock(&self.0.ranks)).into_iter().collect()
    }

    /// The last step that a rank reported.
    pub fn step(&self, rank: Rank) -> Option<u64> {
        lock(&self.0.steps).get(&rank).copied()
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one call.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One rank's points.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    rank: Rank,
    writer: Arc<Mutex<Writer>>,
    changes: Changes,
    /// What was refused, over all ways by which the rank reports.
    refused: Arc<AtomicU64>,
}

impl Source {
    /// They go into a file in `log_dir`.
    pub fn open(rank: Rank, log_dir: &Path, changes: Changes) -> io::Result<Self> {
        let writer = Arc::new(Mutex::new(Writer::open(log_dir)?));
        Ok(Self { rank, writer, changes, refused: Arc::default() })
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Writes the point that a line is.
    pub fn add_line(&self, line: &[u8]) {
        match parse(line) {
            Ok(point) => self.add(point),
            Err(why) => self.refuse(&format!("a line {why}")),
        }
    }

    /// Writes a point.
    pub fn add(&self, point: Reported) {
        let step = point.step;
        let written = lock(&self.writer).add(point);
        match written {
            Ok(()) => self.changes.add(self.rank, step),
            Err(error) => self.refuse(&format!("a point could not be kept: {error}")),
        }
    }

    /// Counts, and complains the first time and then ever more rarely: what a rank sends must not fill the log.
    pub fn refuse(&self, why: &str) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if refused.is_power_of_two() {
            warn!(rank = %self.rank, refused, %why, "telemetry of a rank is refused");
        }
    }

    #[cfg(test)]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}
