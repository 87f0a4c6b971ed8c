//! Who is there, and who waits for what: for people who look at a start that does not get on.
//!
//! A store does not know ranks: its clients say only what they want of which key. Two things name them all the same.
//! Clients ping with the id of their process, by which the node that started it knows its rank. And the keys at which
//! the ranks of the world group find each other end in a rank: who sets one is that rank, and who waits for one waits
//! for that rank.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use crate::store::{Store, Waiting, shown};

/// At this key every client counts itself when it connects, if it was told the size of its world.
const JOINED_KEY: &[u8] = b"init/";
/// Keys of one wait that are shown.
pub(crate) const KEYS_SHOWN_MAX: usize = 4;

/// A store at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Its connections, the oldest first. A rank may have several.
    pub clients: Vec<ClientView>,
    /// How often a rank has joined: each does so once for each store that it opens with the size of its world.
    pub joined: u64,
    /// Keys with a value.
    pub keys: usize,
    /// What is held, in bytes; see [`crate::Limits::held_bytes_max`].
    pub held_bytes: usize,
    /// Connections that were refused.
    pub refused: u64,
}

/// One connection.
#[derive(Clone, Debug)]
pub struct ClientView {
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Its process, as it says itself, in its own process namespace. None before its first ping.
    pub process: Option<u32>,
    /// Its rank, once it has set a key that names it.
    pub rank: Option<u32>,
    /// How long it has been connected.
    pub connected: Duration,
    /// Requests so far.
    pub requests: u64,
    /// What it waits for now.
    pub wait: Option<WaitView>,
}

/// What a connection waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitView {
    /// The first few of the keys that have not come, as people read them.
    pub keys: Vec<String>,
    /// How many have not.
    pub keys_total: usize,
    /// The rank that sets the first of them, where the key says so.
    pub rank: Option<u32>,
    /// For how long.
    pub waited: Duration,
}

impl Snapshot {
    /// The ranks that have set a key which names them.
    pub fn ranks(&self) -> BTreeSet<u32> {
        self.clients.iter().filter_map(|client| client.rank).collect()
    }

    /// How many wait for each key, and for how long the first of them has; only the first key of each wait counts.
    pub fn awaited(&self) -> BTreeMap<&str, (usize, Duration)> {
        let mut awaited = BTreeMap::new();
        for wait in self.clients.iter().filter_map(|client| client.wait.as_ref()) {
            if let Some(key) = wait.keys.first() {
                let (count, longest) = awaited.entry(key.as_str()).or_insert((0, Duration::ZERO));
                (*count, *longest) = (*count + 1, wait.waited.max(*longest));
            }
        }
        awaited
    }

    /// The ranks that others wait for.
    pub fn awaited_ranks(&self) -> BTreeSet<u32> {
        self.clients.iter().filter_map(|client| client.wait.as_ref()?.rank).collect()
    }
}

impl fmt::Display for ClientView {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rank) = self.rank {
            write!(out, "rank {rank} at ")?;
        }
        write!(out, "{}", self.peer)?;
        if let Some(process) = self.process {
            write!(out, " (process {process})")?;
        }
        if let Some(wait) = &self.wait {
            write!(out, " waits for {wait}")?;
        }
        Ok(())
    }
}

impl fmt::Display for WaitView {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.keys.join(", "))?;
        let more = self.keys_total.saturating_sub(self.keys.len());
        if more > 0 {
            write!(out, " and {more} more")?;
        }
        if let Some(rank) = self.rank {
            write!(out, ", which rank {rank} sets,")?;
        }
        write!(out, " for {} s", self.waited.as_secs())
    }
}

impl WaitView {
    pub(crate) fn new(waiting: &Waiting<'_>, now: Duration) -> Self {
        Self {
            keys: waiting.keys.iter().map(|key| shown(key)).collect(),
            keys_total: waiting.missing,
            rank: waiting.keys.first().and_then(|key| rank_in(key)),
            waited: now.saturating_sub(waiting.since),
        }
    }
}

/// How often a rank has joined.
pub(crate) fn joined(store: &Store) -> u64 {
    let value = store.get(JOINED_KEY);
    value.and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok()).unwrap_or(0)
}

/// The rank of the world group that a key is of. Gloo's ranks leave their addresses at
/// `default_pg/0//cpu//<communicator>/<rank>` in Python, and at `muster_ddp/<job>.<generation>/group_<n>/cpu/<communicator>/<rank>` in
/// muster-ddp. The ranks of other groups are counted from 0 too and say nothing.
pub(crate) fn rank_in(key: &[u8]) -> Option<u32> {
    let key = std::str::from_utf8(key).ok()?;
    let mut parts = key.split('/').filter(|part| !part.is_empty());
    match (parts.next()?, parts.next()?) {
        ("default_pg", "0") => {}
        ("muster_ddp", _gang) if parts.next()?.starts_with("group_") => {}
        _ => return None,
    }
    let (kind, communicator, rank) = (parts.next()?, parts.next()?, parts.next()?);
    let is_it = kind == "cpu" && communicator.parse::<u32>().is_ok() && parts.next().is_none();
    rank.parse().ok().filter(|_| is_it)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_of_the_world_group_name_a_rank() {
        let table = [
            ("/default_pg/0//cpu//0/2", Some(2)),
            ("/default_pg/0//cpu//0/511", Some(511)),
            ("/muster_ddp/job.2/group_0/cpu/0/3", Some(3)),
            // Another group, another kind, and what only looks like it.
            ("/default_pg/0//1//cpu//0/1", None),
            ("/default_pg/0//cuda//0", None),
            ("/default_pg/0//cpu//0/2/3", None),
            ("/default_pg/0//cpu//x/2", None),
            ("init/", None),
            ("", None),
        ];
        for (key, rank) in table {
            assert_eq!(rank_in(key.as_bytes()), rank, "{key}");
        }
    }

    #[test]
    fn a_wait_is_said_in_words() {
        let wait = WaitView {
            keys: vec!["default_pg/0//cpu//0/2".into()],
            keys_total: 3,
            rank: Some(2),
            waited: Duration::from_millis(12_400),
        };
        let client = ClientView {
            peer: ([10, 0, 0, 1], 40_000).into(),
            process: Some(77),
            rank: Some(1),
            connected: Duration::ZERO,
            requests: 3,
            wait: Some(wait),
        };
        assert_eq!(
            client.to_string(),
            "rank 1 at 10.0.0.1:40000 (process 77) waits for default_pg/0//cpu//0/2 and 2 more, \
             which rank 2 sets, for 12 s"
        );
        let snapshot = Snapshot { clients: vec![client.clone(), client], ..Snapshot::default() };
        assert_eq!(snapshot.awaited()["default_pg/0//cpu//0/2"].0, 2);
        assert_eq!((snapshot.ranks(), snapshot.awaited_ranks()), ([1].into(), [2].into()));
    }
}
