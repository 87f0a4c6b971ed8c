//! The data directory: held by one daemon at a time, and known by an id of its own.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::Error;

/// Takes the directory for this daemon; made if it is not there.
pub(crate) fn lock(data_dir: &Path) -> Result<File, Error> {
    let failed = |source| Error::DataDir { path: data_dir.to_owned(), source };
    std::fs::create_dir_all(data_dir).map_err(failed)?;
    let file = File::create(data_dir.join("worker.lock")).map_err(failed)?;
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
    // Renamed when whole: an empty file would give the node another identity at its next start.
    let partial = data_dir.join("id.new");
    std::fs::write(&partial, &id).and_then(|()| std::fs::rename(&partial, &path)).map_err(failed)?;
    Ok(id)
}
