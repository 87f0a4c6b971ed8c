//! What the store of a gang's ranks shows while some of them do not get on there, as the gang's first node says it.
//!
//! A store does not know ranks. Its clients say the id of their process, and each node knows the processes of its own
//! ranks: the coordinator hears both, and puts them together when somebody looks.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Millis, Rank};

/// Most addresses that are told: a gang has one for each node, and the largest are told as counts alone.
pub const HOSTS_TOLD_MAX: usize = 1024;
/// Most processes that are told one by one. Of a host whose ranks have all come their number says as much.
pub const PROCESSES_TOLD_MAX: usize = 256;
/// Most keys that are told: what is missing holds up all others at the same few.
pub const WAITS_TOLD_MAX: usize = 8;
/// Most clients that are told for one key.
pub const CLIENTS_TOLD_MAX: usize = 8;

/// A store at which something has been stuck for some seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RendezvousReport {
    /// Processes that have come, each counted once.
    pub come: u32,
    /// Unix time at which the last of them came.
    pub last_came: Millis,
    /// Where they came from. Empty once as many have come as there are ranks, and beyond [`HOSTS_TOLD_MAX`].
    pub hosts: Vec<RendezvousHost>,
    /// Keys that are waited for, the longest wait first.
    pub waits: Vec<RendezvousWait>,
    /// Further such keys.
    pub waits_more: u32,
}

/// The processes that have come from one address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RendezvousHost {
    /// The address.
    pub address: IpAddr,
    /// How many.
    pub come: u32,
    /// Those whose rank is known.
    pub ranks: Vec<Rank>,
    /// The ids of the others, as they say themselves. All of the host's processes are told one by one, or none.
    pub processes: Vec<u32>,
}

/// A key that clients wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RendezvousWait {
    /// As people read it.
    pub key: String,
    /// The rank that sets it, where the key says so.
    pub setter: Option<Rank>,
    /// Connections that wait for it.
    pub waiting: u32,
    /// The first of them.
    pub clients: Vec<RendezvousClient>,
    /// Unix time since which the first has waited.
    pub since: Millis,
}

/// A client of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RendezvousClient {
    /// Where it comes from.
    pub address: IpAddr,
    /// Its process, as it says itself.
    pub process: Option<u32>,
    /// Its rank, if that is known.
    pub rank: Option<Rank>,
}
