//! One suite over every store: what the driver relies on.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use muster_store::{
    Batch, Election, Error, Etcd, EtcdConfig, EtcdStore, Fence, MemoryStore, RedbStore, Store,
};

fn batch(puts: &[(&str, &str)], deletes: &[&str]) -> Batch {
    let mut batch = Batch::default();
    for (key, value) in puts {
        batch.put((*key).to_owned(), value.as_bytes().to_vec());
    }
    for key in deletes {
        batch.delete((*key).to_owned());
    }
    batch
}

fn contents(store: &mut dyn Store) -> Vec<(String, String)> {
    let rows = store.load().unwrap();
    rows.into_iter().map(|(key, value)| (key, String::from_utf8(value).unwrap())).collect()
}

/// The contract. `reopen` ends one life of the store and begins the next.
fn check(mut reopen: impl FnMut(Option<Box<dyn Store>>) -> Box<dyn Store>) {
    let mut store = reopen(None);
    let first = store.campaign().unwrap();
    assert!(contents(&mut *store).is_empty());

    store.commit(first, &batch(&[("a", "1"), ("b", "2"), ("c", "3")], &[])).unwrap();
    store.commit(first, &batch(&[("a", "9")], &["b", "never there"])).unwrap();
    let kept = vec![("a".to_owned(), "9".to_owned()), ("c".to_owned(), "3".to_owned())];
    assert_eq!(contents(&mut *store), kept, "committed changes are visible, in order of keys");

    let mut store = reopen(Some(store));
    assert_eq!(contents(&mut *store), kept, "and survive");

    let second = store.campaign().unwrap();
    assert!(second > first, "fences rise over restarts");
    let refused = store.commit(first, &batch(&[("a", "deposed")], &[]));
    assert!(matches!(refused, Err(Error::Fenced)), "{refused:?}");
    assert_eq!(contents(&mut *store), kept, "a deposed leader changes nothing");
    store.commit(second, &batch(&[], &["a", "c"])).unwrap();
    assert!(contents(&mut *store).is_empty());

    // More changes, and larger values, than some stores take at once; then half of each, and less.
    let large = |mark: u8, keys: usize| {
        let mut batch = Batch::default();
        for key in 0..keys {
            batch.put(format!("many/{key:04}"), vec![mark; 10]);
        }
        batch.put("large".to_owned(), vec![mark; 3 << 20]);
        batch
    };
    for (mark, keys) in [(b'x', 1000), (b'y', 500)] {
        let written = large(mark, keys);
        store.commit(second, &written).unwrap();
        let rows = store.load().unwrap();
        assert_eq!(rows.len(), 1001);
        let marked = rows.iter().filter(|(_, value)| value.iter().all(|byte| *byte == mark)).count();
        assert_eq!(marked, keys + 1);
        assert!(rows.iter().any(|(key, value)| key == "large" && value.len() == 3 << 20));
    }
    let mut store = reopen(Some(store));
    assert_eq!(store.load().unwrap().len(), 1001);
}

#[test]
fn memory_keeps_the_contract() {
    let shared = MemoryStore::default();
    check(|_| Box::new(shared.clone()));
}

#[test]
fn redb_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    check(|old| {
        drop(old);
        Box::new(RedbStore::open(&dir.path().join("store.redb")).unwrap())
    });
}

/// A lease long enough for a busy machine.
const LEASE: Duration = Duration::from_secs(5);

/// One life of a coordinator on etcd, which ends as if it was killed when it is dropped.
struct Life {
    store: EtcdStore,
    #[expect(dead_code, reason = "it is held, not read")]
    election: Election,
}

impl Life {
    fn begin(etcd: &muster_tests::Etcd, lease: Duration) -> Self {
        let etcd = Etcd::open(&EtcdConfig::parse(&etcd.url()).unwrap()).unwrap();
        let election = etcd.stand("http://here", lease, None);
        let term = election.wait(muster_tests::PATIENCE).unwrap();
        Self { store: EtcdStore::lead(&etcd, term), election }
    }
}

impl Store for Life {
    fn campaign(&mut self) -> Result<Fence, Error> {
        self.store.campaign()
    }

    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        self.store.load()
    }

    fn commit(&mut self, fence: Fence, batch: &Batch) -> Result<(), Error> {
        self.store.commit(fence, batch)
    }
}

/// An etcd to test with, or a word that there is none.
fn etcd(members: usize, what: &str) -> Option<muster_tests::Etcd> {
    let etcd = muster_tests::Etcd::start(members);
    if etcd.is_none() {
        muster_tests::skip(what, "there is no etcd here; `cargo xtask test` brings it where it can");
    }
    etcd
}

#[test]
fn etcd_keeps_the_contract() {
    let Some(etcd) = etcd(1, "the store's contract on etcd") else { return };
    check(|old| {
        drop(old);
        Box::new(Life::begin(&etcd, LEASE))
    });
}

#[test]
fn three_members_keep_the_contract_while_one_of_them_is_dead() {
    let Some(mut etcd) = etcd(3, "the store's contract on three members of etcd") else { return };
    etcd.kill(0);
    etcd.wait();
    check(|old| {
        drop(old);
        Box::new(Life::begin(&etcd, LEASE))
    });
}

#[test]
fn a_second_process_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let _held = RedbStore::open(&path).unwrap();
    let error = RedbStore::open(&path).unwrap_err().to_string();
    assert!(error.contains("in use by another coordinator"), "{error}");
}

fn filled(path: &Path) {
    let mut store = RedbStore::open(path).unwrap();
    let fence = store.campaign().unwrap();
    for i in 0..20 {
        store.commit(fence, &batch(&[(&format!("job/{i:03}"), &"x".repeat(500))], &[])).unwrap();
    }
}

/// Cut at many places, the file is recovered to a prefix of what was committed, or refused; never wrong,
/// never a panic.
#[test]
fn a_torn_file_is_recovered_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.redb");
    filled(&whole);
    let bytes = std::fs::read(&whole).unwrap();
    let mut outcomes = (0, 0);
    for cut in (0..bytes.len()).step_by(bytes.len() / 200 + 1) {
        let path = dir.path().join("torn.redb");
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let opened = RedbStore::open(&path).and_then(|mut store| {
            store.campaign()?;
            store.load()
        });
        match opened {
            Ok(rows) => {
                assert!(
                    rows.iter().all(|(_, value)| value.iter().all(|b| *b == b'x')),
                    "wrong bytes at {cut}"
                );
                assert!(rows.len() == 20, "cut at {cut} of {}: {} rows", bytes.len(), rows.len());
                outcomes.0 += 1;
            }
            Err(Error::Terminal(why)) => {
                assert!(why.contains("damaged"), "{why}");
                outcomes.1 += 1;
            }
            Err(error) => panic!("cut at {cut}: {error}"),
        }
    }
    assert!(outcomes.1 > 0, "no cut was noticed: {outcomes:?}");
}
