//! Which ranks have not come to their store and who waits there, put together from what each node says.
//!
//! The first node tells which processes have come and from where, and each node which processes its ranks are. It is put
//! together when somebody looks, and only for a gang that is stuck. Nodes may share an address, as in tests: processes
//! differ all the same. What cannot be told apart is counted: a program that a rank's own process has started on another
//! node, or one that comes from another address than its node's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::job::{Gang, Job};
use crate::types::rendezvous::{RendezvousClient, RendezvousHost, RendezvousWait};
use crate::types::{DesiredPhase, Millis, NodeName, Rank};

/// Missing ranks that are named; a whole rack may be missing.
const MISSING_NAMED_MAX: usize = 64;
/// Missing ranks that a reason names.
const REASON_RANKS_MAX: usize = 3;

/// Where a gang's ranks are that do not get on at their store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Ranks that have come.
    pub come: u32,
    /// Unix time at which the last of them came.
    pub last_came: Millis,
    /// Ranks of which it is known that they have not, the lowest first.
    pub missing: Vec<(Rank, NodeName)>,
    /// How many have not.
    pub missing_total: u32,
    /// Keys that are waited for, the longest wait first.
    pub awaited: Vec<Awaited>,
    /// Further such keys.
    pub awaited_more: u32,
}

/// A key that ranks wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// As people read it.
    pub key: String,
    /// The rank that sets it, where the key says so.
    pub setter: Option<(Rank, NodeName)>,
    /// The first ranks that wait, as far as they are known.
    pub waiting: Vec<(Rank, NodeName)>,
    /// Connections that wait.
    pub waiting_total: u32,
    /// Unix time since which the first has waited.
    pub since: Millis,
}

impl Job {
    /// Who is missing at the store of the ranks and who waits there; none while they get on, and none once they are told
    /// to end.
    pub fn rendezvous(&self) -> Option<Rendezvous> {
        let gang = self.gang.as_ref()?;
        let report = gang.rendezvous.as_ref()?;
        if gang.desired != DesiredPhase::Running {
            return None;
        }
        let known = Known::new(gang);
        let missing = known.missing(&report.hosts);
        let absent = self.world_size().saturating_sub(report.come);
        let awaited = |wait: &RendezvousWait| {
            let waiting: BTreeSet<Rank> =
                wait.clients.iter().filter_map(|client| known.rank_of(client)).collect();
            Awaited {
                key: wait.key.clone(),
                setter: wait.setter.and_then(|rank| known.named(rank)),
                waiting: waiting.into_iter().filter_map(|rank| known.named(rank)).collect(),
                waiting_total: wait.waiting,
                since: wait.since,
            }
        };
        Some(Rendezvous {
            come: report.come,
            last_came: report.last_came,
            missing_total: absent.max(missing.len() as u32),
            missing: missing
                .into_iter()
                .take(MISSING_NAMED_MAX)
                .filter_map(|rank| known.named(rank))
                .collect(),
            awaited: report.waits.iter().map(awaited).collect(),
            awaited_more: report.waits_more,
        })
    }
}

impl Rendezvous {
    /// In a few words: who is missing, else who waits for what.
    pub(crate) fn in_words(&self) -> Option<String> {
        let name = |(rank, node): &(Rank, NodeName)| format!("rank {rank} on node {node}");
        let named: Vec<String> = self.missing.iter().take(REASON_RANKS_MAX).map(name).collect();
        match (self.missing_total, named.len(), self.awaited.first()) {
            (1.., 0, _) => Some(format!("{} ranks have not come to the ranks' store", self.missing_total)),
            (total @ 1.., told, _) => {
                let more = total as usize - told;
                let more = if more == 0 { String::new() } else { format!(" and {more} more") };
                let have = if total == 1 { "has" } else { "have" };
                Some(format!("{}{more} {have} not come to the ranks' store", named.join(", ")))
            }
            (0, _, Some(wait)) => {
                let (who, waits) = match wait.waiting.first() {
                    Some(first) if wait.waiting_total > 1 => {
                        (format!("{} and {} more", name(first), wait.waiting_total - 1), "wait")
                    }
                    Some(first) => (name(first), "waits"),
                    None => (format!("{} of the ranks", wait.waiting_total), "wait"),
                };
                let setter = wait.setter.as_ref().map(|setter| format!(", which {} sets,", name(setter)));
                let setter = setter.unwrap_or_default();
                Some(format!("{who} {waits} for the key {:?}{setter} in the ranks' store", wait.key))
            }
            (0, _, None) => None,
        }
    }
}

/// A gang's nodes by their address.
struct Known<'a> {
    gang: &'a Gang,
    by_address: BTreeMap<IpAddr, Vec<usize>>,
}

impl<'a> Known<'a> {
    fn new(gang: &'a Gang) -> Self {
        let mut by_address: BTreeMap<IpAddr, Vec<usize>> = BTreeMap::new();
        for (group_rank, placement) in gang.placements.iter().enumerate() {
            by_address.entry(placement.address).or_default().push(group_rank);
        }
        Self { gang, by_address }
    }

    /// A rank and its node.
    fn named(&self, rank: Rank) -> Option<(Rank, NodeName)> {
        // Ranks are contiguous, and rise with the nodes.
        let at = self.gang.placements.partition_point(|placement| placement.first_rank <= rank);
        let placement = self.gang.placements.get(at.checked_sub(1)?)?;
        placement.holds(rank).then(|| (rank, placement.node.clone()))
    }

    /// The rank that is this process at this address.
    fn rank_at(&self, address: IpAddr, process: u32) -> Option<Rank> {
        self.by_address.get(&address)?.iter().find_map(|group_rank| {
            let at = self.gang.processes.get(group_rank)?.iter().position(|known| *known == process)?;
            Some(Rank(self.gang.placements[*group_rank].first_rank.0 + at as u32))
        })
    }

    fn rank_of(&self, client: &RendezvousClient) -> Option<Rank> {
        client.rank.or_else(|| self.rank_at(client.address, client.process?))
    }

    /// The ranks of which it is known that they have not come: those of each address from which every process that came
    /// is known to be another rank.
    fn missing(&self, hosts: &[RendezvousHost]) -> BTreeSet<Rank> {
        let told: BTreeMap<IpAddr, &RendezvousHost> = hosts.iter().map(|host| (host.address, host)).collect();
        // Whoever comes from elsewhere may be any rank, and if no address is told, everybody has or nobody knows.
        let by_rank = |host: &RendezvousHost| host.come as usize == host.ranks.len();
        let strangers =
            hosts.iter().any(|host| !self.by_address.contains_key(&host.address) && !by_rank(host));
        if strangers || hosts.is_empty() {
            return BTreeSet::new();
        }
        let named: BTreeSet<Rank> = hosts.iter().flat_map(|host| &host.ranks).copied().collect();
        let mut missing = BTreeSet::new();
        for (address, group_ranks) in &self.by_address {
            let host = told.get(address);
            let known = host.map(|host| {
                let by_process = host.processes.iter().filter_map(|process| self.rank_at(*address, *process));
                by_process.chain(host.ranks.iter().copied()).collect::<BTreeSet<Rank>>()
            });
            let known = known.unwrap_or_default();
            if host.is_some_and(|host| host.come as usize > known.len()) {
                continue;
            }
            let ranks = group_ranks.iter().flat_map(|at| {
                let placement = &self.gang.placements[*at];
                (placement.first_rank.0..placement.first_rank.0 + placement.procs).map(Rank)
            });
            missing.extend(ranks.filter(|rank| !known.contains(rank) && !named.contains(rank)));
        }
        missing
    }
}
