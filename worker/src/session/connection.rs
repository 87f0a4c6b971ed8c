//! Makes connections to coordinators, and knows whom they reach.
//!
//! What a connection says of the coordinator's process (nothing listens there, or it takes a connection and is silent) it
//! says of whatever it reached, which may be a proxy, a tunnel or a service address. A coordinator therefore tells at
//! which address it took the connection of a Join, whether it leads or not, and only that address can testify.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use hyper_util::rt::TokioIo;
use muster_monitor::canonical;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tracing::warn;

use crate::data_dir;
use crate::devices::network;
use crate::trust::{host, port};

/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 16;

/// Whom an attempt to connect has reached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reached {
    /// The connection's other end.
    pub peer: Option<SocketAddr>,
    /// When it took the connection.
    pub taken: Option<Instant>,
    /// Addresses that said that nothing listens there.
    pub refused: Vec<SocketAddr>,
}

impl Reached {
    /// Notes how an attempt at one address went.
    pub fn note<T>(&mut self, address: SocketAddr, connected: &io::Result<T>) {
        match connected {
            Ok(_) => (self.peer, self.taken) = (Some(address), Some(Instant::now())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => self.refused.push(address),
            Err(_) => {}
        }
    }
}

/// What a dialler writes down.
pub(crate) type Notes = Arc<Mutex<Reached>>;

/// Whether it is a Unix socket (`unix:/path`). tonic keeps the path to itself and shows this host in its place.
pub(super) fn is_socket(endpoint: &Endpoint) -> bool {
    endpoint.uri().host() == Some("tonic")
}

/// Makes a connection, one of its own for each call.
pub(crate) async fn connect(endpoint: &Endpoint) -> (Result<Channel, Error>, Reached) {
    if is_socket(endpoint) {
        return (endpoint.connect().await, Reached::default());
    }
    #[cfg(feature = "simulation")]
    if turmoil::in_simulation() {
        return through(endpoint, crate::simulation::dial).await;
    }
    through(endpoint, dial).await
}

async fn through<F, C>(endpoint: &Endpoint, dial: fn(Uri, Notes) -> F) -> (Result<Channel, Error>, Reached)
where
    F: Future<Output = io::Result<C>> + Send + 'static,
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let notes = Notes::default();
    let noted = notes.clone();
    let connector = tower::service_fn(move |uri| {
        let dialling = dial(uri, noted.clone());
        async { Ok::<_, io::Error>(TokioIo::new(dialling.await?)) }
    });
    let channel = endpoint.connect_with_connector(connector).await;
    let reached = notes.lock().map(|reached| reached.clone()).unwrap_or_default();
    (channel, reached)
}

