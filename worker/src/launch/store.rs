//! The store at which a gang's ranks meet, on the gang's first node.
//!
//! It belongs to the shim: it is there before the first rank is and as long as the last, and when the daemon is killed
//! or replaced, neither the ranks nor their store notice. No rank hosts it, so that its port is bound from the moment
//! it is announced, and whoever looks sees which ranks have not come.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use muster_tcpstore::{Limits, Running, Server, Snapshot};
use tracing::{info, warn};

use super::files;

/// Lines about waits that are logged at once: ranks that hang all wait for the same few.
const WAITS_LOGGED_MAX: usize = 16;
/// How often a port that was named is tried while it is taken, and the pause between: the store of the generation before goes
/// with its shim, which may still be tidying up.
const TAKEN_TRIES: u32 = 200;
const TAKEN_PAUSE: Duration = Duration::from_millis(10);

/// A store that serves until it is dropped.
#[derive(Debug)]
pub(crate) struct RankStore(Running);

impl RankStore {
    /// Serves at `port` of `address`, which must be one of this node's, and at no other address. 0 stands for any that is free.
    pub fn host(address: IpAddr, port: u16) -> io::Result<Self> {
        // A thousand ranks have a few connections each, and most shells and service managers allow a thousand in all.
        if let Err(error) = files::allow_many() {
            warn!(%error, "the store of the ranks may have too few file descriptors");
        }
        let bind = || Server::bind(SocketAddr::new(address, port), Limits::default());
        let mut bound = bind();
        for _ in 0..TAKEN_TRIES {
            if port == 0 || !matches!(&bound, Err(error) if error.kind() == io::ErrorKind::AddrInUse) {
                break;
            }
            std::thread::sleep(TAKEN_PAUSE);
            bound = bind();
        }
        let store = bound?.start()?;
        info!(address = %store.address(), "the store of the ranks serves");
        Ok(Self(store))
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.0.address().port()
    }

    /// Who is there and who waits for what.
    pub fn observe(&self) -> Snapshot {
        self.0.observe()
    }

    /// Logs who waits for what: for when the ranks show no progress.
    pub fn log_waits(&self) {
        let seen = self.0.observe();
        let waits: Vec<_> = seen.clients.iter().filter(|client| client.wait.is_some()).collect();
        warn!(
            joined = seen.joined,
            connected = seen.clients.len(),
            waiting = waits.len(),
            awaited = ?seen.awaited_ranks(),
            "the ranks at their store"
        );
        for client in waits.into_iter().take(WAITS_LOGGED_MAX) {
            warn!("{client}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    #[test]
    fn the_store_serves_at_the_nodes_address_alone_and_nobody_else_gets_its_port() {
        let store = RankStore::host(Ipv4Addr::LOCALHOST.into(), 0).unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, store.port())).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        TcpStream::connect((Ipv4Addr::LOCALHOST, store.port())).unwrap();
        TcpStream::connect((Ipv4Addr::new(127, 0, 0, 2), store.port())).unwrap_err();
        assert!(RankStore::host([192, 0, 2, 1].into(), 0).is_err(), "not an address of this node");
    }
}
