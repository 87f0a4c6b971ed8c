//! Whether the ranks get on at their store: how many have come, and who waits for what nobody sets.
//!
//! A process has come once it has connected and said its id, as torch's clients do. Not seen are: ranks that meet
//! elsewhere; one whose only connection came and went between two looks; a client that asks for a key now and then
//! instead of waiting for it. A rank of another node that connects from several processes counts as several, and then it
//! cannot be said which are missing. Nothing is done about what is seen: it is for people.

use std::collections::BTreeMap;
use std::net::IpAddr;

use muster_core::types::rendezvous::{
    CLIENTS_TOLD_MAX, HOSTS_TOLD_MAX, PROCESSES_TOLD_MAX, RendezvousClient, RendezvousHost, RendezvousWait,
    WAITS_TOLD_MAX,
};
use muster_core::types::{Assignment, Millis, Rank, RendezvousReport};
use muster_tcpstore::{ClientView, Snapshot};

use crate::launch::procfs;

/// Time without a further rank, or in a wait, after which it is told. Ranks that start together come some seconds apart.
const STUCK_AFTER: Millis = Millis::from_secs(5);
/// Time between looks while something is under way, and while nothing is: nobody has come, or all have and none waits.
const INTERVAL: (Millis, Millis) = (Millis(1000), Millis(5000));
/// Two clocks are read one after the other, so that what began at one time seems to have begun at slightly different ones.
/// If they are further apart, a clock was set.
const SAME_TIME: Millis = Millis(2000);
/// Wrappers around a rank's program, one in the other; beyond it the process is taken for a stranger's.
const ANCESTORS_MAX: usize = 64;

/// A process, by where it comes from and its id.
type Process = (IpAddr, u32);
/// What is stuck, if anything is.
type Stuck = Option<Box<RendezvousReport>>;

/// What is known of the ranks at their store.
#[derive(Debug)]
pub(super) struct Rendezvous {
    world: u32,
    procs: u32,
    first_rank: Rank,
    address: IpAddr,
    /// Those of this node's ranks, in their order.
    own: Vec<u32>,
    looked: Millis,
    interval: Millis,
    /// Who has ever come, until all have.
    come: BTreeMap<Process, Option<Rank>>,
    all_came: bool,
    last_came: Millis,
    told: Stuck,
}

impl Rendezvous {
    /// From a gang's launch on, with the processes of this node's ranks.
    pub fn new(assignment: &Assignment, own: Vec<u32>, now: Millis) -> Self {
        Self {
            world: assignment.world_size,
            procs: assignment.placement.procs,
            first_rank: assignment.placement.first_rank,
            address: assignment.placement.address,
            own,
            looked: now,
            interval: INTERVAL.0,
            come: BTreeMap::new(),
            all_came: false,
            last_came: now,
            told: None,
        }
    }

    /// When the next look is due.
    pub fn deadline(&self) -> Millis {
        self.looked.plus(self.interval)
    }

    /// What is stuck, if that is news. `now` is the time since the machine started, `unix` that of the wall.
    pub fn look(&mut self, now: Millis, unix: Millis, seen: &Snapshot) -> Option<Stuck> {
        let parent = |process| u32::try_from(procfs::stat(i32::try_from(process).ok()?)?.parent).ok();
        self.take(now, unix, seen, parent)
    }

    fn take(
        &mut self,
        now: Millis,
        unix: Millis,
        seen: &Snapshot,
        parent: impl Fn(u32) -> Option<u32>,
    ) -> Option<Stuck> {
        self.looked = now;
        let named = self.named(seen, parent);
        self.note(now, seen, &named);
        let is_waiting = seen.clients.iter().any(|client| client.wait.is_some());
        let is_coming = !self.all_came && !self.come.is_empty();
        self.interval = if is_waiting || is_coming { INTERVAL.0 } else { INTERVAL.1 };
        let (waits, waits_more) = self.waits(unix, seen, &named);
        let lacks_some = is_coming && now.since(self.last_came) >= STUCK_AFTER;
        let report = (lacks_some || !waits.is_empty()).then(|| {
            let before = self.told.as_ref().map(|told| told.last_came);
            Box::new(RendezvousReport {
                come: if self.all_came { self.world } else { self.come.len() as u32 },
                last_came: steady(unix.since(now.since(self.last_came)), before),
                hosts: self.hosts(),
                waits,
                waits_more,
            })
        });
        let is_news = report != self.told;
        self.told.clone_from(&report);
        is_news.then_some(report)
    }

    /// The processes whose rank is known: this node's ranks and what they have started, and those that have set a key
    /// which names them.
    fn named(&self, seen: &Snapshot, parent: impl Fn(u32) -> Option<u32>) -> BTreeMap<Process, Rank> {
        let of = |client: &ClientView| {
            let process = process(client)?;
            let own = (process.0 == self.address).then(|| self.own_rank(process.1, &parent)).flatten();
            Some((process, own.or(client.rank.map(Rank))?))
        };
        seen.clients.iter().filter_map(of).collect()
    }

