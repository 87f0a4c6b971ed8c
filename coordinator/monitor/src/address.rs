//! Where a daemon serves its page, and where it may.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use tokio::net::{TcpListener, TcpSocket};

/// Connections of a page that may wait to be taken.
const PAGE_BACKLOG_MAX: u32 = 1024;

/// Where a daemon's page is.
#[derive(Clone, Copy, Debug)]
pub struct Http {
    /// Where it is served.
    pub listen: Listen,
    /// Also on an address that is not loopback, in the clear.
    pub insecure: bool,
}

impl Http {
    /// No page.
    pub const OFF: Self = Self { listen: Listen::Off, insecure: false };
}

/// What `--http-listen` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Nowhere.
    Off,
    /// At this address if it is free: nobody asked for it, and a second daemon on a host need not fail for it.
    Perhaps(SocketAddr),
    /// At this address.
    At(SocketAddr),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            text => (text.trim().parse().map(Self::At)).map_err(|_| {
                "it is neither `off` nor an address and a port such as 127.0.0.1:7071 or [::]:7071".to_owned()
            }),
        }
    }
}

/// Why the page cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Whoever reaches it can read it.
    #[error(
        "--http-listen {0} is not a loopback address, and anybody who reaches it could read how much this cluster has \
         and what it is busy with, in the clear; listen on 127.0.0.1 and let Prometheus come through a proxy that \
         authenticates it, or pass --http-insecure if the network is yours alone"
    )]
    NotLoopback(SocketAddr),
    /// The address cannot be bound.
    #[error("failed to serve metrics on {address}: {source}; choose another --http-listen, or `off`")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// Listens at an address. `[::]` is every address of the machine, those of IPv4 as well, and
/// 0.0.0.0 where the kernel has no IPv6: one setting is good for every host.
///
/// # Errors
/// Those of the kernel: the port is taken, or the address is not this machine's.
pub fn listen(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let every = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    match bind_socket(address, backlog) {
        Err(error) if address.ip() == every && error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32) => {
            bind_socket((Ipv4Addr::UNSPECIFIED, address.port()).into(), backlog)
        }
        bound => bound,
    }
}

fn bind_socket(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if address.is_ipv6() && address.ip().is_unspecified() {
        // Whatever the machine has as its default (net.ipv6.bindv6only).
        setsockopt(&socket, Ipv6V6Only, &false)?;
    }
    // So that a daemon that is started again need not wait for the connections of the one before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(backlog)
}

/// Returns an address as its owner writes it: a port of both families shows one of IPv4 as mapped
/// into IPv6.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        v4 @ IpAddr::V4(_) => SocketAddr::new(v4, address.port()),
        IpAddr::V6(_) => address,
    }
}

/// Binds the address. None if nothing is to be served, or if nobody asked for an address that cannot be had: whoever starts
/// the daemon says so, after the line of its log that comes first.
pub async fn bind(http: Http) -> Result<Option<TcpListener>, AddressError> {
    let (address, asked) = match http.listen {
        Listen::Off => return Ok(None),
        Listen::Perhaps(address) => (address, false),
        Listen::At(address) => (address, true),
    };
    if !address.ip().is_loopback() && !http.insecure {
        return Err(AddressError::NotLoopback(address));
    }
    match listen(address, PAGE_BACKLOG_MAX) {
        Ok(listener) => Ok(Some(listener)),
        Err(source) if asked => Err(AddressError::Bind { address, source }),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Listen {
        text.parse().unwrap()
    }

    async fn bound(listen: Listen, insecure: bool) -> Result<Option<TcpListener>, AddressError> {
        bind(Http { listen, insecure }).await
    }

    #[test]
    fn addresses_as_they_are_written() {
        assert_eq!(at("off"), Listen::Off);
        assert_eq!(at("127.0.0.1:0"), Listen::At(([127, 0, 0, 1], 0).into()));
        assert!("localhost".parse::<Listen>().unwrap_err().contains("127.0.0.1:7071"));
    }

    #[tokio::test]
    async fn beyond_loopback_only_for_those_who_say_so() {
        assert!(bound(Listen::Off, false).await.unwrap().is_none());
        let refused = bound(at("0.0.0.0:0"), false).await.unwrap_err().to_string();
        assert!(refused.contains("--http-insecure"), "{refused}");
        assert!(bound(at("0.0.0.0:0"), true).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn every_address_is_that_of_both_families() {
        let listener = listen("[::]:0".parse().unwrap(), 1).unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        // Of the loopback addresses of one family the other's are not.
        let listener = listen("[::1]:0".parse().unwrap(), 1);
        let Ok(listener) = listener else { return };
        let port = listener.local_addr().unwrap().port();
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error_only_where_it_was_asked_for() {
        let first = bound(at("127.0.0.1:0"), false).await.unwrap().unwrap();
        let taken = first.local_addr().unwrap();
        assert!(bound(Listen::Perhaps(taken), false).await.unwrap().is_none());
        let refused = bound(Listen::At(taken), false).await.unwrap_err().to_string();
        assert!(refused.contains("choose another --http-listen"), "{refused}");
    }
}
