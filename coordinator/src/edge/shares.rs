//! How many connections one peer address may have at once, so that none takes the places of all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections by peer address. It has an entry for each address that holds one.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    max: usize,
    held: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One connection's part; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    of: Shares,
    peer: IpAddr,
}

impl Shares {
    pub fn new(max: usize) -> Self {
        Self { max, held: Arc::default() }
    }

    /// Returns a part for one more connection of this address; none if it has as many as it may.
    pub fn take(&self, peer: IpAddr) -> Option<Share> {
        let mut held = self.locked();
        let count = held.entry(peer).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Share { of: self.clone(), peer })
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.of.locked();
        if let Some(count) = held.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_its_part_and_others_have_theirs() {
        let shares = Shares::new(2);
        let peer = |last| IpAddr::from([10, 0, 0, last]);
        let held = [shares.take(peer(1)).unwrap(), shares.take(peer(1)).unwrap()];
        assert!(shares.take(peer(1)).is_none());
        assert!(shares.take(peer(2)).is_some());
        drop(held);
        assert!(shares.locked().is_empty(), "nobody is remembered");
        assert!(shares.take(peer(1)).is_some());
    }
}
