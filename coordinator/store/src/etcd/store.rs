//! What the coordinator that leads writes, and what any may read.
//!
//! A commit is one transaction. It compares the leader's key, so that a deposed leader changes nothing, and the head,
//! so that none is applied twice, or late, after its answer was lost. Pieces of what is too large go before it, where
//! nobody looks; a batch that is too large for one transaction is committed as a journal, and then applied: whoever
//! reads while it is being applied reads it from the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, KeyValue, Txn, TxnOp};

use super::Etcd;
use super::batch::{Change, PIECE_BYTES_MAX, encode, groups};
use super::candidacy::gets;
use super::election::Term;
use super::endpoints::{Patience, Trouble};
use crate::{Batch, Error, Fence, Store};

/// Time for a commit: etcd itself gives up on a request after about seven seconds. The answer of one member may be lost.
const COMMIT: Patience = Patience { attempt: Duration::from_secs(2), all: Duration::from_secs(6) };
/// Reads that begin anew because etcd has compacted the history under them.
const READS_MAX: u32 = 3;
/// Transactions, and bytes, after which history is compacted. Nobody looks at what was.
const COMPACT_AFTER: (u32, usize) = (1000, 16 << 20);
/// Attempts at one commit that find that an earlier one, given up by then, was carried out after all.
const OVERTAKEN_MAX: u32 = 8;

/// Which commit was the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub fence: u64,
    pub commits: u64,
    pub attempt: u64,
}

impl Head {
    pub fn read(bytes: &[u8]) -> Result<Self, Trouble> {
        let text = String::from_utf8_lossy(bytes);
        let mut numbers = text.split(' ').map(str::parse::<u64>);
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(fence)), Some(Ok(commits)), Some(Ok(attempt)), None) => {
                Ok(Self { fence, commits, attempt })
            }
            _ => Err(Trouble::Lasting(format!(
                "the key head of this cluster in etcd is damaged: it holds {text:?}; restore etcd from a backup"
            ))),
        }
    }
}

impl Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.fence, self.commits, self.attempt)
    }
}

/// A batch that is committed, and being applied.
#[derive(Debug)]
pub(super) struct Journal {
    pub id: String,
    pub groups: Vec<Vec<Change>>,
}

/// A cluster's records in etcd. Made without a term it can only be read.
#[derive(Debug)]
pub struct EtcdStore {
    pub(super) etcd: Etcd,
    pub(super) term: Option<Term>,
    pub(super) head: Head,
    attempts: u64,
    pub(super) journal: Option<Journal>,
    /// Where the pieces of each large value are.
    pub(super) large: BTreeMap<String, String>,
    /// Prefixes of pieces that nobody needs.
    pub(super) orphans: BTreeSet<String>,
    /// Since history was compacted.
    written: (u32, usize),
}

/// What marks a value that is whole, and one of which only the place of its pieces is there.
pub(super) const WHOLE: u8 = b'=';
pub(super) const PIECES: u8 = b'@';

impl EtcdStore {
    /// What the leader of this term may write.
    pub fn lead(etcd: &Etcd, term: Term) -> Self {
        let head = term.head;
        Self { term: Some(term), head, ..Self::read_only(etcd) }
    }

    /// For reading alone.
    pub fn read_only(etcd: &Etcd) -> Self {
        Self {
            etcd: etcd.clone(),
            term: None,
            head: Head::default(),
            attempts: 0,
            journal: None,
            large: BTreeMap::new(),
            orphans: BTreeSet::new(),
            written: (0, 0),
        }
    }

    /// Of the last term that there was, once it was read.
    pub fn fence(&self) -> Fence {
        Fence(self.head.fence)
    }

    /// Commits so far, over all terms.
    pub fn commits(&self) -> u64 {
        self.head.commits
    }

