//! The data directory: held by one daemon at a time, and known by an id of its own.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

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

/// Takes the directory for this daemon; made if it is not there.
pub(crate) fn lock(data_dir: &Path) -> Result<File, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    muster_monitor::own_data_dir(data_dir, dir_mode())?;
    let file = private_file().write(true).open(data_dir.join("worker.lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::DataDirHeld(data_dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Identity of the data directory, made when it is first used.
pub(crate) fn data_id(data_dir: &Path) -> Result<String, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    let path = data_dir.join("id");
    match std::fs::read_to_string(&path) {
        Ok(id) if uuid::Uuid::parse_str(id.trim()).is_ok() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
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
