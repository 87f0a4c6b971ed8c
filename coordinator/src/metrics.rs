//! The points that ranks report: kept in memory for reading, thinned beyond a bound, and in one file of JSON
//! lines per job, so that a restarted coordinator still has the loss curve.
//!
//! Points are no control state: they never go to the store, and writing them is not fsynced. They survive a
//! crash of the process, not of the machine.

pub(crate) mod file;
mod series;
mod thin;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use muster_core::types::{Generation, JobId};
use tracing::warn;

use crate::driver::{Handle, RequestError};

pub(crate) use series::{Latest, Point, Series};

/// Series held in memory, and the bytes of them all. Beyond it those that nobody uses go, the longest unused first, and
/// are read again from their file when needed.
const SERIES_MAX: usize = 1024;
const SERIES_BYTES_MAX: usize = 1 << 30;

/// Every job's series.
#[derive(Clone, Debug)]
pub(crate) struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    series: Mutex<HashMap<JobId, Entry>>,
    uses: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    series: Arc<Series>,
    used: u64,
}

impl Metrics {
    /// Keeps files in `dir`, which is made with the first point.
    pub fn new(dir: PathBuf) -> Self {
        Self(Arc::new(Inner { dir, series: Mutex::default(), uses: AtomicU64::new(0) }))
    }

    /// The series of a job; empty if nothing was ever reported. Reads its file, off this thread, if need be.
    pub async fn series(&self, job: &JobId) -> Arc<Series> {
        if let Some(series) = self.loaded(job) {
            return series;
        }
        let (inner, job) = (self.0.clone(), job.clone());
        let path = inner.dir.join(format!("{job}.jsonl"));
        let read = tokio::task::spawn_blocking(move || Series::read(path)).await;
        let fresh = read.unwrap_or_else(|error| {
            warn!(%job, %error, "failed to read the job's metrics");
            Series::read(PathBuf::new())
        });
        let mut all = self.0.series.lock().unwrap_or_else(PoisonError::into_inner);
        evict(&mut all);
        let used = self.0.uses.fetch_add(1, Ordering::Relaxed);
        // Somebody else may have read it meanwhile: the first one counts.
        all.entry(job).or_insert_with(|| Entry { series: Arc::new(fresh), used }).series.clone()
    }

    /// The series of a job that exists; none if it does not, so that no file is made for it.
    pub async fn series_of_known(
        &self,
        driver: &Handle,
        job: &JobId,
    ) -> Result<Option<Arc<Series>>, RequestError> {
        if let Some(series) = self.loaded(job) {
            return Ok(Some(series));
        }
        let known = driver.read(|state| state.has_job(job))?;
        Ok(if known { Some(self.series(job).await) } else { None })
    }

    fn loaded(&self, job: &JobId) -> Option<Arc<Series>> {
        let mut all = self.0.series.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = all.get_mut(job)?;
        entry.used = self.0.uses.fetch_add(1, Ordering::Relaxed);
        Some(entry.series.clone())
    }

    /// The newest values of some jobs, for a listing: from memory, or from the ends of their files.
    pub async fn latest(&self, jobs: Vec<(JobId, Generation)>) -> Vec<Latest> {
        let metrics = self.clone();
        let look = move || {
            let one = |(job, generation): &(JobId, Generation)| match metrics.loaded(job) {
                Some(series) => series.latest(*generation),
                None => Series::read_end(&metrics.0.dir.join(format!("{job}.jsonl"))).latest(*generation),
            };
            jobs.iter().map(one).collect()
        };
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// Forgets a job, with its file.
    pub fn delete(&self, job: &JobId) {
        self.0.series.lock().unwrap_or_else(PoisonError::into_inner).remove(job);
        let path = self.0.dir.join(format!("{job}.jsonl"));
        tokio::task::spawn_blocking(move || file::remove(&path));
    }
}

fn evict(all: &mut HashMap<JobId, Entry>) {
    let mut bytes: usize = all.values().map(|entry| entry.series.bytes()).sum();
    while all.len() >= SERIES_MAX || bytes >= SERIES_BYTES_MAX {
        // Everything in a series is in its file too, so one that nobody holds can go.
        let idle = all.iter().filter(|(_, entry)| Arc::strong_count(&entry.series) == 1);
        let oldest = idle.min_by_key(|(_, entry)| entry.used).map(|(job, _)| job.clone());
        let Some(gone) = oldest.and_then(|job| all.remove(&job)) else { return };
        bytes = bytes.saturating_sub(gone.series.bytes());
    }
}
