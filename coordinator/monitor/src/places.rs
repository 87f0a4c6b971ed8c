//! How many connections a port takes: in all, of one address, and of callers that are not known to be nodes. The rest is
//! a reserve for nodes, so that nobody who only looks can keep them out.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Addresses of nodes that are remembered: as many as nodes there may be. Further nodes have no reserve.
const NODE_ADDRESSES_MAX: usize = 16_384;

/// Limits of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceLimits {
    /// Connections of callers that are not known to be nodes.
    pub strangers: usize,
    /// Connections of one address, unless it is loopback.
    pub peer: usize,
}

/// Why a connection is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// Its address has as many as it may.
    #[error("its address has {0} connections, the most that one address may have")]
    Peer(usize),
    /// The rest is kept for nodes.
    #[error("{0} connections are open that are not of nodes, and the rest is kept for nodes")]
    Strangers(usize),
}

/// The places of a port. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Places {
    limits: PlaceLimits,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    /// Has an entry for each address that holds a connection; loopback has none.
    by_peer: HashMap<IpAddr, usize>,
    strangers: usize,
    /// Addresses from which nodes have called. Loopback is everybody's, and never one of them.
    nodes: HashSet<IpAddr>,
}

/// The place of one connection; given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    of: Places,
    /// None for loopback.
    peer: Option<IpAddr>,
    is_stranger: AtomicBool,
}

impl Places {
    /// Returns a port's places, all of them free.
    pub fn new(limits: PlaceLimits) -> Self {
        Self { limits, taken: Arc::default() }
    }

    /// Returns a place for one more connection from this address.
    pub fn take(&self, peer: IpAddr) -> Result<Place, NoPlace> {
        let peer = Some(peer.to_canonical()).filter(|peer| !peer.is_loopback());
        let mut taken = self.locked();
        let is_node = peer.is_some_and(|peer| taken.nodes.contains(&peer));
        if !is_node && taken.strangers >= self.limits.strangers {
            return Err(NoPlace::Strangers(taken.strangers));
        }
        if let Some(peer) = peer {
            let count = taken.by_peer.entry(peer).or_default();
            if *count >= self.limits.peer {
                return Err(NoPlace::Peer(*count));
            }
            *count += 1;
        }
        // Until it says who it is.
        taken.strangers += 1;
        Ok(Place { of: self.clone(), peer, is_stranger: AtomicBool::new(true) })
    }

    fn locked(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Notes that a node has called on this connection: its address has a part in the reserve from now on.
    pub fn mark_node(&self) {
        if !self.is_stranger.swap(false, Ordering::Relaxed) {
            return;
        }
        let mut taken = self.of.locked();
        taken.strangers -= 1;
        if let Some(peer) = self.peer
            && taken.nodes.len() < NODE_ADDRESSES_MAX
        {
            taken.nodes.insert(peer);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.of.locked();
        if self.is_stranger.load(Ordering::Relaxed) {
            taken.strangers -= 1;
        }
        let Some(peer) = self.peer else { return };
        if let Some(count) = taken.by_peer.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                taken.by_peer.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn one_address_has_its_part_and_others_have_theirs() {
        let places = Places::new(PlaceLimits { strangers: 10, peer: 2 });
        let held = [places.take(peer(1)).unwrap(), places.take(peer(1)).unwrap()];
        assert_eq!(places.take(peer(1)).unwrap_err(), NoPlace::Peer(2));
        let mapped = IpAddr::from(std::net::Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped());
        assert_eq!(places.take(mapped).unwrap_err(), NoPlace::Peer(2));
        assert!(places.take(peer(2)).is_ok());
        drop(held);
        assert!(places.locked().by_peer.is_empty(), "nobody is remembered");
        assert!(places.take(peer(1)).is_ok());
    }

    #[test]
    fn loopback_has_no_part_of_its_own() {
        let places = Places::new(PlaceLimits { strangers: 3, peer: 1 });
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let held = [0; 3].map(|_| places.take(loopback).unwrap());
        held[0].mark_node();
        held[0].mark_node();
        let _fourth = places.take(loopback).unwrap();
        assert_eq!(places.take(loopback).unwrap_err(), NoPlace::Strangers(3));
    }

    #[test]
    fn strangers_leave_a_reserve_for_nodes() {
        let places = Places::new(PlaceLimits { strangers: 2, peer: 2 });
        let node = places.take(peer(1)).unwrap();
        node.mark_node();
        drop(node);
        assert_eq!(places.locked().strangers, 0);
        let _strangers = [places.take(peer(2)).unwrap(), places.take(peer(3)).unwrap()];
        assert_eq!(places.take(peer(4)).unwrap_err(), NoPlace::Strangers(2));
        // Its daemon is back after a restart, and is known by its address.
        let back = places.take(peer(1)).unwrap();
        back.mark_node();
        assert_eq!(places.locked().strangers, 2);
    }
}
