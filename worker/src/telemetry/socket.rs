//! The socket of one rank.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use muster_core::types::Rank;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::follow::{Follower, Looker};
use super::source::{Changes, Source};
use crate::launch::user::User;

/// Connections of one rank at once: a program and what it starts.
const CONNECTIONS_MAX: usize = 16;
/// Longest line; 64 values with the longest names fit several times.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Time to read what an ended rank has left in its socket. Everything that could write is dead by then, unless
/// it left its session.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Longest path of a socket: an address holds 108 bytes, the last of them NUL.
const PATH_BYTES_MAX: usize = 107;
/// Bytes that "/", a local rank and ".sock" add to a directory.
const NAME_BYTES_MAX: usize = 16;

/// Bytes that "/muster-" and its ending add to the place of a temporary directory.
const DIR_BYTES_MAX: usize = 16;
/// Where everybody may make a directory, by short names.
const SHORT_PLACES: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// Makes the sockets of one gang in one private directory, and reads them, and whatever is followed, on a thread of its
/// own: neither a flood of points nor a disk that hangs holds up what starts and stops the ranks.
#[derive(Debug)]
pub(crate) struct Sockets {
    dir: PathBuf,
    changes: Changes,
    runtime: Handle,
    stop: CancellationToken,
}

impl Sockets {
    /// The sockets are in `dir`, which is private, if their paths fit into a socket's address (108 bytes) and they are not
    /// `for_others` than this process's user, else in a temporary one, which whoever takes the gang's state away must remove too.
    pub fn new(dir: &Path, for_others: bool, changes: Changes) -> io::Result<Self> {
        let fits = dir.as_os_str().len() + NAME_BYTES_MAX <= PATH_BYTES_MAX;
        let dir = if fits && !for_others {
            dir.to_owned()
        } else {
            let dir = short_dir(&std::env::temp_dir())?;
            if for_others {
                // Afterwards, for there the umask has no say.
                std::fs::set_permissions(&dir, Permissions::from_mode(0o711))?;
            }
            dir
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (handle, stop) = (runtime.handle().clone(), CancellationToken::new());
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name("telemetry".to_owned())
            .spawn(move || runtime.block_on(stopped.cancelled()))?;
        Ok(Self { dir, changes, runtime: handle, stop })
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A socket for one rank, which may be another user's, read until it is dropped or drained. What is read goes into a file in `log_dir`.
    pub fn open(&self, rank: Rank, log_dir: &Path, user: Option<&User>) -> io::Result<RankSocket> {
        let path = self.dir.join(format!("{rank}.sock"));
        let _guard = self.runtime.enter();
        let listener = UnixListener::bind(&path)?;
        if let Some(user) = user {
            user.own(&path)?;
        }
        let drain = CancellationToken::new();
        let source = Source::open(rank, log_dir, self.changes.clone())?;
        let task = self.runtime.spawn(listen(listener, source.clone(), drain.clone()));
        Ok(RankSocket { path, drain, task, source })
    }

    /// Looks now and then for what the ranks write elsewhere, until the follower is dropped.
    pub fn follow(&self, looker: Looker) -> Follower {
        Follower::start(looker, &self.runtime)
    }
}

/// Makes a private directory whose path leaves room for the name of a socket: where temporary
/// things are, or in one of the usual places if that is too deep.
fn short_dir(temporary: &Path) -> io::Result<PathBuf> {
    let mut last = io::Error::from(io::ErrorKind::InvalidFilename);
    for place in [temporary].into_iter().chain(SHORT_PLACES.map(Path::new)) {
        if place.as_os_str().len() + DIR_BYTES_MAX + NAME_BYTES_MAX > PATH_BYTES_MAX {
            continue;
        }
        // Only this user's programs may report, or those to whom a socket is given; nobody else can
        // create files there.
        let private = Permissions::from_mode(0o700);
        match tempfile::Builder::new().prefix("muster-").permissions(private).tempdir_in(place) {
            Ok(dir) => return Ok(dir.keep()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// One rank's socket.
#[derive(Debug)]
pub(crate) struct RankSocket {
    path: PathBuf,
    drain: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    source: Source,
}

impl RankSocket {
    /// Where else the rank's points go that come by another way.
    pub fn source(&self) -> &Source {
        &self.source
    }

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
            source.add_line(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::file::{Line, Position, path_in, read as read_file};

    async fn steps(bytes: &[u8]) -> (Vec<u64>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::open(Rank(0), dir.path(), Changes::default()).unwrap();
        read(bytes, &source).await;
        let lines = read_file(&path_in(dir.path()), Position::default()).unwrap().lines;
        let step = |(_, line)| if let Some(Line::Point { step, .. }) = line { Some(step) } else { None };
        (lines.into_iter().filter_map(step).collect(), source.refused())
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
    fn a_socket_finds_a_short_place_though_the_temporary_one_is_deep() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("x".repeat(90));
        std::fs::create_dir(&deep).unwrap();
        for temporary in [deep, root.path().join("not there")] {
            let dir = short_dir(&temporary).unwrap();
            assert!(SHORT_PLACES.iter().any(|place| dir.starts_with(place)), "{}", dir.display());
            std::fs::remove_dir(dir).unwrap();
        }
    }

    #[test]
    fn a_socket_has_a_path_that_fits_its_address() {
        let root = tempfile::tempdir().unwrap();
        for depth in 0..12 {
            let dir = root.path().join("directory/".repeat(depth));
            std::fs::create_dir_all(&dir).unwrap();
            let sockets = Sockets::new(&dir, false, Changes::default()).unwrap();
            let socket = sockets.open(Rank(1023), &dir, None).unwrap();
            assert!(socket.path().as_os_str().len() <= PATH_BYTES_MAX);
            drop(socket);
            if sockets.dir() != dir {
                std::fs::remove_dir(sockets.dir()).unwrap();
            }
        }
    }
}
