//! How many refusals of each peer have lines: a flood of them must not hide the rest, nor fill the disk.

use std::collections::HashMap;
use std::net::IpAddr;

use muster_core::types::Millis;

/// Refusals of one peer that have lines of their own in each span.
const LINES_MAX: u64 = 20;
/// The span.
const SPAN: Millis = Millis::from_secs(10);
/// Peers that are told apart; all others share a count.
const PEERS_MAX: usize = 1024;

/// Whether a refusal has a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    /// It has one, and so many before it have none.
    Line {
        more: u64,
    },
    Counted,
}

/// Peers with refusals in the last span.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    peers: HashMap<Peer, Count>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Peer {
    Local,
    Address(IpAddr),
    Others,
}

#[derive(Debug)]
struct Count {
    since: Millis,
    refusals: u64,
}

impl Refusals {
    /// Returns whether a refusal of this peer has a line; none is the Unix socket.
    pub fn admit(&mut self, peer: Option<IpAddr>, now: Millis) -> Admitted {
        let peer = peer.map_or(Peer::Local, Peer::Address);
        let known = self.peers.contains_key(&peer) || self.peers.len() < PEERS_MAX;
        let peer = if known { peer } else { Peer::Others };
        let count = self.peers.entry(peer).or_insert(Count { since: now, refusals: 0 });
        let mut more = 0;
        if now.since(count.since) >= SPAN {
            more = count.refusals.saturating_sub(LINES_MAX);
            *count = Count { since: now, refusals: 0 };
        }
        count.refusals += 1;
        if count.refusals <= LINES_MAX { Admitted::Line { more } } else { Admitted::Counted }
    }

    /// Forgets the peers whose span is over, and returns how many of their refusals have no line.
    pub fn counted(&mut self, now: Millis, all: bool) -> Vec<(String, u64)> {
        let mut counted = Vec::new();
        self.peers.retain(|peer, count| {
            if !all && now.since(count.since) < SPAN {
                return true;
            }
            let more = count.refusals.saturating_sub(LINES_MAX);
            let name = match peer {
                Peer::Local => "local".to_owned(),
                Peer::Address(address) => address.to_string(),
                Peer::Others => "others".to_owned(),
            };
            counted.extend((more > 0).then_some((name, more)));
            false
        });
        counted
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const LINE: Admitted = Admitted::Line { more: 0 };

    #[test]
    fn a_flood_is_counted_and_hides_nobody_else() {
        let mut refusals = Refusals::default();
        let peer = |last| Some(IpAddr::from([10, 0, 0, last]));
        let lines = (0..1000).filter(|_| refusals.admit(peer(1), Millis(0)) == LINE).count();
        assert_eq!(lines as u64, LINES_MAX);
        assert_eq!(refusals.admit(peer(2), Millis(1)), LINE);
        assert!(refusals.counted(SPAN.since(Millis(1)), false).is_empty(), "the span is not over");
        assert_eq!(refusals.counted(SPAN, false), [("10.0.0.1".to_owned(), 1000 - LINES_MAX)]);
        assert_eq!(refusals.admit(peer(1), SPAN), LINE, "a new span begins");
        let _ = (0..LINES_MAX).map(|_| refusals.admit(peer(1), SPAN)).count();
        let later = Millis(SPAN.0 * 2);
        assert_eq!(refusals.admit(peer(1), later), Admitted::Line { more: 1 }, "if nobody has looked");
    }

    #[test]
    fn many_peers_take_little_memory() {
        let mut refusals = Refusals::default();
        for peer in 0..100_000 {
            refusals.admit(Some(Ipv4Addr::from(peer).into()), Millis(0));
        }
        assert_eq!(refusals.peers.len(), PEERS_MAX + 1);
        let counted = refusals.counted(SPAN, false);
        assert_eq!(counted, [("others".to_owned(), 100_000 - PEERS_MAX as u64 - LINES_MAX)]);
        assert!(refusals.peers.is_empty());
    }
}
