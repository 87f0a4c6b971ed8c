//! Open files: connections take no more of them than leaves enough for the store, for logs, for the Unix socket and for
//! the ports of probes. What happens when they run out all the same is counted, said, and survived.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::time::Instant;
use tracing::warn;

use super::CONNECTIONS_MAX;

/// Open files that connections of the API's port never take, where there are so many.
const RESERVE_MAX: u64 = 2048;
/// Wait before the next attempt after one that failed for want of files or memory. Without it the loop would be busy.
const RETRY: Duration = Duration::from_millis(100);
/// Time between two lines about the same trouble.
const QUIET: Duration = Duration::from_mins(1);

/// Attempts to take a connection that have failed, in this process.
pub(crate) static ACCEPTS_FAILED: Trouble = Trouble::new();
/// Connections that were ended at once, because their address or those of strangers had all that they may have.
pub(crate) static CONNECTIONS_REFUSED: Trouble = Trouble::new();

/// Something that can happen often: each time is counted, and now and then it is said.
#[derive(Debug)]
pub(crate) struct Trouble {
    count: AtomicU64,
    said: Mutex<Option<Said>>,
}

#[derive(Clone, Copy, Debug)]
struct Said {
    at: Instant,
    count: u64,
}

impl Trouble {
    const fn new() -> Self {
        Self { count: AtomicU64::new(0), said: Mutex::new(None) }
    }

    /// Returns how often it has happened.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts one more. Returns how many have not been said, if it is time to say so.
    fn note(&self, now: Instant) -> Option<u64> {
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let mut said = self.said.lock().ok()?;
        let before = said.map_or(0, |said| said.count);
        if said.is_some_and(|said| now < said.at + QUIET) {
            return None;
        }
        *said = Some(Said { at: now, count });
        Some(count.saturating_sub(before))
    }
}

/// Returns how many connections the API's port may have in this process.
pub(super) fn connections_max() -> usize {
    match getrlimit(Resource::Nofile).current {
        Some(files) => connections_for(files),
        None => CONNECTIONS_MAX,
    }
}

/// Returns how many connections leave the reserve, of so many open files.
fn connections_for(files: u64) -> usize {
    let reserve = RESERVE_MAX.min(files / 4);
    usize::try_from(files - reserve).map_or(CONNECTIONS_MAX, |rest| rest.min(CONNECTIONS_MAX))
}

/// Says why a connection could not be taken, and waits if the next attempt would fail as well.
pub(super) async fn accept_failed(error: &io::Error) {
    // The client has gone away meanwhile.
    if error.kind() == io::ErrorKind::ConnectionAborted {
        return;
    }
    if let Some(times) = ACCEPTS_FAILED.note(Instant::now()) {
        warn!(
            %error,
            times,
            "failed to take connections; if open files ran out, raise LimitNOFILE or `ulimit -n`"
        );
    }
    tokio::time::sleep(RETRY).await;
}

/// Says why a connection was ended.
pub(super) fn refused(peer: std::net::IpAddr, why: muster_monitor::NoPlace) {
    if let Some(times) = CONNECTIONS_REFUSED.note(Instant::now()) {
        warn!(%peer, %why, times, "connections were ended at once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_files_for_the_rest() {
        let table = [
            (1_048_576, CONNECTIONS_MAX),
            (65_536, CONNECTIONS_MAX),
            (32_768, 30_720),
            (4096, 3072),
            (1024, 768),
            (4, 3),
            (u64::MAX, CONNECTIONS_MAX),
        ];
        for (files, expected) in table {
            assert_eq!(connections_for(files), expected, "{files}");
        }
    }

    #[test]
    fn trouble_is_counted_each_time_and_said_now_and_then() {
        let (trouble, now) = (Trouble::new(), Instant::now());
        let said = [0, 1, 59].map(|second| trouble.note(now + Duration::from_secs(second)));
        assert_eq!(said, [Some(1), None, None]);
        assert_eq!(trouble.note(now + QUIET), Some(3));
        assert_eq!(trouble.count(), 4);
    }
}