    async fn write(&mut self, term: &Term, batch: &Batch) -> Result<(), Error> {
        self.finish(term).await?;
        let id = format!("{}-{}-{}", self.head.fence, self.head.commits, self.attempts);
        self.attempts += 1;
        let mut changes: Vec<Change> = Vec::new();
        let mut large: Vec<(String, Option<String>)> = Vec::new();
        for key in &batch.deletes {
            changes.push(Change::Delete(self.etcd.key(&format!("v/{key}"))));
            large.push((key.clone(), None));
        }
        for (number, (key, value)) in batch.puts.iter().enumerate() {
            let (stored, pieces) = if value.len() <= PIECE_BYTES_MAX {
                ([&[WHOLE], value.as_slice()].concat(), None)
            } else {
                let at = format!("{id}-{number}");
                self.stage(term, &format!("c/{at}/"), value).await?;
                ([&[PIECES], at.as_bytes()].concat(), Some(at))
            };
            changes.push(Change::Put(self.etcd.key(&format!("v/{key}")), stored));
            large.push((key.clone(), pieces));
        }
        // Pieces of what is replaced, and of what came to nothing; those just staged have a use now.
        let replaced = large.iter().filter_map(|(key, _)| self.large.get(key)).map(|at| format!("c/{at}/"));
        let fresh: BTreeSet<String> =
            large.iter().filter_map(|(_, at)| Some(format!("c/{}/", at.as_ref()?))).collect();
        let unused: BTreeSet<String> =
            self.orphans.iter().cloned().chain(replaced).filter(|prefix| !fresh.contains(prefix)).collect();
        changes.extend(unused.iter().map(|prefix| Change::DeleteAll(self.etcd.key(prefix))));

        let mut all = groups(changes);
        if all.len() <= 1 {
            self.switch(term, &all.pop().unwrap_or_default()).await?;
        } else {
            let prefix = format!("j/{id}/");
            for (number, group) in all.iter().enumerate() {
                self.stage_one(term, &prefix, number, &encode(group)).await?;
            }
            let pointer = Change::Put(self.etcd.key("journal"), format!("{id} {}", all.len()).into_bytes());
            self.switch(term, &[pointer]).await?;
            self.orphans.remove(&prefix);
            self.journal = Some(Journal { id, groups: all });
        }
        self.orphans.retain(|prefix| !unused.contains(prefix) && !fresh.contains(prefix));
        for (key, pieces) in large {
            match pieces {
                Some(at) => _ = self.large.insert(key, at),
                None => _ = self.large.remove(&key),
            }
        }
        // It is committed, whether it can be applied at once or not.
        self.finish(term).await.ok();
        self.compact();
        Ok(())
    }

