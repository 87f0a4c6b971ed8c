//! What goes wrong with a real etcd, and what the store makes of it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use muster_store::{Batch, Election, Error, Etcd, EtcdConfig, EtcdStore, Standing, Store, Term};
use muster_tests::{PATIENCE, eventually, skip};
use nix::sys::signal::Signal;

const LEASE: Duration = Duration::from_secs(30);

struct Leader {
    etcd: Etcd,
    election: Election,
    term: Term,
    store: EtcdStore,
}

fn config(etcd: &muster_tests::Etcd) -> EtcdConfig {
    EtcdConfig::parse(&etcd.url()).unwrap()
}

fn lead(config: &EtcdConfig, lease: Duration) -> Leader {
    let etcd = Etcd::open(config).unwrap();
    let election = etcd.stand("http://here", lease, None);
    let term = election.wait(PATIENCE).unwrap();
    let store = EtcdStore::lead(&etcd, term.clone());
    Leader { etcd, election, term, store }
}

impl Leader {
    fn put(&mut self, key: &str, value: &[u8]) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.put(key.to_owned(), value.to_vec());
        self.store.commit(self.term.fence, &batch)
    }

    fn keys(&self) -> Vec<String> {
        let rows = EtcdStore::read_only(&self.etcd).load().unwrap();
        rows.into_iter().map(|(key, _)| key).collect()
    }
}

/// An etcd with these flags, or a word that there is none.
fn etcd(members: usize, flags: &[&str]) -> Option<muster_tests::Etcd> {
    let etcd = muster_tests::Etcd::start_with(members, flags);
    if etcd.is_none() {
        skip("the store on etcd", "there is no etcd here; `cargo xtask test` brings it where it can");
    }
    etcd
}

#[test]
fn a_leader_whose_lease_is_gone_writes_nothing_more_and_the_next_one_goes_on() {
    let Some(etcd) = etcd(1, &[]) else { return };
    let mut old = lead(&config(&etcd), LEASE);
    old.put("a", b"1").unwrap();
    let leases = etcd.ctl(&["lease", "list"]).ok();
    let lease = leases.lines().last().unwrap();
    let mut standing = old.election.standing();
    standing.mark_unchanged();
    etcd.ctl(&["lease", "revoke", lease]).ok();
    assert!(matches!(old.put("a", b"2"), Err(Error::Fenced)));
    old.election.give_up(old.term.fence);
    eventually("its stepping down", || if old.term.is_held() { Err(()) } else { Ok(()) });
    // It stands again, and is the only one.
    let term = old.election.wait(PATIENCE).unwrap();
    assert!(term.fence > old.term.fence);
    let mut new = EtcdStore::lead(&old.etcd, term);
    assert_eq!(new.load().unwrap(), [("a".to_owned(), b"1".to_vec())]);
}

#[test]
fn the_next_one_leads_as_soon_as_one_resigns() {
    let Some(etcd) = etcd(1, &[]) else { return };
    let first = lead(&config(&etcd), LEASE);
    let second = Etcd::open(&config(&etcd)).unwrap();
    let election = second.stand("http://there", LEASE, None);
    let seen = eventually("the leader's address", || match &*election.standing().borrow() {
        Standing::Following(view) if view.candidates == 2 => Ok(view.clone()),
        other => Err(format!("{other:?}")),
    });
    assert_eq!(seen.leader.as_deref(), Some("http://here"));
    drop(first);
    // Far below the lease.
    assert_eq!(election.wait(LEASE / 3).unwrap().fence.0, 2);
}

#[test]
fn without_a_quorum_nothing_is_written_until_it_is_back() {
    let Some(mut etcd) = etcd(3, &[]) else { return };
    let mut leader = lead(&config(&etcd), LEASE);
    leader.put("a", b"1").unwrap();
    etcd.kill(0);
    etcd.kill(1);
    let refused = leader.put("b", b"2");
    assert!(matches!(&refused, Err(Error::Retryable(why)) if why.contains("etcd")), "{refused:?}");
    etcd.restart(0);
    etcd.wait();
    leader.put("b", b"3").unwrap();
    assert_eq!(leader.keys(), ["a", "b"]);
}

