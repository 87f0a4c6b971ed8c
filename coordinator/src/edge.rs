//! What stands between a listener and the services: how many connections there may be, by which name they may call, and
//! the port that probes ask.

pub(crate) mod files;
mod lenient;
pub(crate) mod peer;

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use http::uri::Authority;
use muster_monitor::{NoPlace, Place, PlaceLimits, Places};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

use crate::access;
use lenient::Lenient;
use peer::LoopbackUsers;

/// Connections at once: two for each node that there may be. Further ones wait to be taken.
pub(crate) const CONNECTIONS_MAX: usize = 32_768;
/// Those of this machine's own users.
const LOCAL_MAX: usize = 1024;
/// Those of probes.
const PROBES_MAX: usize = 64;
/// One in so many of a port's places is the most that one address may have that is not this machine's. Nodes behind one
/// address are the rule in trials on one machine, and the exception elsewhere.
const PEER_PART: usize = 4;
/// One in so many of the places of the API's port is kept for nodes.
const RESERVE_PART: usize = 4;

/// Time in which a connection must have begun to speak HTTP/2, or TLS.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);
/// Time in which a call must have come whose caller is known. Probes, which say nothing of themselves, connect again.
const CALL_WITHIN: Duration = Duration::from_secs(30);
/// Bytes with which HTTP/2 begins.
const PREFACE_BYTES: usize = 24;

/// A connection that holds one of the places until it ends.
#[derive(Debug)]
pub struct Held<C> {
    connection: C,
    _permit: OwnedSemaphorePermit,
    known: Arc<State>,
    /// While nobody has said who calls.
    waits: Option<Waits>,
}

/// What is found out about a connection while it is open.
#[derive(Debug, Default)]
struct State {
    /// Whose it is, if that may call.
    may_call: OnceLock<Result<Option<u32>, Status>>,
    /// A call has come whose caller is known.
    identified: AtomicBool,
    /// None on the Unix socket, whose connections are counted apart.
    place: Option<Place>,
}

/// How long a connection that nobody has identified may hold its place.
#[derive(Clone, Copy, Debug)]
struct Patience {
    preface: Duration,
    call: Duration,
}

const PATIENCE: Patience = Patience { preface: PREFACE_WITHIN, call: CALL_WITHIN };

/// A connection's wait for its first identified call.
#[derive(Debug)]
struct Waits {
    over: Pin<Box<Sleep>>,
    /// When it is over if HTTP/2 has begun.
    call_by: Instant,
    bytes: usize,
    /// Given once to a connection on which something had come when its time was over.
    grace: Option<Duration>,
}

impl Waits {
    fn new(patience: Patience) -> Self {
        let now = Instant::now();
        let over = Box::pin(tokio::time::sleep_until(now + patience.preface));
        Self { over, call_by: now + patience.call, bytes: 0, grace: Some(patience.preface) }
    }

    /// Returns whether the connection is to end. What came while this process had no time to read it is
    /// no fault of the caller: ten thousand nodes may come back at once.
    fn is_over(&mut self, something_came: bool, context: &mut Context<'_>) -> bool {
        while self.over.as_mut().poll(context).is_ready() {
            let Some(grace) = self.grace.take().filter(|_| something_came) else { return true };
            self.over.as_mut().reset(Instant::now() + grace);
        }
        false
    }

    /// Takes note of bytes that have come.
    fn heard(&mut self, bytes: usize) {
        let before = self.bytes;
        self.bytes = self.bytes.saturating_add(bytes);
        if before < PREFACE_BYTES && self.bytes >= PREFACE_BYTES {
            self.over.as_mut().reset(self.call_by);
        }
    }
}

/// What is known of a connection: its addresses, and once somebody has looked, whether its user may call.
#[derive(Clone, Debug)]
pub struct Known<I> {
    /// Its addresses.
    pub(crate) inner: I,
    state: Arc<State>,
}

impl<I> Known<I> {
    /// Notes that a call has come whose caller is known: the connection may stay.
    pub(crate) fn identified(&self) {
        self.state.identified.store(true, Ordering::Relaxed);
    }

    /// Notes that a node has called: its connections have a part in the reserve.
    pub(crate) fn mark_node(&self) {
        if let Some(place) = &self.state.place {
            place.mark_node();
        }
    }
}

