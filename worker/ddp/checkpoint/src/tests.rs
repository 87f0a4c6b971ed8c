//! Writers that end, or are overtaken, between any two operations on files.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use super::*;

fn owner(generation: u64) -> Owner {
    Owner { job: "job".to_owned(), generation }
}

/// What the checkpoint of a step holds, told by the generation that wrote it.
fn parts(step: u64, generation: u64) -> Vec<Part> {
    let data = format!("{step} {generation} ").into_bytes().repeat(200);
    let empty = Part { name: "empty".to_owned(), kind: "f32".to_owned(), shape: vec![0], data: vec![] };
    vec![Part { name: "model".to_owned(), kind: "u8".to_owned(), shape: vec![], data }, empty]
}

/// Step and generation of the newest whole checkpoint, its content compared.
fn newest(dir: &Path) -> Option<(u64, u64)> {
    let found = latest(dir).unwrap().checkpoint?;
    assert_eq!(found.parts, parts(found.step, found.generation), "wrong bytes");
    Some((found.step, found.generation))
}

/// How a writer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is killed: what was done stays.
    Killed,
    /// In the middle of a write.
    Torn,
    /// The machine loses power: what was not synchronised is lost, content as well as names.
    Power,
    /// The disk takes nothing more, and the writer goes on.
    Full,
}

#[derive(Debug, Default)]
struct State {
    done: usize,
    unsynced: BTreeSet<PathBuf>,
    renamed: Vec<(PathBuf, PathBuf)>,
}

/// Ends its writer at the n-th operation.
#[derive(Debug)]
struct Ending {
    end: End,
    nth: usize,
    state: Mutex<State>,
}

fn over() -> io::Error {
    io::Error::other("the writer is over")
}

impl Ending {
    fn new(end: End, nth: usize) -> Self {
        Self { end, nth, state: Mutex::default() }
    }

    /// Whether this operation is carried out; else how it fails.
    fn step(&self, needs_room: bool) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.done += 1;
        match self.end {
            End::Full if state.done > self.nth && needs_room => Err(io::ErrorKind::StorageFull.into()),
            End::Power if state.done == self.nth => {
                state.lose().unwrap();
                Err(over())
            }
            End::Killed | End::Torn | End::Power if state.done >= self.nth => Err(over()),
            End::Full | End::Killed | End::Torn | End::Power => Ok(()),
        }
    }
}

impl State {
    fn lose(&mut self) -> io::Result<()> {
        for (from, to) in self.renamed.drain(..).rev() {
            if to.exists() && !from.exists() {
                std::fs::rename(&to, &from)?;
                self.unsynced = self.unsynced.iter().map(|path| moved(path, &to, &from)).collect();
            }
        }
        for path in self.unsynced.iter().filter(|path| path.is_file()) {
            let length = path.metadata()?.len();
            OpenOptions::new().write(true).open(path)?.set_len(length / 2)?;
        }
        Ok(())
    }
}

fn moved(path: &Path, from: &Path, to: &Path) -> PathBuf {
    path.strip_prefix(from).map_or(path.to_owned(), |rest| to.join(rest))
}

