//! Durable control state: one trait, [`Store`], over redb (the embedded default), etcd (several coordinators) and memory.
//!
//! A store holds bytes under keys and knows nothing of jobs. It never holds metrics or logs. A batch is durable
//! whole or not at all once [`Store::commit`] returns, and only the holder of the newest [`Fence`] can commit.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

mod clock;
mod etcd;
mod memory;
mod redb_store;

use std::collections::{BTreeMap, BTreeSet};

pub use etcd::{Election, Etcd, EtcdConfig, EtcdStore, Floor, Standing, Term, View, went_back};
pub use memory::MemoryStore;
pub use redb_store::RedbStore;

/// Proof of leadership: rises with each [`Store::campaign`]; commits with an older one are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(pub u64);

/// Changes that become durable together. A key is in one of the two sets at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    puts: BTreeMap<String, Vec<u8>>,
    deletes: BTreeSet<String>,
}

impl Batch {
    /// Puts a value; a later change of the same key wins.
    pub fn put(&mut self, key: String, value: Vec<u8>) {
        self.deletes.remove(&key);
        self.puts.insert(key, value);
    }

    /// Removes a key.
    pub fn delete(&mut self, key: String) {
        self.puts.remove(&key);
        self.deletes.insert(key);
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty()
    }

    /// Adds the changes of a later batch.
    pub fn append(&mut self, later: Self) {
        for (key, value) in later.puts {
            self.put(key, value);
        }
        for key in later.deletes {
            self.delete(key);
        }
    }
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another coordinator leads now; this one must stop.
    #[error("this coordinator no longer leads: another one has taken over the store")]
    Fenced,
    /// The same call may succeed later. Nothing of it is acknowledged; it may be there all the same if its answer was
    /// lost, and a batch that holds it again, or its successors, does not mind.
    #[error("the store cannot be written for now: {0}")]
    Retryable(String),
    /// Nothing but a person can mend it; the coordinator must stop.
    #[error("{0}")]
    Terminal(String),
}

/// Durable bytes under keys. Calls block; the driver makes them off its own thread.
pub trait Store: Send {
    /// Takes leadership: every older fence is refused from here on, across restarts.
    fn campaign(&mut self) -> Result<Fence, Error>;
    /// Everything there is, by key.
    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, Error>;
    /// Makes a batch durable, all or none.
    fn commit(&mut self, fence: Fence, batch: &Batch) -> Result<(), Error>;
}
