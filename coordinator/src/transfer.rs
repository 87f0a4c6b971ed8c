//! `muster store export` and `import`: a cluster's records as a file, from one kind of store into another.
//!
//! The file has a line of JSON for each record between a first one, which says what it is, and a last one, which says how
//! many there are and what their checksum is. Nothing is written before the whole file was checked, and what was written
//! is read again.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Duration;

use muster_core::access::hex;
use muster_store::{
    Batch, Election, Error as StoreError, Etcd, EtcdStore, Fence, Floor, MemoryStore, RedbStore, Store,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, StoreKind, persist};

/// Version of the file.
const FORMAT: u32 = 1;
/// Records of one commit, so that a large store need not be in one.
const COMMIT_RECORDS: usize = 4096;
/// How long an election may take where no coordinator runs.
const ELECTION_MAX: Duration = Duration::from_secs(15);
const LEASE: Duration = Duration::from_secs(10);

type Rows = Vec<(String, Vec<u8>)>;

/// What was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Records.
    pub records: usize,
    /// Those of them that are jobs.
    pub jobs: usize,
    /// Those of them that are nodes.
    pub nodes: usize,
}

impl Moved {
    fn of(rows: &Rows) -> Self {
        let count = |prefix: &str| rows.iter().filter(|(key, _)| key.starts_with(prefix)).count();
        Self { records: rows.len(), jobs: count("job/"), nodes: count("node/") }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct First {
    muster_store: u32,
    /// The number of the last time of leading: the next one is higher, wherever the cluster is moved.
    term: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    key: String,
    value: Box<serde_json::value::RawValue>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Last {
    records: usize,
    sha256: String,
}

/// Writes everything that a store holds. It may be in use if it is etcd.
pub fn export(kind: &StoreKind, data_dir: &Path, to: &mut impl Write) -> Result<Moved, Error> {
    let (rows, term) = match kind {
        StoreKind::Redb => {
            let path = data_dir.join("store.redb");
            if !path.is_file() {
                return Err(Error::Decode(format!(
                    "there is none at {}; name its --data-dir",
                    path.display()
                )));
            }
            let mut store = RedbStore::open(&path)?;
            (store.load()?, store.fence()?.0)
        }
        StoreKind::Etcd(config) => {
            let mut store = EtcdStore::read_only(&Etcd::open(config)?);
            (store.load()?, store.fence().0)
        }
        StoreKind::Memory => return Err(Error::Decode("memory is gone with its process".to_owned())),
    };
    check(&rows)?;
    let failed = |error: std::io::Error| Error::Transfer(format!("failed to write: {error}"));
    let mut digest = Sha256::new();
    let mut line = |text: String, counts: bool| {
        if counts {
            digest.update(text.as_bytes());
        }
        writeln!(to, "{text}")
    };
    line(json(&First { muster_store: FORMAT, term })?, false).map_err(failed)?;
    for (key, value) in &rows {
        let value = std::str::from_utf8(value)
            .ok()
            .and_then(|text| serde_json::value::RawValue::from_string(text.to_owned()).ok());
        let value = value.ok_or_else(|| Error::Decode(format!("the record {key:?} is not valid")))?;
        line(json(&Record { key: key.clone(), value })?, true).map_err(failed)?;
    }
    let sha256 = hex(&digest.finalize());
    writeln!(to, "{}", json(&Last { records: rows.len(), sha256 })?)
        .and_then(|()| to.flush())
        .map_err(failed)?;
    Ok(Moved::of(&rows))
}

/// Puts what such a file holds into a store that is empty, and reads it again.
pub fn import(kind: &StoreKind, data_dir: &Path, from: &mut impl BufRead) -> Result<Moved, Error> {
    let (rows, term) = read(from)?;
    check(&rows)?;
    let (mut store, _held): (Box<dyn Store>, Option<Election>) = match kind {
        StoreKind::Redb => {
            std::fs::create_dir_all(data_dir)
                .map_err(|source| Error::DataDir { path: data_dir.to_owned(), source })?;
            let mut store = RedbStore::open(&data_dir.join("store.redb"))?;
            store.raise(Fence(term))?;
            (Box::new(store), None)
        }
        StoreKind::Etcd(config) => {
            let etcd = Etcd::open(config)?;
            let floor = Some(Floor { place: None, fence: Fence(term) });
            let election = etcd.stand(&format!("import {}", uuid::Uuid::new_v4()), LEASE, floor);
            let term = election.wait(ELECTION_MAX).map_err(|error| match error {
                StoreError::Retryable(why) => {
                    Error::Transfer(format!("{why}; stop every coordinator of that cluster first"))
                }
                error @ (StoreError::Fenced | StoreError::Terminal(_)) => error.into(),
            })?;
            (Box::new(EtcdStore::lead(&etcd, term)), Some(election))
        }
        StoreKind::Memory => return Err(Error::Decode("memory is gone with its process".to_owned())),
    };
    let there = store.load()?.len();
    if there > 0 {
        return Err(Error::Transfer(format!(
            "the store holds {there} records already; import into an empty one: another --data-dir, or another cluster \
             name in etcd"
        )));
    }
    let fence = store.campaign()?;
    for part in rows.chunks(COMMIT_RECORDS) {
        let mut batch = Batch::default();
        for (key, value) in part {
            batch.put(key.clone(), value.clone());
        }
        store.commit(fence, &batch)?;
    }
    if store.load()? != rows {
        return Err(Error::Transfer(
            "what was written is not what is read; do not use this store".to_owned(),
        ));
    }
    Ok(Moved::of(&rows))
}

/// Whether a coordinator of this version would take these records.
fn check(rows: &Rows) -> Result<(), Error> {
    let mut store = MemoryStore::default();
    let fence = store.campaign()?;
    let mut batch = Batch::default();
    for (key, value) in rows {
        batch.put(key.clone(), value.clone());
    }
    store.commit(fence, &batch)?;
    persist::load(&mut store).map(|_| ())
}

fn read(from: &mut impl BufRead) -> Result<(Rows, u64), Error> {
    let damaged = |why: &str| Error::Transfer(format!("the file is no whole export: {why}"));
    let mut lines = from.lines().map(|line| line.map_err(|error| damaged(&error.to_string())));
    let first: First = (lines.next().transpose()?)
        .and_then(|line| serde_json::from_str(&line).ok())
        .ok_or_else(|| damaged("it does not begin as one"))?;
    if first.muster_store != FORMAT {
        return Err(Error::Transfer(format!(
            "the file has format {}, and this version knows {FORMAT}; use the version that wrote it, or a newer one",
            first.muster_store
        )));
    }
    let (mut rows, mut digest) = (Rows::new(), Sha256::new());
    for line in lines {
        let line = line?;
        if let Ok(record) = serde_json::from_str::<Record>(&line) {
            digest.update(line.as_bytes());
            rows.push((record.key, record.value.get().as_bytes().to_vec()));
            continue;
        }
        let last: Last = serde_json::from_str(&line).map_err(|_| damaged("a line is not whole"))?;
        if last.records != rows.len() || last.sha256 != hex(&digest.finalize()) {
            return Err(damaged("its checksum is not that of its records"));
        }
        return Ok((rows, first.term));
    }
    Err(damaged("its end is missing"))
}

fn json(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Transfer(format!("failed to write: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(dir: &Path) {
        let mut store = RedbStore::open(&dir.join("store.redb")).unwrap();
        let fence = store.campaign().unwrap();
        let mut batch = Batch::default();
        batch.put("schema".to_owned(), b"1".to_vec());
        store.commit(fence, &batch).unwrap();
    }

    #[test]
    fn a_store_comes_back_whole_or_not_at_all() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        filled(from.path());
        let mut file = Vec::new();
        let moved = export(&StoreKind::Redb, from.path(), &mut file).unwrap();
        assert_eq!(moved, Moved { records: 1, jobs: 0, nodes: 0 });
        for cut in [0, 10, file.len() / 2, file.len() - 2] {
            let error = import(&StoreKind::Redb, to.path(), &mut &file[..cut]).unwrap_err().to_string();
            assert!(error.contains("no whole export"), "{error}");
        }
        let changed = String::from_utf8(file.clone()).unwrap().replace(":1}\n{\"records", ":2}\n{\"records");
        assert_ne!(changed.as_bytes(), file);
        assert!(import(&StoreKind::Redb, to.path(), &mut changed.as_bytes()).is_err());
        import(&StoreKind::Redb, to.path(), &mut file.as_slice()).unwrap();
        let mut store = RedbStore::open(&to.path().join("store.redb")).unwrap();
        assert!(store.fence().unwrap() > Fence(1), "the next term is above those that there were");
        drop(store);
        let twice = import(&StoreKind::Redb, to.path(), &mut file.as_slice()).unwrap_err().to_string();
        assert!(twice.contains("holds 1 records already"), "{twice}");
    }

    #[test]
    fn records_of_a_newer_version_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let rows = [r#"{"muster_store":1,"term":1}"#, r#"{"key":"schema","value":99}"#];
        let digest = hex(&Sha256::digest(rows[1].as_bytes()));
        let file = format!("{}\n{}\n{{\"records\":1,\"sha256\":\"{digest}\"}}\n", rows[0], rows[1]);
        let error = import(&StoreKind::Redb, dir.path(), &mut file.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("schema 99"), "{error}");
    }
}
