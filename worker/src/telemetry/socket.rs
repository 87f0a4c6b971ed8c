//! The socket of one rank.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use muster_core::types::{GangId, Rank};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
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
/// Longest path of a socket: an address holds 108 bytes, the last of them NUL.
const PATH_BYTES_MAX: usize = 107;
/// Bytes that "/muster-" with six random characters, and "/", a number and ".sock", add to a directory.
const NAME_BYTES_MAX: usize = 14 + 26;

/// Makes sockets in one private directory.
#[derive(Clone, Debug)]
pub(crate) struct Sockets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: tempfile::TempDir,
    next: AtomicU64,
    /// Where sockets are read: never on the launcher's thread, which a flood of points must not hold up.
    runtime: Handle,
}

impl Sockets {
    /// The directory is `data_dir`'s if the path of a socket in it fits into a socket address (108 bytes),
    /// else a temporary one. It goes with the daemon. Must be called within the runtime that is to read them.
    pub fn new(data_dir: &Path) -> io::Result<Self> {
        let parent = std::path::absolute(data_dir)?.join("run");
        // What an earlier daemon left when it was killed; the data directory is ours alone.
        match std::fs::remove_dir_all(&parent) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let fits = parent.as_os_str().len() + NAME_BYTES_MAX <= PATH_BYTES_MAX;
        let parent = if fits { parent } else { std::env::temp_dir() };
        std::fs::create_dir_all(&parent)?;
        // Created with mode 0700: only this user's programs may report.
        let dir = tempfile::Builder::new().prefix("muster-").tempdir_in(parent)?;
        Ok(Self(Arc::new(Inner { dir, next: AtomicU64::new(0), runtime: Handle::current() })))
    }

    /// A socket for one rank, read until it is dropped or drained.
    pub fn open(&self, gang: &GangId, rank: Rank, outbox: Outbox) -> io::Result<RankSocket> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let path = self.0.dir.path().join(format!("{number}.sock"));
        let _guard = self.0.runtime.enter();
        let listener = UnixListener::bind(&path)?;
        let drain = CancellationToken::new();
        let refused = Arc::default();
        let source = Source { gang: gang.clone(), rank, outbox, refused };
        let task = self.0.runtime.spawn(listen(listener, source, drain.clone()));
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
    /// Lines and connections that were refused, over all connections of the rank.
    refused: Arc<AtomicU64>,
}

impl Source {
    /// Counts, and complains the first time and then ever more rarely: what a rank sends must not fill the log.
    fn refuse(&self, why: &str) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if refused.is_power_of_two() {
            warn!(gang = %self.gang, rank = %self.rank, refused, %why, "telemetry of a rank is refused");
        }
    }
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
                source.refuse("it has too many connections open");
            }
            (Err(error), _) => {
                source.refuse(&error.to_string());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    readers.join_all().await;
}

/// Reads lines until the connection ends. A line that is no point is passed over.
async fn read(stream: impl AsyncRead + Unpin, source: &Source) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    // Within a line that was found to be too long: what follows is no line of its own.
    let mut too_long = false;
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let ends = line.ends_with(b"\n");
        let rest = std::mem::replace(&mut too_long, !ends && line.len() as u64 >= LINE_BYTES_MAX);
        if rest {
            too_long = !ends;
        } else if too_long {
            source.refuse("a line is longer than 64 KiB");
        } else {
            match parse(&line) {
                Ok(point) => source.outbox.add(&source.gang, source.rank, point),
                Err(why) => source.refuse(&format!("a line {why}")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{Generation, JobId};

    async fn steps(bytes: &[u8]) -> (Vec<u64>, u64) {
        let gang = GangId { job: JobId::new("j").unwrap(), generation: Generation(1) };
        let source = Source { gang, rank: Rank(0), outbox: Outbox::default(), refused: Arc::default() };
        read(bytes, &source).await;
        let batch = source.outbox.next_batch().unwrap_or_default();
        (batch.points.iter().filter_map(|point| point.step).collect(), source.refused.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_long_line_is_one_bad_line_whatever_its_rest_looks_like() {
        let point = |step: u64| format!("{{\"step\":{step},\"values\":{{}}}}\n");
        let table = [
            (vec![point(1), point(2)], vec![1, 2], 0),
            (vec!["x".repeat(LINE_BYTES_MAX as usize), point(1), point(2)], vec![2], 1),
            (vec!["x".repeat(3 * LINE_BYTES_MAX as usize + 7), point(1), point(2)], vec![2], 1),
            (vec!["x".repeat(LINE_BYTES_MAX as usize - 1), "\n".into(), point(2)], vec![2], 1),
            (vec!["\n\n".into(), point(1).trim_end().into()], vec![1], 2),
        ];
        for (pieces, expected, refused) in table {
            let text = pieces.concat();
            assert_eq!(steps(text.as_bytes()).await, (expected, refused), "{} bytes", text.len());
        }
    }

    #[test]
    fn a_socket_has_a_path_that_fits_its_address() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let root = tempfile::tempdir().unwrap();
        for depth in 0..12 {
            let dir = root.path().join("directory/".repeat(depth));
            std::fs::create_dir_all(&dir).unwrap();
            let sockets = Sockets::new(&dir).unwrap();
            let gang = GangId { job: JobId::new("j").unwrap(), generation: Generation(1) };
            let socket = sockets.open(&gang, Rank(0), Outbox::default()).unwrap();
            assert!(socket.path().as_os_str().len() <= PATH_BYTES_MAX);
        }
    }
}