impl Known<TcpConnectInfo> {
    /// Returns whose the connection is, as far as that can be told, or refuses one whose user may not call. The kernel is
    /// asked at its first call alone.
    pub(crate) fn check_user(&self, users: &LoopbackUsers) -> Result<Option<u32>, Status> {
        let look = || match (self.inner.remote_addr(), self.inner.local_addr()) {
            (Some(peer), Some(local)) => users.check(peer, local),
            _ => Err(access::denied("the connection is closed")),
        };
        self.state.may_call.get_or_init(look).clone()
    }
}

impl<C> Held<C> {
    /// The connection itself.
    pub(crate) fn get_ref(&self) -> &C {
        &self.connection
    }
}

/// The connections of a listener, as a coordinator takes them: as many as open files allow.
pub fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<Held<TcpStream>>> {
    let max = files::connections_max();
    bounded(
        listener,
        max,
        PlaceLimits { strangers: max - max / RESERVE_PART, peer: (max / PEER_PART).max(1) },
    )
}

/// Those of the port for probes. Nodes do not call there.
pub(crate) fn probes(listener: TcpListener) -> impl Stream<Item = io::Result<Held<TcpStream>>> {
    bounded(listener, PROBES_MAX, PlaceLimits { strangers: PROBES_MAX, peer: PROBES_MAX / PEER_PART })
}

fn bounded(
    listener: TcpListener,
    max: usize,
    limits: PlaceLimits,
) -> impl Stream<Item = io::Result<Held<TcpStream>>> {
    // Streams carry small messages one by one: without this each waits for the acknowledgement of the one before, which the
    // other side delays by 40 ms. The server's own setting is not for connections that are handed to it.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let places = Places::new(limits);
    placed(incoming, max, PATIENCE, move |stream: &TcpStream| match stream.peer_addr() {
        Ok(peer) => places.take(peer.ip()).map(Some).map_err(|why| (peer.ip(), why)),
        // It is gone, as the first read will say.
        Err(_) => Ok(None),
    })
}

/// Those of the Unix socket.
pub(crate) fn local(listener: UnixListener) -> impl Stream<Item = io::Result<Held<Lenient<UnixStream>>>> {
    let incoming = UnixListenerStream::new(listener).map(|taken| taken.map(Lenient::new));
    placed(incoming, LOCAL_MAX, PATIENCE, |_| Ok(None))
}

fn placed<C>(
    incoming: impl Stream<Item = io::Result<C>>,
    max: usize,
    patience: Patience,
    take: impl Fn(&C) -> Result<Option<Place>, (IpAddr, NoPlace)>,
) -> impl Stream<Item = io::Result<Held<C>>> {
    let permits = Arc::new(Semaphore::new(max));
    let incoming = incoming.then(|connection| async {
        if let Err(error) = &connection {
            files::accept_failed(error).await;
        }
        connection
    });
    // What is over its peer's part ends here.
    let placed = incoming.filter_map(move |connection| match connection {
        Err(error) => Some(Err(error)),
        Ok(connection) => match take(&connection) {
            Ok(place) => Some(Ok((connection, place))),
            Err((peer, why)) => {
                files::refused(peer, why);
                None
            }
        },
    });
    placed.then(move |connection| {
        let permits = permits.clone();
        async move {
            let permit = permits.acquire_owned().await.map_err(io::Error::other)?;
            let (connection, place) = connection?;
            let known = Arc::new(State { place, ..State::default() });
            Ok(Held { connection, _permit: permit, known, waits: Some(Waits::new(patience)) })
        }
    })
}

impl<C: Connected> Connected for Held<C> {
    type ConnectInfo = Known<C::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Known { inner: self.connection.connect_info(), state: self.known.clone() }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Held<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let held = &mut *self;
        if held.known.identified.load(Ordering::Relaxed) {
            held.waits = None;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut held.connection).poll_read(context, buffer);
        if let Some(waits) = &mut held.waits {
            waits.heard(buffer.filled().len() - before);
            if waits.is_over(read.is_ready(), context) {
                let why = "nobody has said in time who calls";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
            }
        }
        read
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Held<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(context, slices)
    }
}

/// Refuses a call on loopback by a name that is not its: a page in this machine's browser may have it under a name of its
/// own (DNS rebinding), and is nobody who may run programs here.
pub(crate) fn only_by_loopback_names(called: &Uri) -> Result<(), Status> {
    match called.authority() {
        Some(called) if !is_loopback_name(called) => Err(access::denied(format!(
            "this coordinator listens on loopback and is not called {:?}; call it localhost or by its address",
            called.host().chars().take(64).collect::<String>()
        ))),
        Some(_) | None => Ok(()),
    }
}

