//! The socket of one rank.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use muster_core::types::{GangId, Rank};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::outbox::Outbox;
use super::parse::parse;

/// Connections of one rank at once: a program and what it starts.
const CONNECTIONS_MAX: usize = 16;
/// Longest line; 64 values with the longest names fit several times.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Time to read what an ended rank has left in its socket. Everything that could write is dead by then, unless
/// it left its session; that must not hold up the exit.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// Makes sockets in one private directory.
#[derive(Clone, Debug)]
pub(crate) struct Sockets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: tempfile::TempDir,
    next: AtomicU64,
}

impl Sockets {
    /// The directory is `data_dir`'s if the path of a socket in it fits into a socket address (108 bytes),
    /// else a temporary one. It goes with the daemon.
    pub fn new(data_dir: &Path) -> io::Result<Self> {
        let parent = std::path::absolute(data_dir)?.join("run");
        // What an earlier daemon left when it was killed; the data directory is ours alone.
        match std::fs::remove_dir_all(&parent) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let parent = if parent.as_os_str().len() <= 70 { parent } else { std::env::temp_dir() };
        std::fs::create_dir_all(&parent)?;
        // Created with mode 0700: only this user's programs may report.
        let dir = tempfile::Builder::new().prefix("muster-").tempdir_in(parent)?;
        Ok(Self(Arc::new(Inner { dir, next: AtomicU64::new(0) })))
    }

    /// A socket for one rank, read until it is dropped or drained. Must be called within a runtime.
    pub fn open(&self, gang: &GangId, rank: Rank, outbox: Outbox) -> io::Result<RankSocket> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let path = self.0.dir.path().join(format!("{number}.sock"));
        let listener = UnixListener::bind(&path)?;
        let drain = CancellationToken::new();
        let source = Source { gang: gang.clone(), rank, outbox };
        let task = tokio::spawn(listen(listener, source, drain.clone()));
        Ok(RankSocket { path, drain, task })
    }
}

/// One rank's socket.
#[derive(Debug)]
pub(crate) struct RankSocket {
    path: PathBuf,
    drain: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl RankSocket {
    /// Where the rank connects.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what the rank has written before it ended.
    pub async fn drain(mut self) {
        self.drain.cancel();
        if tokio::time::timeout(DRAIN_MAX, &mut self.task).await.is_err() {
            warn!(path = %self.path.display(), "something still holds the telemetry of an ended rank");
        }
    }
}

impl Drop for RankSocket {
    fn drop(&mut self) {
        self.task.abort();
        std::fs::remove_file(&self.path).ok();
    }
}

#[derive(Clone)]
struct Source {
    gang: GangId,
    rank: Rank,
    outbox: Outbox,
}

async fn listen(listener: UnixListener, source: Source, drain: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut readers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            // Connections that wait come before the news that no more will.
            biased;
            accepted = listener.accept() => accepted,
            () = drain.cancelled() => break,
            Some(_) = readers.join_next() => continue,
        };
        match (accepted, places.clone().try_acquire_owned()) {
            (Ok((stream, _)), Ok(place)) => {
                let source = source.clone();
                readers.spawn(async move {
                    read(stream, &source).await;
                    drop(place);
                });
            }
            (Ok(_), Err(_)) => {
                warn!(gang = %source.gang, rank = %source.rank, "too many telemetry connections");
            }
            (Err(error), _) => {
                warn!(gang = %source.gang, rank = %source.rank, %error, "failed to accept telemetry");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    readers.join_all().await;
}

/// Reads lines until the connection ends. A line that is no point is passed over, and complained of once.
async fn read(stream: UnixStream, source: &Source) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    let mut bad = 0_u64;
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let parsed = if line.ends_with(b"\n") || (line.len() as u64) < LINE_BYTES_MAX {
            parse(&line)
        } else {
            Err(format!("is longer than {LINE_BYTES_MAX} bytes"))
        };
        match parsed {
            Ok(point) => source.outbox.add(&source.gang, source.rank, point),
            Err(why) => {
                bad += 1;
                if bad.is_power_of_two() {
                    warn!(gang = %source.gang, rank = %source.rank, bad, %why, "a telemetry line is not a point");
                }
            }
        }
    }
}
