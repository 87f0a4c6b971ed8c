//! The data directory: held by one daemon at a time, and known by an id of its own.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::libc::ENOLCK;
use tracing::warn;

use crate::Error;
use crate::session::Leader;

/// The file of the coordinators' addresses.
const COORDINATORS: &str = "coordinators.json";
/// The file of the newest time of leading.
const LEADER: &str = "leader.json";

/// Returns options for a file that only this user reads, whatever the umask.
pub(crate) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create(true).mode(0o600);
    options
}

/// Makes a directory of the data directory, and those above it. Ranks of other users pass through to
/// what is theirs, and see nothing else.
pub(crate) fn make_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(dir_mode()).create(path)
}

fn dir_mode() -> u32 {
    // Only root can start ranks of other users.
    if nix::unistd::geteuid().is_root() { 0o711 } else { 0o700 }
}

/// Hold of one daemon on its data directory, until it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "what they hold ends with them")]
pub(crate) enum Held {
    /// Locked.
    File(File),
    /// By a name that one process of this host can have, where the file system has no locks.
    Name(UnixListener),
}

/// Takes the directory for this daemon; made if it is not there.
pub(crate) fn lock(data_dir: &Path) -> Result<Held, Error> {
    lock_with(data_dir, File::try_lock)
}

fn lock_with(data_dir: &Path, try_lock: impl Fn(&File) -> Result<(), TryLockError>) -> Result<Held, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    muster_monitor::own_data_dir(data_dir, dir_mode())?;
    let file = private_file().write(true).open(data_dir.join("worker.lock")).map_err(failed)?;
    let held = || Error::DataDirHeld(data_dir.to_owned());
    let error = match try_lock(&file) {
        Ok(()) => return Ok(Held::File(file)),
        Err(TryLockError::WouldBlock) => return Err(held()),
        Err(TryLockError::Error(error)) => error,
    };
    // Lustre without -o flock, NFS without its lock daemon.
    let has_no_locks = error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(ENOLCK);
    if !has_no_locks {
        return Err(failed(error));
    }
    let found = file.metadata().map_err(failed)?;
    let name = format!("muster-worker-{:x}-{:x}", found.dev(), found.ino());
    let name = std::os::unix::net::SocketAddr::from_abstract_name(name).map_err(failed)?;
    let named = match UnixListener::bind_addr(&name) {
        Ok(named) => named,
        Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(held()),
        Err(error) => return Err(failed(error)),
    };
    warn!(
        dir = %data_dir.display(), %error,
        "the file system of the data directory has no locks: a second daemon on this host is refused all the same, \
         and one on another host is not; use a local disk, or a directory for each host"
    );
    Ok(Held::Name(named))
}

/// Identity of the data directory, made when it is first used.
pub(crate) fn data_id(data_dir: &Path) -> Result<String, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    let path = data_dir.join("id");
    match std::fs::read_to_string(&path) {
        Ok(id) if uuid::Uuid::parse_str(id.trim()).is_ok() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let id = uuid::Uuid::new_v4().to_string();
    // An empty file would give the node another identity at its next start.
    write_whole(&path, &id).map_err(failed)?;
    Ok(id)
}

/// Addresses at which coordinators listen themselves, by their URLs. None if they were never kept, or not whole.
pub(crate) fn coordinators(data_dir: &Path) -> BTreeMap<String, SocketAddr> {
    let kept = std::fs::read(data_dir.join(COORDINATORS)).unwrap_or_default();
    serde_json::from_slice(&kept).unwrap_or_default()
}

/// Keeps them for the next daemon.
pub(crate) fn keep_coordinators(data_dir: &Path, all: &BTreeMap<String, SocketAddr>) -> std::io::Result<()> {
    write_whole(&data_dir.join(COORDINATORS), &serde_json::to_string(all)?)
}

/// The newest time of leading. None if it was never kept, or not whole.
pub(crate) fn leader(data_dir: &Path) -> Leader {
    let kept = std::fs::read(data_dir.join(LEADER)).unwrap_or_default();
    serde_json::from_slice(&kept).unwrap_or_default()
}

/// Keeps it for the next daemon.
pub(crate) fn keep_leader(data_dir: &Path, leader: &Leader) -> std::io::Result<()> {
    write_whole(&data_dir.join(LEADER), &serde_json::to_string(leader)?)
}

/// Renamed when whole.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let partial = path.with_extension("new");
    private_file().write(true).truncate(true).open(&partial)?.write_all(text.as_bytes())?;
    std::fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_locks_is_no_reason_to_refuse_and_a_second_daemon_is() {
        let without =
            |code: i32| move |_: &File| Err(TryLockError::Error(std::io::Error::from_raw_os_error(code)));
        for code in [nix::libc::ENOSYS, nix::libc::EOPNOTSUPP, ENOLCK] {
            let dir = tempfile::tempdir().unwrap();
            let first = lock_with(dir.path(), without(code)).unwrap();
            let second = lock_with(dir.path(), without(code)).unwrap_err();
            assert!(matches!(second, Error::DataDirHeld(_)), "{second}");
            drop(first);
            assert!(matches!(lock_with(dir.path(), without(code)), Ok(Held::Name(_))));
        }
        let dir = tempfile::tempdir().unwrap();
        let failed = lock_with(dir.path(), without(nix::libc::EIO)).unwrap_err();
        assert!(matches!(failed, Error::DataDir { .. }), "an error of the disk is one: {failed}");
    }
}