#[test]
fn what_was_committed_is_there_whichever_member_hangs() {
    let Some(etcd) = etcd(3, &[]) else { return };
    let mut leader = lead(&config(&etcd), LEASE);
    let mut kept = Vec::new();
    for round in 0..9 {
        etcd.signal(round % 3, Signal::SIGSTOP);
        // The first answers are lost; what they answered may have been carried out.
        for nth in 0..3 {
            let key = format!("{round}-{nth}");
            let done = eventually("a commit", || match leader.put(&key, key.as_bytes()) {
                Err(Error::Retryable(why)) => Err(why),
                done => Ok(done),
            });
            done.unwrap();
            kept.push(key);
        }
        etcd.signal(round % 3, Signal::SIGCONT);
    }
    assert_eq!(leader.keys(), kept);
}

#[test]
fn a_full_etcd_says_what_to_do_and_goes_on_when_it_is_done() {
    let Some(etcd) = etcd(1, &["--quota-backend-bytes", "16777216"]) else { return };
    let mut leader = lead(&config(&etcd), LEASE);
    let value = vec![b'x'; 256 << 10];
    let full = (0..200).find_map(|i| leader.put(&format!("{}", i % 3), &value).err()).unwrap();
    assert!(matches!(&full, Error::Retryable(why) if why.contains("etcdctl alarm disarm")), "{full}");
    let status = etcd.ctl(&["endpoint", "status", "--write-out", "json"]).json().remove(0);
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    etcd.ctl(&["compact", &revision, "--physical"]).ok();
    etcd.ctl(&["defrag"]).ok();
    etcd.ctl(&["alarm", "disarm"]).ok();
    leader.put("after", b"1").unwrap();
}

#[test]
fn a_restored_backup_is_noticed() {
    let Some(mut etcd) = etcd(1, &[]) else { return };
    let mut leader = lead(&config(&etcd), LEASE);
    leader.put("a", b"1").unwrap();
    let backup = etcd.path("backup");
    etcd.ctl(&["snapshot", "save", &backup]).ok();
    leader.put("a", b"2").unwrap();
    leader.put("a", b"3").unwrap();
    etcd.restore(&backup);
    let refused = eventually("an answer", || match leader.put("a", b"4") {
        Err(Error::Retryable(why)) => Err(why),
        answer => Ok(answer),
    });
    assert!(
        matches!(&refused, Err(Error::Terminal(why)) if why.contains("restored from a backup")),
        "{refused:?}"
    );
}

#[test]
fn a_wrong_password_is_refused_in_words_and_the_right_one_works() {
    let Some(etcd) = etcd(1, &[]) else { return };
    for words in ["user add root:secret", "role add root", "user grant-role root root", "auth enable"] {
        etcd.ctl(&words.split(' ').collect::<Vec<_>>()).ok();
    }
    let dir = tempfile::tempdir().unwrap();
    let with = |password: &str| {
        let file = dir.path().join(password);
        std::fs::write(&file, format!("{password}\n")).unwrap();
        EtcdConfig { user: Some(("root".to_owned(), file)), ..config(&etcd) }
    };
    let wrong = Etcd::open(&with("guess")).unwrap().stand("http://here", LEASE, None);
    let why = wrong.wait(PATIENCE).unwrap_err();
    assert!(matches!(&why, Error::Terminal(why) if why.contains("--etcd-password-file")), "{why}");
    let nobody = Etcd::open(&config(&etcd)).unwrap().stand("http://here", LEASE, None);
    assert!(matches!(nobody.wait(PATIENCE), Err(Error::Terminal(_))));
    let mut leader = lead(&with("secret"), LEASE);
    leader.put("a", b"1").unwrap();
    assert_eq!(leader.keys(), ["a"]);
}