fn is_loopback_name(called: &Authority) -> bool {
    let host = called.host().trim_start_matches('[').trim_end_matches([']', '.']);
    let is_address =
        host.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    let host = host.to_ascii_lowercase();
    is_address || host == "localhost" || host.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_few_names() {
        let table = [
            ("localhost:7070", true),
            ("LocalHost.", true),
            ("a.localhost", true),
            ("127.0.0.1:7070", true),
            ("127.1.2.3", true),
            ("[::1]:7070", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("evil.example:7070", false),
            ("localhost.evil.example", false),
            ("evil-localhost", false),
            ("127.0.0.1.evil.example", false),
            ("10.0.0.1", false),
            ("0.0.0.0", false),
            ("[::]:80", false),
        ];
        for (name, expected) in table {
            let called = format!("http://{name}/x").parse().unwrap();
            assert_eq!(only_by_loopback_names(&called).is_ok(), expected, "{name}");
        }
        assert!(only_by_loopback_names(&Uri::from_static("/x")).is_ok());
    }

    #[tokio::test]
    async fn who_finds_no_place_waits_for_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut taken = std::pin::pin!(bounded(listener, 2, PlaceLimits { strangers: 9, peer: 9 }));
        let _clients = [(); 3].map(|()| std::net::TcpStream::connect(address).unwrap());
        let (first, _second) = (taken.next().await.unwrap().unwrap(), taken.next().await.unwrap().unwrap());
        let mut third = std::pin::pin!(taken.next());
        assert!(futures_now(third.as_mut()).await.is_none());
        drop(first);
        third.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_says_nothing_gives_the_place_back() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let patience = Patience { preface: Duration::from_millis(50), call: Duration::from_millis(100) };
        let mut taken = std::pin::pin!(placed(TcpIncoming::from(listener), 3, patience, |_| Ok(None)));
        let mut read = [0; 64];
        for (said, identified, expected) in [
            (0, false, Err(io::ErrorKind::TimedOut)),
            (PREFACE_BYTES - 1, false, Err(io::ErrorKind::TimedOut)),
            (PREFACE_BYTES, false, Err(io::ErrorKind::TimedOut)),
            (PREFACE_BYTES, true, Ok(0)),
        ] {
            let mut client = TcpStream::connect(address).await.unwrap();
            let mut held = taken.next().await.unwrap().unwrap();
            let begun = Instant::now();
            client.write_all(&vec![0; said]).await.unwrap();
            if said > 0 {
                held.read_exact(&mut read[..said]).await.unwrap();
            }
            if identified {
                held.connect_info().identified();
                client.shutdown().await.unwrap();
            }
            let ended = held.read(&mut read).await.map_err(|error| error.kind());
            assert_eq!(ended, expected, "{said} bytes, {identified}");
            let least = if said < PREFACE_BYTES { patience.preface } else { patience.call };
            assert!(identified || begun.elapsed() + Duration::from_millis(20) >= least, "{said} bytes");
        }
    }

    #[tokio::test]
    async fn who_was_not_read_in_time_is_heard_all_the_same() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let patience = Patience { preface: Duration::from_millis(50), call: Duration::from_millis(50) };
        let mut taken = std::pin::pin!(placed(TcpIncoming::from(listener), 3, patience, |_| Ok(None)));
        let mut client = TcpStream::connect(address).await.unwrap();
        let mut held = taken.next().await.unwrap().unwrap();
        client.write_all(&[0; PREFACE_BYTES]).await.unwrap();
        let over = Instant::now() + patience.call + Duration::from_millis(10);
        tokio::time::sleep_until(over).await;
        let mut read = [0; 64];
        assert_eq!(held.read(&mut read).await.unwrap(), PREFACE_BYTES);
        // Once: a connection that goes on without an identified call is ended then.
        let ended = held.read(&mut read).await.map_err(|error| error.kind());
        assert_eq!(ended, Err(io::ErrorKind::TimedOut));
    }

    /// What a future gives at once.
    async fn futures_now<F: Future + Unpin>(mut future: F) -> Option<F::Output> {
        for _ in 0..100 {
            tokio::task::yield_now().await;
            let polled =
                std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut future).poll(context))).await;
            if let Poll::Ready(output) = polled {
                return Some(output);
            }
        }
        None
    }
}
