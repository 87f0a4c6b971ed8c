//! Where a daemon serves its page, and where it may.

use std::io;
use std::net::SocketAddr;
use std::str::FromStr;

use tokio::net::TcpListener;

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
            text => (text.parse().map(Self::At)).map_err(|_| {
                "it is neither `off` nor an address and a port such as 127.0.0.1:7071".to_owned()
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
    match TcpListener::bind(address).await {
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
    async fn a_taken_port_is_an_error_only_where_it_was_asked_for() {
        let first = bound(at("127.0.0.1:0"), false).await.unwrap().unwrap();
        let taken = first.local_addr().unwrap();
        assert!(bound(Listen::Perhaps(taken), false).await.unwrap().is_none());
        let refused = bound(Listen::At(taken), false).await.unwrap_err().to_string();
        assert!(refused.contains("choose another --http-listen"), "{refused}");
    }
}