async fn dial(uri: Uri, notes: Notes) -> io::Result<tokio::net::TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host((host(&uri), port(&uri))).await?.take(ADDRESSES_MAX) {
        let connected = tokio::net::TcpStream::connect(address).await;
        if let Ok(mut reached) = notes.lock() {
            reached.note(address, &connected);
        }
        match connected {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Returns the address at which other nodes reach this one: that from which it reaches the
/// coordinator, whose connection has gone to `peer`. Connecting a UDP socket sends nothing; it asks
/// the kernel for the route.
pub(super) async fn address_towards(endpoint: &Endpoint, peer: Option<SocketAddr>) -> Result<IpAddr, Status> {
    if is_socket(endpoint) {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let (name, port) = (host(endpoint.uri()), port(endpoint.uri()));
    let failed = |error: io::Error| Status::unavailable(format!("failed to find the way to {name}: {error}"));
    let targets: Vec<SocketAddr> = match peer {
        Some(peer) => vec![peer],
        None => tokio::net::lookup_host((name, port)).await.map_err(failed)?.collect(),
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for target in targets {
        match network::source_towards(target.ip()) {
            Ok(own) => return Ok(network::for_others(name, own)),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// The addresses at which coordinators said that they listen themselves, by their URLs. Kept on the disk: a daemon that
/// begins while its coordinator is away has ranks to decide about.
#[derive(Debug)]
pub(super) struct Known {
    data_dir: PathBuf,
    boot_id: String,
    addresses: BTreeMap<String, SocketAddr>,
    /// Those of which it was said that something stands between.
    indirect: BTreeSet<String>,
}

impl Known {
    /// What an earlier daemon has learnt.
    pub fn load(data_dir: PathBuf, boot_id: String) -> Self {
        let addresses = data_dir::coordinators(&data_dir);
        Self { data_dir, boot_id, addresses, indirect: BTreeSet::new() }
    }

    /// Whether what this address does says something of the coordinator with this URL.
    pub fn testifies(&self, url: &str, address: SocketAddr) -> bool {
        self.addresses.get(url) == Some(&address)
    }

    /// Where the coordinator with this URL listens itself, if that is known.
    pub fn address(&self, url: &str) -> Option<SocketAddr> {
        self.addresses.get(url).copied()
    }

    /// A coordinator has answered over this connection, and says where it took it and on which boot of its machine.
    pub fn answered(&mut self, url: &str, reached: &Reached, accepted_at: &str, boot_id: &str) {
        let accepted: Option<SocketAddr> = accepted_at.parse().ok().map(canonical);
        // The loopback address of another machine is the end of a tunnel.
        let here = |address: SocketAddr| !address.ip().is_loopback() || boot_id == self.boot_id;
        let direct =
            accepted.filter(|address| reached.peer.map(canonical) == Some(*address) && here(*address));
        let before = match direct {
            Some(address) => {
                self.indirect.remove(url);
                self.addresses.insert(url.to_owned(), address)
            }
            None => self.addresses.remove(url),
        };
        if direct.is_none() && self.indirect.insert(url.to_owned()) {
            warn!(
                coordinator = %url, peer = ?reached.peer, accepted_at,
                "something stands between this node and the coordinator; if the coordinator is away for a lease, ranks are \
                 stopped, because from here that looks as if only this node were cut off"
            );
        }
        if before == direct {
            return;
        }
        if let Err(error) = data_dir::keep_coordinators(&self.data_dir, &self.addresses) {
            warn!(%error, "the coordinator's address could not be noted for the next daemon");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_known_who_was_reached_and_who_refused() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let endpoint = Endpoint::from_shared(format!("http://localhost:{}", address.port())).unwrap();
        let (channel, reached) = connect(&endpoint).await;
        assert!(channel.is_ok());
        assert_eq!(reached.peer, Some(address));
        drop(listener);
        let (channel, reached) = connect(&endpoint).await;
        assert!(channel.is_err() && reached.refused.contains(&address), "{reached:?}");
    }

    #[tokio::test]
    async fn a_socket_is_a_way_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let endpoint = Endpoint::from_shared(format!("unix:{}", path.display())).unwrap();
        assert!(is_socket(&endpoint));
        let (channel, reached) = connect(&endpoint).await;
        assert!(channel.is_ok() && reached.peer.is_none());
    }

    #[test]
    fn only_the_address_at_which_the_coordinator_listens_testifies() {
        let dir = tempfile::tempdir().unwrap();
        let known = || Known::load(dir.path().to_owned(), "boot".to_owned());
        let url = "http://c:7070";
        let cases = [
            ("10.0.0.1:7070", "10.0.0.1:7070", "other", true),
            // A service address, or a proxy.
            ("10.96.0.7:7070", "10.0.0.1:7070", "other", false),
            ("127.0.0.1:7070", "127.0.0.1:7070", "boot", true),
            // A tunnel.
            ("127.0.0.1:7070", "127.0.0.1:7070", "other", false),
            ("10.0.0.1:7070", "", "", false),
            // It listens on [::].
            ("10.0.0.1:7070", "[::ffff:10.0.0.1]:7070", "other", true),
            ("127.0.0.1:7070", "[::ffff:127.0.0.1]:7070", "other", false),
            ("[fd00::1]:7070", "[fd00::1]:7070", "other", true),
        ];
        for (peer, accepted_at, boot_id, testifies) in cases {
            let address: SocketAddr = peer.parse().unwrap();
            let reached = Reached { peer: Some(address), ..Reached::default() };
            known().answered(url, &reached, accepted_at, boot_id);
            assert_eq!(known().testifies(url, address), testifies, "{peer} {accepted_at} {boot_id}");
            assert!(!known().testifies("http://d:7070", address));
        }
    }
}
