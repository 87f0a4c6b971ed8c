//! The data directory of a daemon: whoever can write there decides what the daemon does, so it must
//! be this user's alone.

use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use tracing::warn;

/// Write bits of the group and of everybody.
const OTHERS_WRITE: u32 = 0o022;
/// Write bit of everybody, and the bit that lets only owners rename and remove.
const ALL_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// Why a data directory is not used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// It cannot be made or looked at.
    #[error("failed to use the data directory {path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its owner can change what this daemon reads.
    #[error(
        "the data directory {path} belongs to user {owner}, and this daemon runs as user {own}: start it \
         as its owner, or choose another --data-dir; do not take over a directory that others have filled"
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// User id of this process.
        own: u32,
    },
    /// Others can change what this daemon reads.
    #[error(
        "others may write to the data directory {path} (mode {mode:o}): choose another --data-dir, or, if \
         nobody has put anything there, run `chmod go-w {path}`"
    )]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

/// Makes the directory with these permissions if it is not there, and refuses one that is not this
/// user's alone.
pub fn own_data_dir(path: &Path, mode: u32) -> Result<(), DataDirError> {
    let failed = |source| DataDirError::Io { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed)?;
    // Links are followed: what counts is where they lead.
    let real = path.canonicalize().map_err(failed)?;
    let own = geteuid().as_raw();
    judge(&real, &fs::metadata(&real).map_err(failed)?, own)?;
    for ancestor in real.ancestors().skip(1).chain(links_of(path)) {
        let Ok(meta) = fs::symlink_metadata(ancestor) else { continue };
        if let Some(what) = replaceable(&meta, own) {
            warn!(
                data_dir = %path.display(),
                ancestor = %ancestor.display(),
                "others can put another data directory in the place of this one, for its ancestor {what}"
            );
        }
    }
    Ok(())
}

/// Returns the path and those above it that are links. They are judged as well as where they lead.
fn links_of(path: &Path) -> impl Iterator<Item = &Path> {
    path.ancestors().filter(|path| path.is_symlink())
}

fn judge(path: &Path, meta: &Metadata, own: u32) -> Result<(), DataDirError> {
    let (path, owner, mode) = (path.to_owned(), meta.uid(), meta.mode() & 0o7777);
    if owner != own {
        return Err(DataDirError::NotOurs { path, owner, own });
    }
    if mode & OTHERS_WRITE != 0 {
        return Err(DataDirError::Writable { path, mode });
    }
    Ok(())
}

/// Returns why others can rename what is in a directory, or a link itself; none if only root and
/// this user can. In a directory such as /tmp only owners can.
fn replaceable(meta: &Metadata, own: u32) -> Option<&'static str> {
    let owner = meta.uid();
    let all_write = !meta.is_symlink() && meta.mode() & ALL_WRITE != 0 && meta.mode() & STICKY == 0;
    match owner {
        owner if owner != 0 && owner != own => Some("belongs to another user"),
        _ if all_write => Some("can be written by everybody"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/data");
        own_data_dir(&path, 0o700).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        for (others, refused) in
            [(0o755, false), (0o711, false), (0o770, true), (0o702, true), (0o1777, true)]
        {
            fs::set_permissions(&path, Permissions::from_mode(others)).unwrap();
            for path in [&path, &link] {
                let found = own_data_dir(path, 0o700).map_err(|error| error.to_string());
                assert_eq!(found.is_err(), refused, "{others:o}: {found:?}");
                assert!(found.err().is_none_or(|why| why.contains("chmod go-w")), "{others:o}");
            }
        }
        assert_eq!(mode(&path), 0o1777, "what is there is not changed");
    }

    #[test]
    fn somebody_elses_directory_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let meta = fs::metadata(dir.path()).unwrap();
        let refused = judge(dir.path(), &meta, meta.uid() + 1).unwrap_err().to_string();
        assert!(refused.contains(&format!("belongs to user {}", meta.uid())), "{refused}");
        // Only root can give one away.
        if chown(dir.path(), Some(65534), None).is_ok() {
            let refused = own_data_dir(dir.path(), 0o700).unwrap_err().to_string();
            assert!(refused.contains("belongs to user 65534"), "{refused}");
        }
    }

    #[test]
    fn ancestors_are_judged_as_those_who_can_rename_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let own = fs::metadata(dir.path()).unwrap().uid();
        for (others, expected) in
            [(0o755, None), (0o775, None), (0o1777, None), (0o777, Some("can be written by everybody"))]
        {
            fs::set_permissions(dir.path(), Permissions::from_mode(others)).unwrap();
            let meta = fs::metadata(dir.path()).unwrap();
            assert_eq!(replaceable(&meta, own), expected, "{others:o}");
        }
        let meta = fs::metadata(dir.path()).unwrap();
        let by_another = if own == 0 { None } else { Some("belongs to another user") };
        assert_eq!(replaceable(&meta, own + 1).filter(|_| own != 0), by_another);
    }
}
