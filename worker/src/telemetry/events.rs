//! TensorBoard event files that the ranks of this node write: found below the job's directory, and read as they grow.

mod file;
pub(crate) mod message;
mod owner;
pub(crate) mod record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use muster_core::types::Rank;
use tracing::{info, warn};

use self::file::{EventFile, Sink};
pub(super) use self::owner::Owners;
use self::owner::{Owner, Writer};
use self::record::FRAME_BYTES_MAX;
use super::output::LOOK_BYTES_MAX;
use super::source::Source;

/// How event files are called, as TensorBoard itself finds them.
const NAME: &str = "events.out.tfevents.";
/// Directories below that of the job: a program's own for each run, TensorBoard's for each curve, and a few between.
const DEPTH_MAX: usize = 6;
/// Files and directories that are met on the way, each second: a directory that holds data sets, too, takes too long.
const ENTRIES_MAX: usize = 10_000;
/// Files that are followed: `SummaryWriter.add_scalars` makes one for each curve.
const FILES_MAX: usize = 256;
/// Files that are known, followed or not: those that were there before, and as many again.
const KNOWN_MAX: usize = 2 * ENTRIES_MAX;

// Else a record that just fits would never be read whole.
const _: () = assert!(LOOK_BYTES_MAX >= FRAME_BYTES_MAX);

/// A directory, and the event files that were there before the gang was: what an earlier generation, or another job,
/// has written is not read again.
#[derive(Clone, Debug)]
pub(crate) struct EventDir {
    path: PathBuf,
    before: BTreeSet<PathBuf>,
    /// Whose files are read, if not everybody's: ranks of one user must not have root read others'.
    uid: Option<u32>,
}

impl EventDir {
    /// Looks at the directory, which need not be there yet. None if it cannot be followed.
    pub fn before(path: PathBuf, uid: Option<u32>) -> Option<Self> {
        match list(&path) {
            Ok(Listing { files, is_whole: true }) => {
                Some(Self { path, before: files.into_iter().collect(), uid })
            }
            Ok(Listing { is_whole: false, .. }) => {
                warn!(
                    path = %path.display(),
                    "tensorboard_dir is not followed: it holds more than {ENTRIES_MAX} files and directories; name one \
                     of its own for this job"
                );
                None
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "tensorboard_dir is not followed");
                None
            }
        }
    }
}

/// The event files of this node's ranks.
#[derive(Debug)]
pub(super) struct Events {
    dir: PathBuf,
    uid: Option<u32>,
    /// Files that need not be looked at: they were there before, are followed, or are not ours.
    known: BTreeSet<PathBuf>,
    owners: Owners,
    ranks: BTreeMap<Rank, OfRank>,
    files: Vec<(Rank, EventFile)>,
    /// It was said that there are more files than are followed.
    complained: bool,
}

#[derive(Debug)]
struct OfRank {
    sink: Sink,
    /// Where its first file is: the values in it have their tags for names.
    first_dir: Option<PathBuf>,
}

impl Events {
    /// Those of the ranks with these sources, which have been started.
    pub fn new(dir: EventDir, owners: Owners, sources: impl Iterator<Item = Source>) -> Self {
        let of_rank = |source: Source| (source.rank(), OfRank { sink: Sink::new(source), first_dir: None });
        let EventDir { path, before: known, uid } = dir;
        Self {
            dir: path,
            uid,
            known,
            owners,
            ranks: sources.map(of_rank).collect(),
            files: Vec::new(),
            complained: false,
        }
    }

    /// Finds new files, and reads on in all. Says whether there is more.
    pub fn look(&mut self, buffer: &mut [u8]) -> bool {
        // A directory that cannot be read now may be there the next time.
        for path in list(&self.dir).unwrap_or_default().files {
            self.meet(path);
        }
        let mut more = false;
        for (rank, file) in &mut self.files {
            if let Some(of_rank) = self.ranks.get_mut(rank) {
                more |= file.look(&mut of_rank.sink, buffer);
            }
        }
        more
    }

    /// The rank has ended: what was read is all there is.
    pub fn finish(&mut self, rank: Rank) {
        let Some(of_rank) = self.ranks.get(&rank) else { return };
        for (_, file) in self.files.iter_mut().filter(|(owner, _)| *owner == rank) {
            file.finish(&of_rank.sink);
        }
    }

    /// Follows a file, if it is new and one of these ranks has written it.
    fn meet(&mut self, path: PathBuf) {
        if self.known.contains(&path) {
            return;
        }
        if self.files.len() >= FILES_MAX || self.known.len() >= KNOWN_MAX {
            if !std::mem::replace(&mut self.complained, true) {
                warn!(path = %path.display(), "this event file and further ones are not followed: {FILES_MAX} are");
            }
            return;
        }
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(NAME));
        let owner = self.owners.of(Writer::named(name.unwrap_or_default(), &self.owners.host));
        self.known.insert(path.clone());
        match owner {
            Owner::Rank(rank) => self.follow(rank, path),
            // Whoever has written it, the program is known by its first rank.
            Owner::Unknown => self.follow(Rank(0), path),
            Owner::Other => info!(path = %path.display(), "an event file of another program is not followed"),
        }
    }

    fn follow(&mut self, rank: Rank, path: PathBuf) {
        let Some(of_rank) = self.ranks.get_mut(&rank) else { return };
        let dir = path.parent().unwrap_or(&path);
        let first_dir = of_rank.first_dir.get_or_insert_with(|| dir.to_owned());
        let prefix = prefix(first_dir, dir);
        info!(path = %path.display(), %rank, %prefix, "an event file is followed");
        self.files.push((rank, EventFile::new(path, prefix, self.uid)));
    }
}

/// What tells the values in a directory from those of the same name in the first: the part of its path that is its own.
fn prefix(first: &Path, dir: &Path) -> String {
    if first == dir {
        return String::new();
    }
    let shared = first.components().zip(dir.components()).take_while(|(one, other)| one == other).count();
    let own: PathBuf = dir.components().skip(shared).collect();
    // The directory above the first has nothing of its own.
    let own =
        if own.as_os_str().is_empty() { dir.file_name().map(PathBuf::from).unwrap_or_default() } else { own };
    format!("{}/", own.to_string_lossy())
}

#[derive(Debug, Default)]
struct Listing {
    /// Those nearest to the directory first.
    files: Vec<PathBuf>,
    is_whole: bool,
}

/// The event files below a directory that may not be there.
fn list(dir: &Path) -> io::Result<Listing> {
    let mut found = Listing { files: Vec::new(), is_whole: true };
    let mut open = VecDeque::from([(dir.to_owned(), 0)]);
    let mut met = 0;
    while let Some((path, depth)) = open.pop_front() {
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if depth == 0 && error.kind() != io::ErrorKind::NotFound => return Err(error),
            // One that nobody may read, or that is gone.
            Err(_) => continue,
        };
        let (mut dirs, mut files) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            met += 1;
            if met > ENTRIES_MAX {
                found.is_whole = false;
                break;
            }
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            // Links are neither: they may lead anywhere, and back.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < DEPTH_MAX && !name.starts_with(b".") => {
                    dirs.push((entry.path(), depth + 1));
                }
                Ok(kind) if kind.is_file() && name.starts_with(NAME.as_bytes()) => files.push(entry.path()),
                Ok(_) | Err(_) => {}
            }
        }
        dirs.sort();
        files.sort();
        open.extend(dirs);
        found.files.append(&mut files);
        if !found.is_whole {
            break;
        }
    }
    Ok(found)
}