    fn own_rank(&self, mut process: u32, parent: impl Fn(u32) -> Option<u32>) -> Option<Rank> {
        for _ in 0..ANCESTORS_MAX {
            if let Some(at) = self.own.iter().position(|own| *own == process) {
                return Some(Rank(self.first_rank.0 + at as u32));
            }
            process = parent(process).filter(|parent| *parent > 1)?;
        }
        None
    }

    fn note(&mut self, now: Millis, seen: &Snapshot, named: &BTreeMap<Process, Rank>) {
        if self.all_came {
            return;
        }
        let before = self.come.len();
        for process in seen.clients.iter().filter_map(process) {
            let rank = named.get(&process).copied();
            // Whatever else a rank of this node has started is the same rank.
            let own = rank.and_then(|rank| self.own.get(rank.0.checked_sub(self.first_rank.0)? as usize));
            let process = own.map_or(process, |own| (self.address, *own));
            let known = self.come.entry(process).or_default();
            *known = rank.or(*known);
        }
        if self.come.len() > before {
            self.last_came = now;
        }
        if self.come.len() >= self.world as usize {
            self.all_came = true;
            self.come.clear();
        }
    }

    /// Where those who have come are from. Bounded, as are the others: the largest gangs are told in short.
    fn hosts(&self) -> Vec<RendezvousHost> {
        let mut hosts: BTreeMap<IpAddr, RendezvousHost> = BTreeMap::new();
        for ((address, process), rank) in &self.come {
            let (ranks, processes) = Default::default();
            let new = RendezvousHost { address: *address, come: 0, ranks, processes };
            let host = hosts.entry(*address).or_insert(new);
            host.come += 1;
            match rank {
                Some(rank) => host.ranks.push(*rank),
                None => host.processes.push(*process),
            }
        }
        if hosts.len() > HOSTS_TOLD_MAX {
            return Vec::new();
        }
        let mut hosts: Vec<RendezvousHost> = hosts.into_values().collect();
        hosts.sort_by_key(|host| host.come == self.procs);
        let mut room = PROCESSES_TOLD_MAX;
        for host in &mut hosts {
            if let Some(left) = room.checked_sub(host.come as usize) {
                room = left;
            } else {
                (host.ranks, host.processes) = Default::default();
            }
        }
        hosts
    }

    /// The keys that were waited for for long, and how many more there are.
    fn waits(
        &self,
        unix: Millis,
        seen: &Snapshot,
        named: &BTreeMap<Process, Rank>,
    ) -> (Vec<RendezvousWait>, u32) {
        let mut by_key: BTreeMap<&str, (Millis, RendezvousWait)> = BTreeMap::new();
        for client in &seen.clients {
            let Some(wait) = &client.wait else { continue };
            let Some(key) = wait.keys.first() else { continue };
            let (longest, told) = by_key.entry(key).or_insert_with(|| {
                let (clients, setter) = (Vec::new(), wait.rank.map(Rank));
                let key = key.clone();
                (Millis(0), RendezvousWait { key, setter, waiting: 0, clients, since: Millis(0) })
            });
            *longest = Millis(u64::try_from(wait.waited.as_millis()).unwrap_or(u64::MAX)).max(*longest);
            told.waiting += 1;
            if told.clients.len() < CLIENTS_TOLD_MAX {
                let rank = process(client).and_then(|process| named.get(&process).copied());
                let address = client.peer.ip().to_canonical();
                told.clients.push(RendezvousClient { address, process: client.process, rank });
            }
        }
        let mut stuck: Vec<(Millis, RendezvousWait)> =
            by_key.into_values().filter(|(longest, _)| *longest >= STUCK_AFTER).collect();
        stuck.sort_by_key(|(waited, ..)| std::cmp::Reverse(*waited));
        let more = stuck.len().saturating_sub(WAITS_TOLD_MAX) as u32;
        stuck.truncate(WAITS_TOLD_MAX);
        let dated = |(longest, wait): (Millis, RendezvousWait)| {
            let before = self.told.iter().flat_map(|told| &told.waits).find(|told| told.key == wait.key);
            RendezvousWait { since: steady(unix.since(longest), before.map(|told| told.since)), ..wait }
        };
        (stuck.into_iter().map(dated).collect(), more)
    }
}

/// The process of a client, if it has said its id.
fn process(client: &ClientView) -> Option<Process> {
    Some((client.peer.ip().to_canonical(), client.process?))
}

/// The time that was told before, if it is meant again.
fn steady(time: Millis, before: Option<Millis>) -> Millis {
    before.filter(|before| time.0.abs_diff(before.0) < SAME_TIME.0).unwrap_or(time)
}

#[cfg(test)]
#[path = "rendezvous_tests.rs"]
mod tests;