impl Disk for Ending {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.step(true)?;
        RealDisk.make_dir(path)
    }

    fn write(&self, path: &Path, bytes: &[&[u8]]) -> io::Result<()> {
        let allowed = self.step(true);
        let half: Vec<&[u8]> = bytes.iter().map(|bytes| &bytes[..bytes.len() / 2]).collect();
        let now = self.state.lock().unwrap().done == self.nth;
        if allowed.is_err() && (self.end == End::Full || self.end == End::Torn && now) {
            RealDisk.write(path, &half)?;
        }
        allowed?;
        self.state.lock().unwrap().unsynced.insert(path.to_owned());
        RealDisk.write(path, bytes)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        let mut state = self.state.lock().unwrap();
        state.unsynced.remove(path);
        state.renamed.retain(|(_, to)| to.parent() != Some(path));
        // The real thing takes long, and no power is lost here but the one above.
        path.symlink_metadata().map(drop)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(false)?;
        RealDisk.rename(from, to)?;
        let mut state = self.state.lock().unwrap();
        state.unsynced = state.unsynced.iter().map(|path| moved(path, from, to)).collect();
        state.renamed.push((from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        RealDisk.remove(path)
    }
}

/// A writer that nothing happens to.
fn open(dir: &Path, generation: u64) -> Checkpoints {
    Checkpoints::open_on(Box::new(Ending::new(End::Killed, usize::MAX)), dir, owner(generation), 2).unwrap()
}

/// Saves 10 and 20, then, as another generation that ends at its n-th operation, 20 again and 30.
fn written(dir: &Path, ending: Ending) -> Vec<Result<(), Error>> {
    let first = open(dir, 1);
    for step in [10, 20] {
        first.save(step, 4, &parts(step, 1)).unwrap();
    }
    match Checkpoints::open_on(Box::new(ending), dir, owner(2), 2) {
        Ok(second) => [20, 30].map(|step| second.save(step, 4, &parts(step, 2))).into(),
        Err(error) => vec![Err(error)],
    }
}

#[test]
fn wherever_a_writer_ends_the_newest_is_whole() {
    for end in [End::Killed, End::Torn, End::Power, End::Full] {
        for nth in 1.. {
            let dir = tempfile::tempdir().unwrap();
            let saved = written(dir.path(), Ending::new(end, nth));
            let newest_now = newest(dir.path()).unwrap();
            let table = [(20, 1), (20, 2), (30, 2)];
            assert!(table.contains(&newest_now), "{end:?} at {nth}: {newest_now:?}");
            // What was said to be saved is there.
            let said = saved.iter().filter(|saved| saved.is_ok()).count();
            assert!(newest_now >= table[said], "{end:?} at {nth}: {newest_now:?} after {saved:?}");
            if end == End::Full {
                let full = saved.iter().filter_map(|saved| saved.as_ref().err()).all(Error::is_full);
                assert!(full, "{end:?} at {nth}: {saved:?}");
            }

            // The next start goes on, and nothing is left over.
            let third = open(dir.path(), 3);
            third.save(40, 4, &parts(40, 3)).unwrap();
            assert_eq!(newest(dir.path()), Some((40, 3)), "{end:?} at {nth}");
            third.save(50, 4, &parts(50, 3)).unwrap();
            let names = entries(dir.path());
            assert!(names[0].starts_with(".claim-"), "{end:?} at {nth}: {names:?}");
            assert_eq!(names[1..], ["step-00000040", "step-00000050"], "{end:?} at {nth}");
            if saved.len() == 2 && saved.iter().all(Result::is_ok) {
                assert!(nth > 20, "the operations were counted: {nth}");
                break;
            }
        }
    }
}

fn entries(dir: &Path) -> Vec<String> {
    let names = latest::entries(dir).unwrap();
    names.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Lets a later generation take over before the n-th operation of its writer.
#[derive(Debug)]
struct Overtaken {
    dir: PathBuf,
    nth: usize,
    done: Mutex<usize>,
    /// The step and the generation that the later one goes on from, once it has looked.
    found: OnceLock<Option<(u64, u64)>>,
}

impl Overtaken {
    fn step(&self) {
        let mut done = self.done.lock().unwrap();
        *done += 1;
        if *done == self.nth {
            open(&self.dir, 2);
            self.found.set(newest(&self.dir)).unwrap();
        }
    }
}

impl Disk for std::sync::Arc<Overtaken> {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.step();
        RealDisk.make_dir(path)
    }

    fn write(&self, path: &Path, bytes: &[&[u8]]) -> io::Result<()> {
        self.step();
        RealDisk.write(path, bytes)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.step();
        RealDisk.sync(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step();
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step();
        RealDisk.remove(path)
    }
}

#[test]
fn a_zombie_publishes_nothing_after_a_later_generation_has_looked() {
    for nth in 1.. {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), 1).save(10, 4, &parts(10, 1)).unwrap();
        let disk =
            Overtaken { dir: dir.path().to_owned(), nth, done: Mutex::default(), found: OnceLock::new() };
        let disk = std::sync::Arc::new(disk);
        let saved = Checkpoints::open_on(Box::new(disk.clone()), dir.path(), owner(1), 2)
            .and_then(|zombie| zombie.save(20, 4, &parts(20, 1)));
        let Some(found) = disk.found.get().copied() else {
            saved.unwrap();
            assert!(nth > 10, "the operations were counted: {nth}");
            return;
        };
        assert_eq!(newest(dir.path()), found, "at {nth}, after {saved:?}");
        match saved {
            Ok(()) => assert_eq!(found, Some((20, 1)), "at {nth}"),
            Err(error) => assert!(error.is_superseded() || found == Some((20, 1)), "at {nth}: {error}"),
        }
    }
}
