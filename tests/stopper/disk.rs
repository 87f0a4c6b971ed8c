//! What a disk may have of a file when its machine loses power: everything synchronised, and any of the rest.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// What disks write whole. Many write 4096 bytes so; the smaller promise is the harder test.
const SECTOR_BYTES: usize = 512;

/// A change that no fsync has followed.
#[derive(Debug)]
enum Change {
    Bytes { file: PathBuf, offset: u64, old: Vec<u8> },
    Length { file: PathBuf, old: u64 },
    Renamed { from: PathBuf, to: PathBuf },
}

/// Changes since the last synchronisation, oldest first.
#[derive(Debug, Default)]
pub struct Unsynced(Vec<Change>);

impl Unsynced {
    /// Bytes are about to be written.
    pub fn writes(&mut self, file: &Path, offset: u64, len: usize) -> io::Result<()> {
        let opened = File::open(file)?;
        let length = opened.metadata()?.len();
        if offset + len as u64 > length {
            self.0.push(Change::Length { file: file.to_owned(), old: length });
        }
        let there = usize::try_from(length.saturating_sub(offset)).map_or(len, |there| there.min(len));
        let mut old = vec![0; there];
        opened.read_exact_at(&mut old, offset)?;
        self.0.push(Change::Bytes { file: file.to_owned(), offset, old });
        Ok(())
    }

    /// The length is about to change. What is cut off must not come back, so only growth is remembered.
    pub fn resizes(&mut self, file: &Path) -> io::Result<()> {
        let old = file.metadata()?.len();
        self.0.push(Change::Length { file: file.to_owned(), old });
        Ok(())
    }

    /// It was renamed; what is known of the file goes with it.
    pub fn renamed(&mut self, from: &Path, to: &Path) {
        for change in &mut self.0 {
            match change {
                Change::Bytes { file, .. } | Change::Length { file, .. } if file == from => {
                    to.clone_into(file);
                }
                Change::Bytes { .. } | Change::Length { .. } | Change::Renamed { .. } => {}
            }
        }
        self.0.push(Change::Renamed { from: from.to_owned(), to: to.to_owned() });
    }

    /// A file, or a directory, is on the disk now.
    pub fn synced(&mut self, path: &Path) {
        self.0.retain(|change| match change {
            Change::Bytes { file, .. } | Change::Length { file, .. } => file != path,
            Change::Renamed { to, .. } => to.parent() != Some(path),
        });
    }

    /// Takes back what chance decides, newest first; another `seed`, another choice.
    pub fn lose(self, seed: u64) -> io::Result<()> {
        let mut chance = Chance { state: seed, eighths: [8, 4, 1, 7, 2][seed as usize % 5] };
        for change in self.0.into_iter().rev() {
            match change {
                Change::Bytes { file, offset, old } => {
                    let opened = OpenOptions::new().write(true).open(file)?;
                    for (nth, sector) in old.chunks(SECTOR_BYTES).enumerate() {
                        if chance.is_lost() {
                            opened.write_all_at(sector, offset + (nth * SECTOR_BYTES) as u64)?;
                        }
                    }
                }
                Change::Length { file, old } => {
                    let opened = OpenOptions::new().write(true).open(file)?;
                    if old < opened.metadata()?.len() && chance.is_lost() {
                        opened.set_len(old)?;
                    }
                }
                Change::Renamed { from, to } => {
                    if chance.is_lost() {
                        std::fs::rename(to, from)?;
                    }
                }
            }
        }
        Ok(())
    }
}

struct Chance {
    state: u64,
    /// How much of what can be lost is lost.
    eighths: u64,
}

impl Chance {
    fn is_lost(&mut self) -> bool {
        // Knuth's constants for a linear congruential generator; its upper bits are good enough to toss a coin.
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % 8 < self.eighths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synchronised_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for seed in 0..20 {
            std::fs::write(&path, [1; 2048]).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            let mut unsynced = Unsynced::default();
            for (byte, synced) in [(2, true), (3, false)] {
                unsynced.writes(&path, 1024, 2048).unwrap();
                file.write_all_at(&[byte; 2048], 1024).unwrap();
                if synced {
                    unsynced.synced(&path);
                }
            }
            unsynced.lose(seed).unwrap();
            let left = std::fs::read(&path).unwrap();
            assert_eq!((left.len(), &left[..1024]), (3072, &[1; 1024][..]), "{seed}");
            let whole = |sector: &[u8]| sector.iter().all(|b| *b == 2) || sector.iter().all(|b| *b == 3);
            assert!(left[1024..].chunks(SECTOR_BYTES).all(whole), "{seed}");
        }
    }

    #[test]
    fn a_rename_may_be_lost_until_the_directory_is_synchronised() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        for (synced, expected) in [(false, &from), (true, &to)] {
            std::fs::write(&from, "x").unwrap();
            let mut unsynced = Unsynced::default();
            std::fs::rename(&from, &to).unwrap();
            unsynced.renamed(&from, &to);
            if synced {
                unsynced.synced(dir.path());
            }
            unsynced.lose(0).unwrap();
            assert!(expected.exists());
        }
    }
}
