//! What the coordinator that leads writes, and what any may read.
//!
//! A commit is one transaction. It compares the leader's key, so that a deposed leader changes nothing, and the head,
//! so that none is applied twice, or late, after its answer was lost. Pieces of what is too large go before it, where
//! nobody looks; a batch that is too large for one transaction is committed as a journal, and then applied: whoever
//! reads while it is being applied reads it from the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp};

use super::Etcd;
use super::batch::{Change, PIECE_BYTES_MAX, decode, encode, groups};
use super::election::{Term, gets};
use super::endpoints::{Patience, Trouble};
use crate::{Batch, Error, Fence, Store};

/// Time for a commit: etcd itself gives up on a request after about seven seconds. The answer of one member may be lost.
const COMMIT: Patience = Patience { attempt: Duration::from_secs(2), all: Duration::from_secs(6) };
/// Time for one page of what is read.
const READ: Patience = Patience { attempt: Duration::from_secs(5), all: Duration::from_secs(20) };
/// Keys of a page at first; halved where they hold too much.
const PAGE_KEYS_MAX: i64 = 4096;
/// Bytes of a page: more than a page of usual records, and one of the largest values of its size.
const PAGE_BYTES_MAX: usize = 64 << 20;
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
struct Journal {
    id: String,
    groups: Vec<Vec<Change>>,
}

/// A cluster's records in etcd. Made without a term it can only be read.
#[derive(Debug)]
pub struct EtcdStore {
    etcd: Etcd,
    term: Option<Term>,
    head: Head,
    attempts: u64,
    journal: Option<Journal>,
    /// Where the pieces of each large value are.
    large: BTreeMap<String, String>,
    /// Prefixes of pieces that nobody needs.
    orphans: BTreeSet<String>,
    /// Since history was compacted.
    written: (u32, usize),
}

