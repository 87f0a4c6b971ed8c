//! Reading a cluster's records from etcd, as of one revision, whoever leads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::GetOptions;

use super::batch::{Change, decode};
use super::endpoints::{Patience, Trouble};
use super::store::{EtcdStore, Head, Journal, PIECES, WHOLE, went_back};

/// Time for one page of what is read.
const READ: Patience = Patience { attempt: Duration::from_secs(5), all: Duration::from_secs(20) };
/// Keys of a page at first; halved where they hold too much.
const PAGE_KEYS_MAX: i64 = 4096;
/// Bytes of a page: more than a page of usual records, and one of the largest values of its size.
const PAGE_BYTES_MAX: usize = 64 << 20;

impl EtcdStore {
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

    pub(super) async fn read(&mut self) -> Result<Vec<(String, Vec<u8>)>, Trouble> {
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
