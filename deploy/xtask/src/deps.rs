//! The folder of what the set-up brings: one set-up at a time, each part whole or absent.
//!
//! A part is built in `staging`, and its stamp is written last; what a killed set-up leaves there is
//! thrown away by the next. Only the `.part` files in `downloads` outlive it, to be gone on with.

use anyhow::{Context, Result};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// A part of the set-up: present when its stamp holds its fingerprint and its files are there.
pub struct Part {
    /// What one sees it called.
    pub name: &'static str,
    /// The file that says which version is there, relative to the folder.
    pub stamp: &'static str,
    /// Versions and hashes: another fingerprint means that the part is out of date.
    pub fingerprint: String,
    /// Files without which it is not there, whatever the stamp says; relative to the folder.
    pub files: &'static [&'static str],
}

impl Part {
    /// Whether there is nothing to do: a handful of file look-ups, no hashing.
    pub fn is_there(&self, deps: &Path) -> bool {
        fs::read_to_string(deps.join(self.stamp)).is_ok_and(|stamp| stamp.trim_end() == self.fingerprint)
            && self.files.iter().all(|file| deps.join(file).is_file())
    }
}

/// The folder, held by this process alone until it is dropped.
pub struct Deps {
    /// The folder itself.
    pub dir: PathBuf,
    lock: File,
}

impl Deps {
    /// Waits until no other set-up runs in `dir`, then clears what a killed one left.
    pub fn lock(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let lock = File::options().create(true).truncate(false).read(true).write(true).open(dir.join("lock"));
        let lock = lock.context("failed to create the lock of the set-up")?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("another set-up is running in {}; waiting for it", dir.display());
                lock.lock().context("failed to wait for the other set-up")?;
            }
            Err(TryLockError::Error(error)) => return Err(error).context("failed to lock the set-up"),
        }
        let deps = Self { dir, lock };
        remove(&deps.path("staging"))?;
        for folder in ["staging", "downloads", "data", "bin"] {
            fs::create_dir_all(deps.path(folder)).with_context(|| format!("failed to create {folder}"))?;
        }
        Ok(deps)
    }

    /// A path in the folder.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.dir.join(relative)
    }

    /// An empty input for a child that writes to `staging`. It shares the lock: should this process be
    /// killed, the next set-up waits until the child has ended too.
    pub fn lock_as_input(&self) -> Result<Stdio> {
        Ok(self.lock.try_clone().context("failed to share the lock")?.into())
    }

    /// Puts a finished file or folder from `staging` in its place; what was there before is removed.
    pub fn place(&self, staged: &Path, relative: &str) -> Result<()> {
        let place = self.path(relative);
        if place.is_dir() {
            // A rename is at once, removing is not: a killed set-up leaves no half of the old one.
            let old = self.path("staging/replaced");
            remove(&old)?;
            fs::rename(&place, &old)?;
        }
        fs::rename(staged, &place)
            .with_context(|| format!("failed to put {} in its place", place.display()))?;
        remove(&self.path("staging/replaced"))
    }

    /// Says that the part is whole; nothing of it may be written afterwards.
    pub fn stamp(&self, part: &Part) -> Result<()> {
        let staged = self.path("staging/stamp");
        fs::write(&staged, format!("{}\n", part.fingerprint))?;
        fs::rename(&staged, self.path(part.stamp)).with_context(|| format!("failed to stamp {}", part.name))
    }
}

impl Drop for Deps {
    fn drop(&mut self) {
        // Only space is lost if this fails: the next set-up clears it before it begins.
        let _ = remove(&self.path("staging"));
    }
}

/// Removes a file or a folder if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: Part =
        Part { name: "thing", stamp: "bin/.thing", fingerprint: String::new(), files: &["bin/thing"] };

    #[test]
    fn a_part_is_there_only_with_its_stamp_and_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let part = Part { fingerprint: "thing 2".into(), ..PART };
        assert!(!part.is_there(folder.path()));
        let deps = Deps::lock(folder.path()).unwrap();
        fs::write(deps.path("staging/thing"), "x").unwrap();
        deps.place(&deps.path("staging/thing"), "bin/thing").unwrap();
        assert!(!part.is_there(folder.path()), "no stamp yet");
        deps.stamp(&part).unwrap();
        assert!(part.is_there(folder.path()));
        assert!(!Part { fingerprint: "thing 3".into(), ..PART }.is_there(folder.path()));
        fs::remove_file(deps.path("bin/thing")).unwrap();
        assert!(!part.is_there(folder.path()), "a stamp alone is not the thing");
    }

    #[test]
    fn what_a_killed_set_up_left_in_staging_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("staging/libtorch/torch")).unwrap();
        fs::create_dir_all(folder.path().join("downloads")).unwrap();
        fs::write(folder.path().join("downloads/a.part"), "half").unwrap();
        let deps = Deps::lock(folder.path()).unwrap();
        assert!(!deps.path("staging/libtorch").exists());
        assert!(deps.path("downloads/a.part").exists(), "a broken download is gone on with");
    }

    #[test]
    fn a_folder_replaces_the_one_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let deps = Deps::lock(folder.path()).unwrap();
        fs::create_dir_all(deps.path("data/set")).unwrap();
        fs::write(deps.path("data/set/old"), "").unwrap();
        fs::create_dir_all(deps.path("staging/set")).unwrap();
        fs::write(deps.path("staging/set/new"), "").unwrap();
        deps.place(&deps.path("staging/set"), "data/set").unwrap();
        assert!(deps.path("data/set/new").exists() && !deps.path("data/set/old").exists());
    }
}
