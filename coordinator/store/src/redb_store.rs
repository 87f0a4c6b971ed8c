//! The embedded store: one redb file. redb checksums its pages, so a torn file is recovered to the last
//! whole commit or refused, never read wrongly.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};

use crate::{Batch, Error, Fence, Store};

const VALUES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("values");
const FENCE: TableDefinition<'_, (), u64> = TableDefinition::new("fence");
/// Page cache. The state is read once at the start; the default of 1 GiB would be memory for nothing.
const CACHE_BYTES: usize = 16 << 20;

/// A redb file, locked by this process.
#[derive(Debug)]
pub struct RedbStore {
    path: PathBuf,
    /// None after a failed write: redb refuses further use of a handle that met an I/O error.
    database: Option<Database>,
}

impl RedbStore {
    /// Opens or creates the file. Fails if another process holds it or if it is damaged beyond recovery.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if !path.exists() {
            create(path)?;
        }
        let mut store = Self { path: path.to_owned(), database: None };
        store.database()?;
        Ok(store)
    }

    /// The fence of the last campaign.
    pub fn fence(&mut self) -> Result<Fence, Error> {
        self.run(|database| {
            let table = database.begin_read()?.open_table(FENCE)?;
            Ok(Fence(table.get(())?.map_or(0, |fence| fence.value())))
        })
    }

    /// The next campaign gives a fence above this one.
    pub fn raise(&mut self, least: Fence) -> Result<(), Error> {
        self.run(|database| {
            let write = database.begin_write()?;
            {
                let mut table = write.open_table(FENCE)?;
                let held = table.get(())?.map_or(0, |fence| fence.value());
                table.insert((), held.max(least.0))?;
            }
            write.commit()?;
            Ok(())
        })
    }

    fn database(&mut self) -> Result<&Database, Error> {
        let database = match self.database.take() {
            Some(database) => database,
            // redb asserts on some damage; a damaged file is an error here, not a crash.
            None => guarded(&self.path, || {
                let opened = Database::builder().set_cache_size(CACHE_BYTES).open(&self.path);
                opened.map_err(|error| open_error(&self.path, error))
            })?,
        };
        Ok(self.database.insert(database))
    }

    fn run<T>(&mut self, work: impl FnOnce(&Database) -> Result<T, Failure>) -> Result<T, Error> {
        let path = self.path.clone();
        let database = self.database()?;
        let result = guarded(&path, || {
            work(database).map_err(|failure| match failure {
                Failure::Fenced => Error::Fenced,
                Failure::Redb(error) => io_error(&path, *error),
            })
        });
        if matches!(result, Err(Error::Retryable(_))) {
            self.database = None;
        }
        result
    }
}

/// Makes a new store under another name and renames it when it is whole: a file of that name that is empty or
/// cut short is then always damage, never a store that was just being made.
fn create(path: &Path) -> Result<(), Error> {
    let unfinished = path.with_extension("new");
    let failed = |error: std::io::Error| io_error(path, redb::Error::Io(error));
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let database = Database::create(&unfinished).map_err(|error| open_error(path, error))?;
    let made = database.begin_write().map_err(redb::Error::from).and_then(|write| {
        write.open_table(FENCE)?.insert((), 0)?;
        write.open_table(VALUES)?;
        write.commit()?;
        Ok(())
    });
    made.map_err(|error| io_error(path, error))?;
    drop(database);
    std::fs::rename(&unfinished, path).map_err(failed)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn open_error(path: &Path, error: DatabaseError) -> Error {
    match error {
        DatabaseError::DatabaseAlreadyOpen => Error::Terminal(format!(
            "the store {} is in use by another coordinator; stop that one or choose another --data-dir",
            path.display()
        )),
        error => io_error(path, error.into()),
    }
}

/// redb's errors are large; boxed, the happy path stays small.
enum Failure {
    Fenced,
    Redb(Box<redb::Error>),
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Redb(Box::new(error.into()))
    }
}

fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(damaged(path, "its structure is inconsistent")))
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::Terminal(format!(
        "the store {} is damaged: {why}; restore it from a backup, or move it away to start with an empty one",
        path.display()
    ))
}

fn io_error(path: &Path, error: redb::Error) -> Error {
    match error {
        redb::Error::Io(io)
            if matches!(
                io.kind(),
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
            ) =>
        {
            Error::Retryable(format!("no space for {}: {io}; free some space there", path.display()))
        }
        redb::Error::Io(io) if matches!(io.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
            damaged(path, &io.to_string())
        }
        // A failed fsync may have lost what the page cache held: what is durable is unknown until the file is
        // read again, so the coordinator stops rather than retry.
        redb::Error::Io(io) => Error::Terminal(format!("failed to use the store {}: {io}", path.display())),
        redb::Error::PreviousIo => Error::Retryable("an earlier write failed".to_owned()),
        redb::Error::Corrupted(why) => damaged(path, &why),
        redb::Error::UpgradeRequired(version) => Error::Terminal(format!(
            "the store {} has file format {version}, which this version cannot read; use the version that wrote it",
            path.display()
        )),
        error => damaged(path, &error.to_string()),
    }
}

impl Store for RedbStore {
    fn campaign(&mut self) -> Result<Fence, Error> {
        self.run(|database| {
            let write = database.begin_write()?;
            let next = {
                let mut table = write.open_table(FENCE)?;
                let next = table.get(())?.map_or(0, |fence| fence.value()) + 1;
                table.insert((), next)?;
                next
            };
            write.commit()?;
            Ok(Fence(next))
        })
    }

    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        self.run(|database| {
            let table = database.begin_read()?.open_table(VALUES)?;
            let rows = table.iter()?.map(|row| {
                let (key, value) = row?;
                Ok((key.value().to_owned(), value.value().to_vec()))
            });
            Ok(rows.collect::<Result<_, StorageError>>()?)
        })
    }

    fn commit(&mut self, fence: Fence, batch: &Batch) -> Result<(), Error> {
        self.run(|database| {
            let write = database.begin_write()?;
            {
                let held = write.open_table(FENCE)?.get(())?.map_or(0, |fence| fence.value());
                if held != fence.0 {
                    return Err(Failure::Fenced);
                }
                let mut table = write.open_table(VALUES)?;
                for (key, value) in &batch.puts {
                    table.insert(key.as_str(), value.as_slice())?;
                }
                for key in &batch.deletes {
                    table.remove(key.as_str())?;
                }
            }
            write.commit()?;
            Ok(())
        })
    }
}
