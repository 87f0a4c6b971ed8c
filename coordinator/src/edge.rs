//! What stands between a listener and the services: how many connections there may be, by which name they may call, and
//! the port that probes ask.

pub(crate) mod peer;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use http::Uri;
use http::uri::Authority;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

use crate::access;
use peer::LoopbackUsers;

/// Connections at once: two for each node that there may be. Further ones wait to be taken.
pub(crate) const CONNECTIONS_MAX: usize = 32_768;
/// Those of this machine's own users.
const LOCAL_MAX: usize = 1024;
/// Those of probes.
const PROBES_MAX: usize = 64;

/// A connection that holds one of the places until it ends.
#[derive(Debug)]
pub struct Held<C> {
    connection: C,
    _place: OwnedSemaphorePermit,
    known: Arc<OnceLock<Result<(), Status>>>,
}

/// What is known of a connection: its addresses, and once somebody has looked, whether its user may call.
#[derive(Clone, Debug)]
pub struct Known<I> {
    /// Its addresses.
    pub(crate) inner: I,
    may_call: Arc<OnceLock<Result<(), Status>>>,
}

impl Known<TcpConnectInfo> {
    /// Refuses a connection whose user may not call. The kernel is asked at its first call alone.
    pub(crate) fn check_user(&self, users: &LoopbackUsers) -> Result<(), Status> {
        let look = || match (self.inner.remote_addr(), self.inner.local_addr()) {
            (Some(peer), Some(local)) => users.check(peer, local),
            _ => Err(access::denied("the connection is closed")),
        };
        self.may_call.get_or_init(look).clone()
    }
}

impl<C> Held<C> {
    /// The connection itself.
    pub(crate) fn get_ref(&self) -> &C {
        &self.connection
    }
}

/// The connections of a listener, as a coordinator takes them.
pub fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<Held<TcpStream>>> {
    bounded(listener, CONNECTIONS_MAX)
}

/// Those of the port for probes.
pub(crate) fn probes(listener: TcpListener) -> impl Stream<Item = io::Result<Held<TcpStream>>> {
    bounded(listener, PROBES_MAX)
}

fn bounded(listener: TcpListener, max: usize) -> impl Stream<Item = io::Result<Held<TcpStream>>> {
    // Streams carry small messages one by one: without this each waits for the acknowledgement of the one before, which the
    // other side delays by 40 ms. The server's own setting is not for connections that are handed to it.
    placed(TcpIncoming::from(listener).with_nodelay(Some(true)), max)
}

/// Those of the Unix socket.
pub(crate) fn local(listener: UnixListener) -> impl Stream<Item = io::Result<Held<UnixStream>>> {
    placed(UnixListenerStream::new(listener), LOCAL_MAX)
}

fn placed<C>(
    incoming: impl Stream<Item = io::Result<C>>,
    max: usize,
) -> impl Stream<Item = io::Result<Held<C>>> {
    let places = Arc::new(Semaphore::new(max));
    incoming.then(move |connection| {
        let places = places.clone();
        async move {
            let place = places.acquire_owned().await.map_err(io::Error::other)?;
            Ok(Held { connection: connection?, _place: place, known: Arc::default() })
        }
    })
}

impl<C: Connected> Connected for Held<C> {
    type ConnectInfo = Known<C::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Known { inner: self.connection.connect_info(), may_call: self.known.clone() }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Held<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(context, buffer)
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
        let mut taken = std::pin::pin!(bounded(listener, 2));
        let _clients = [(); 3].map(|()| std::net::TcpStream::connect(address).unwrap());
        let (first, _second) = (taken.next().await.unwrap().unwrap(), taken.next().await.unwrap().unwrap());
        let mut third = std::pin::pin!(taken.next());
        assert!(futures_now(third.as_mut()).await.is_none());
        drop(first);
        third.await.unwrap().unwrap();
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
