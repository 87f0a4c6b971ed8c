//! Whether the ranks of a gang show progress: each reports points or writes output.

use std::path::PathBuf;

use muster_core::types::{Millis, Rank, RankProgress};
use tokio::task::JoinHandle;

use crate::launch::procfs;
use crate::telemetry::Changes;

/// Files that grow with a rank's progress.
const FILES: [&str; 3] = ["stdout.log", "stderr.log", "points.jsonl"];
/// Shortest and longest time between looks; a tenth of the job's timeout if that is between them.
const INTERVAL: (u64, u64) = (100, 1000);

/// Looks at the files now and then.
#[derive(Debug)]
pub(super) struct Progress {
    timeout: Millis,
    interval: Millis,
    ranks: Vec<Sign>,
    looked: Millis,
    /// The look that goes on. One that a file server holds up shows no progress.
    looking: Option<JoinHandle<Vec<u64>>>,
}

/// The last sign of one rank.
#[derive(Debug)]
struct Sign {
    rank: Rank,
    log_dir: PathBuf,
    bytes: u64,
    silent: Millis,
}

impl Progress {
    /// From a gang's launch on. None if nobody wants to know.
    pub fn new(timeout: Millis, now: Millis, ranks: impl Iterator<Item = (Rank, PathBuf)>) -> Option<Self> {
        let interval = Millis((timeout.0 / 10).clamp(INTERVAL.0, INTERVAL.1));
        let sign = |(rank, log_dir)| Sign { rank, log_dir, bytes: 0, silent: Millis(0) };
        let ranks = ranks.map(sign).collect();
        (timeout > Millis(0)).then_some(Self { timeout, interval, ranks, looked: now, looking: None })
    }

    /// When the next look is due.
    pub fn deadline(&self) -> Millis {
        self.looked.plus(self.interval)
    }

    /// Begins a look if one is due.
    pub fn look(&mut self, now: Millis) {
        if now < self.deadline() {
            return;
        }
        // Time in which this process did not run, because it or the machine was suspended, is nobody's silence.
        let passed = now.since(self.looked).min(Millis(2 * self.interval.0));
        self.looked = now;
        for sign in &mut self.ranks {
            sign.silent = sign.silent.plus(passed);
        }
        if self.looking.is_none() {
            let dirs: Vec<PathBuf> = self.ranks.iter().map(|sign| sign.log_dir.clone()).collect();
            let size = |path: PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
            let bytes = move |dir: &PathBuf| FILES.iter().map(|file| size(dir.join(file))).sum();
            self.looking = Some(tokio::task::spawn_blocking(move || dirs.iter().map(bytes).collect()));
        }
    }

    /// Waits for the end of a look.
    pub async fn looked(&mut self) {
        let Some(looking) = &mut self.looking else { return std::future::pending().await };
        let found = looking.await.unwrap_or_default();
        self.looking = None;
        for (sign, bytes) in self.ranks.iter_mut().zip(found) {
            if sign.bytes != bytes {
                (sign.bytes, sign.silent) = (bytes, Millis(0));
            }
        }
    }

    /// How far each running rank is, if none of them has shown progress for too long. `pid_of` knows those that run.
    pub fn quiet(&self, changes: &Changes, pid_of: impl Fn(Rank) -> Option<i32>) -> Vec<RankProgress> {
        let running = self.ranks.iter().filter_map(|sign| Some((sign, pid_of(sign.rank)?)));
        if running.clone().any(|(sign, _)| sign.silent < self.timeout) {
            return Vec::new();
        }
        let progress = |(sign, pid): (&Sign, i32)| RankProgress {
            rank: sign.rank,
            step: changes.step(sign.rank),
            silent: sign.silent,
            state: procfs::state(pid).unwrap_or('Z'),
        };
        running.map(progress).collect()
    }
}