    /// Applies what is committed as a journal.
    async fn finish(&mut self, term: &Term) -> Result<(), Error> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let (pointer, prefix) = (self.etcd.key("journal"), self.etcd.key(&format!("j/{}/", journal.id)));
        // Applied twice it is the same; and late, after a later commit, it finds the journal gone.
        let at = format!("{} {}", journal.id, journal.groups.len());
        let conditions = || {
            let mine = Compare::value(pointer.as_bytes(), CompareOp::Equal, at.as_bytes());
            vec![term.condition(), mine]
        };
        let last = [Change::Delete(pointer.clone()), Change::DeleteAll(prefix)];
        for group in journal.groups.iter().map(Vec::as_slice).chain([&last[..]]) {
            let txn = || {
                Txn::new()
                    .when(conditions())
                    .and_then(ops(group))
                    .or_else([TxnOp::get(term.key.as_bytes(), None), TxnOp::get(pointer.as_bytes(), None)])
            };
            let answer = self
                .etcd
                .endpoints()
                .call(COMMIT, |mut client| {
                    let txn = txn();
                    async move { client.txn(txn).await }
                })
                .await?;
            if !answer.succeeded() {
                let [leader, left] = gets(&answer);
                if !leads(term, &leader) {
                    return Err(Error::Fenced);
                }
                // Its end was carried out, and the answer lost.
                if left.is_empty() {
                    break;
                }
            }
        }
        self.journal = None;
        Ok(())
    }

    /// Writes the pieces of a value where nobody looks yet.
    async fn stage(&mut self, term: &Term, prefix: &str, value: &[u8]) -> Result<(), Error> {
        for (number, piece) in value.chunks(PIECE_BYTES_MAX).enumerate() {
            self.stage_one(term, prefix, number, piece).await?;
        }
        Ok(())
    }

    async fn stage_one(
        &mut self,
        term: &Term,
        prefix: &str,
        number: usize,
        piece: &[u8],
    ) -> Result<(), Error> {
        // Until something points there.
        self.orphans.insert(prefix.to_owned());
        self.written.1 += piece.len();
        let key = self.etcd.key(&format!("{prefix}{number:06}"));
        let staged = self
            .etcd
            .endpoints()
            .call(COMMIT, |mut client| {
                let put = TxnOp::put(key.as_bytes(), piece, None);
                let txn = Txn::new().when([term.condition()]).and_then([put]);
                async move { client.txn(txn).await }
            })
            .await?;
        if staged.succeeded() { Ok(()) } else { Err(Error::Fenced) }
    }

    /// The one transaction that makes a commit.
    async fn switch(&mut self, term: &Term, changes: &[Change]) -> Result<(), Error> {
        let head_key = self.etcd.key("head");
        for _ in 0..OVERTAKEN_MAX {
            if !term.is_held() {
                return Err(Error::Fenced);
            }
            let known = self.head;
            self.attempts += 1;
            let next = Head { fence: known.fence, commits: known.commits + 1, attempt: self.attempts };
            let answer = self
                .etcd
                .endpoints()
                .call(COMMIT, |mut client| {
                    let follows =
                        Compare::value(head_key.as_bytes(), CompareOp::Equal, known.to_string().into_bytes());
                    let mut all = ops(changes);
                    all.push(TxnOp::put(head_key.as_bytes(), next.to_string(), None));
                    let look = [&*term.key, &head_key].map(|key| TxnOp::get(key.as_bytes(), None));
                    let txn = Txn::new().when([term.condition(), follows]).and_then(all).or_else(look);
                    async move { client.txn(txn).await }
                })
                .await?;
            if answer.succeeded() {
                self.advance(term, next);
                return Ok(());
            }
            let [leader, found] = gets(&answer);
            if !leads(term, &leader) {
                return Err(Error::Fenced);
            }
            let found = found.first().map(|kv| Head::read(kv.value())).transpose()?.unwrap_or_default();
            if found == next {
                // Carried out at the first attempt, whose answer was lost.
                self.advance(term, next);
                return Ok(());
            }
            if found.fence > known.fence {
                return Err(Error::Fenced);
            }
            if (found.fence, found.commits) != (known.fence, known.commits + 1) {
                return Err(Error::Terminal(went_back(known.commits, found.commits)));
            }
            // One that was given up was carried out; this batch holds all that that one did.
            self.head = found;
        }
        Err(Error::Retryable("etcd carries out what was given up long ago".to_owned()))
    }

    fn advance(&mut self, term: &Term, head: Head) {
        self.head = head;
        self.written.0 += 1;
        term.commits.store(head.commits, std::sync::atomic::Ordering::Relaxed);
    }

    /// Lets etcd forget what was, without waiting for it.
    fn compact(&mut self) {
        if self.written.0 < COMPACT_AFTER.0 && self.written.1 < COMPACT_AFTER.1 {
            return;
        }
        self.written = (0, 0);
        let (etcd, key) = (self.etcd.clone(), self.etcd.key("head"));
        let Ok(runtime) = self.etcd.runtime() else { return };
        runtime.spawn(async move {
            let compacted = etcd.endpoints().call(COMMIT, |mut client| {
                let key = key.clone();
                async move {
                    let seen = client.get(key, None).await?;
                    match seen.header().map(etcd_client::ResponseHeader::revision) {
                        Some(revision) => client.compact(revision, None).await.map(|_| ()),
                        None => Ok(()),
                    }
                }
            });
            // Where it fails, the next one does it.
            compacted.await.ok();
        });
    }
}

fn ops(changes: &[Change]) -> Vec<TxnOp> {
    changes.iter().map(Change::op).collect()
}

fn leads(term: &Term, key: &[KeyValue]) -> bool {
    key.first().is_some_and(|kv| kv.create_revision() == term.create_revision)
}

/// That etcd was restored from a backup, and what to do about it.
pub fn went_back(seen: u64, found: u64) -> String {
    format!(
        "etcd has gone back to commit {found}, and commit {seen} was there: it was restored from a backup. What was \
         acknowledged since is lost, and generations would be given out twice. Restore a newer backup; or stop every \
         worker's ranks and start each coordinator once with --accept-restored-store to go on from this one"
    )
}

impl Store for EtcdStore {
    fn campaign(&mut self) -> Result<Fence, Error> {
        let term = self.term.as_ref().filter(|term| term.is_held()).ok_or(Error::Fenced)?;
        Ok(term.fence)
    }

    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let etcd = self.etcd.clone();
        let runtime = etcd.runtime()?;
        for _ in 1..READS_MAX {
            match runtime.block_on(self.read()) {
                Err(Trouble::Compacted) => {}
                read => return Ok(read?),
            }
        }
        Ok(runtime.block_on(self.read())?)
    }

    fn commit(&mut self, fence: Fence, batch: &Batch) -> Result<(), Error> {
        let term = self.term.clone().filter(|term| term.fence == fence).ok_or(Error::Fenced)?;
        let etcd = self.etcd.clone();
        etcd.runtime()?.block_on(self.write(&term, batch))
    }
}