/// What marks a value that is whole, and one of which only the place of its pieces is there.
const WHOLE: u8 = b'=';
const PIECES: u8 = b'@';

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

    /// Every key with this prefix as of a revision (0 is now), without the prefix; and that revision.
    async fn all(&self, prefix: &str, revision: i64) -> Result<(Vec<(String, Vec<u8>)>, i64), Trouble> {
        let prefix = self.etcd.key(prefix);
        let (mut from, mut revision, mut limit) = (prefix.clone().into_bytes(), revision, PAGE_KEYS_MAX);
        let end = [&prefix.as_bytes()[..prefix.len() - 1], b"0"].concat();
        let mut rows = Vec::new();
        loop {
            let page = self.etcd.endpoints().call(READ, |client| {
                let options =
                    GetOptions::new().with_range(end.clone()).with_limit(limit).with_revision(revision);
                let from = from.clone();
                let mut kv = client.kv_client().max_decoding_message_size(PAGE_BYTES_MAX);
                async move { kv.get(from, Some(options)).await }
            });
            let mut page = match page.await {
                Ok(page) => page,
                Err(Trouble::TooLarge) if limit > 1 => {
                    limit /= 2;
                    continue;
                }
                Err(trouble) => return Err(trouble),
            };
            if revision == 0 {
                revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            let more = page.more();
            for kv in page.take_kvs() {
                let (key, value) = kv.into_key_value();
                let name = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
                from = key;
                rows.push((name, value));
            }
            if !more {
                return Ok((rows, revision));
            }
            // The next key that there can be.
            from.push(0);
        }
    }

    async fn read(&mut self) -> Result<Vec<(String, Vec<u8>)>, Trouble> {
        let (values, revision) = self.all("v/", 0).await?;
        let (pieces, _) = self.all("c/", revision).await?;
        let mut pieces: BTreeMap<String, Vec<u8>> = pieces.into_iter().collect();
        let (journals, _) = self.all("j/", revision).await?;
        let pointers = [self.one("journal", revision).await?, self.one("head", revision).await?];
        let [pointer, head] = pointers;
        if let Some(head) = head {
            let found = Head::read(&head)?;
            if self.term.is_some() && (found.fence, found.commits) < (self.head.fence, self.head.commits) {
                return Err(Trouble::Lasting(went_back(self.head.commits, found.commits)));
            }
            self.head = found;
        }
        let mut values: BTreeMap<String, Vec<u8>> = values.into_iter().collect();
        self.journal = None;
        if let Some(pointer) = pointer {
            let journal = journal(&pointer, &journals)?;
            let ours = |key: &str, part: &str| Some(key.strip_prefix(&self.etcd.key(part))?.to_owned());
            for change in journal.groups.iter().flatten() {
                match change {
                    Change::Put(key, value) => {
                        ours(key, "v/").map(|key| values.insert(key, value.clone()));
                    }
                    Change::Delete(key) => _ = ours(key, "v/").map(|key| values.remove(&key)),
                    Change::DeleteAll(prefix) => {
                        if let Some(prefix) = ours(prefix, "c/") {
                            pieces.retain(|key, _| !key.starts_with(&prefix));
                        }
                    }
                }
            }
            self.journal = Some(journal);
        }
        self.large.clear();
        let mut rows = Vec::with_capacity(values.len());
        for (key, stored) in values {
            let value = match stored.split_first() {
                Some((&WHOLE, value)) => value.to_vec(),
                Some((&PIECES, at)) => {
                    let at = String::from_utf8_lossy(at).into_owned();
                    let of = format!("{at}/");
                    let own = pieces.range(of.clone()..).take_while(|(piece, _)| piece.starts_with(&of));
                    let value = own.map(|(_, piece)| piece.as_slice()).collect::<Vec<_>>().concat();
                    self.large.insert(key.clone(), at);
                    value
                }
                Some(_) | None => return Err(damaged(&format!("v/{key}"))),
            };
            rows.push((key, value));
        }
        let used: BTreeSet<&String> = self.large.values().collect();
        let unused = pieces.keys().filter_map(|piece| piece.rsplit_once('/')).map(|(at, _)| at.to_owned());
        self.orphans = unused.filter(|at| !used.contains(at)).map(|at| format!("c/{at}/")).collect();
        let of_journal = self.journal.as_ref().map(|journal| journal.id.clone());
        let staged =
            journals.iter().filter_map(|(piece, _)| piece.rsplit_once('/')).map(|(id, _)| id.to_owned());
        self.orphans.extend(staged.filter(|id| Some(id) != of_journal.as_ref()).map(|id| format!("j/{id}/")));
        Ok(rows)
    }

    async fn one(&self, key: &str, revision: i64) -> Result<Option<Vec<u8>>, Trouble> {
        let key = self.etcd.key(key);
        let answer = self.etcd.endpoints().call(READ, |mut client| {
            let (key, options) = (key.clone(), GetOptions::new().with_revision(revision));
            async move { client.get(key, Some(options)).await }
        });
        Ok(answer.await?.kvs().first().map(|kv| kv.value().to_vec()))
    }
}

fn ops(changes: &[Change]) -> Vec<TxnOp> {
    changes.iter().map(Change::op).collect()
}

fn leads(term: &Term, key: &[KeyValue]) -> bool {
    key.first().is_some_and(|kv| kv.create_revision() == term.create_revision)
}

fn journal(pointer: &[u8], pieces: &[(String, Vec<u8>)]) -> Result<Journal, Trouble> {
    let text = String::from_utf8_lossy(pointer);
    let parts = text.split_once(' ').and_then(|(id, count)| Some((id, count.parse::<usize>().ok()?)));
    let (id, count) = parts.ok_or_else(|| damaged("journal"))?;
    let of = format!("{id}/");
    let own = pieces.iter().filter(|(key, _)| key.starts_with(&of));
    let groups: Option<Vec<Vec<Change>>> = own.map(|(_, bytes)| decode(bytes)).collect();
    let groups = groups.filter(|groups| groups.len() == count).ok_or_else(|| damaged("journal"))?;
    Ok(Journal { id: id.to_owned(), groups })
}

fn damaged(key: &str) -> Trouble {
    Trouble::Lasting(format!(
        "what etcd holds of this cluster under {key} is damaged; restore etcd from a backup, or give --store another \
         cluster name to begin with an empty one"
    ))
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
