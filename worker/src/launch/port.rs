//! The master port: chosen before the ranks run, and kept for rank 0 until the gang has ended.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

/// Ports tried before the node gives up: somebody may listen at one of them on another of its addresses.
const ATTEMPTS_MAX: usize = 16;

/// A port that the kernel gives to nobody, but that a listener with SO_REUSEADDR can bind: rank 0's, for
/// libtorch's store sets it. It works because the socket here has the option too and does not listen.
#[derive(Debug)]
pub(crate) struct MasterPort {
    number: u16,
    _held: Socket,
}

impl MasterPort {
    /// Takes a port of `address`, which must be one of this node's. The port is kept on every address, for rank 0
    /// may listen on all of them.
    pub fn take(address: IpAddr) -> io::Result<Self> {
        let mut refused = None;
        for _ in 0..ATTEMPTS_MAX {
            let chosen = bind(SocketAddr::new(address, 0))?;
            let number = chosen.local_addr()?.as_socket().map_or(0, |address| address.port());
            match hold(number) {
                Ok(held) => return Ok(Self { number, _held: held }),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}

/// Binds every address; those of IPv4 alone on a machine without IPv6.
fn hold(port: u16) -> io::Result<Socket> {
    match bind((Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => bind((Ipv4Addr::UNSPECIFIED, port).into()),
        held => held,
    }
}

fn bind(address: SocketAddr) -> io::Result<Socket> {
    // Rust's sockets are closed on exec: no rank holds this one.
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn rank_0_can_listen_and_nobody_else_gets_the_port() {
        let port = MasterPort::take(Ipv4Addr::LOCALHOST.into()).unwrap();
        for address in ["127.0.0.1", "0.0.0.0", "::"] {
            let address: IpAddr = address.parse().unwrap();
            // Rust sets SO_REUSEADDR, as libtorch does.
            let listener = match TcpListener::bind((address, port.number())) {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => continue,
                listener => listener.unwrap(),
            };
            TcpStream::connect((Ipv4Addr::LOCALHOST, port.number())).unwrap();
            drop(listener);
        }
        // Whoever asks for just any port gets another, with the option and without.
        let others: Vec<_> = (0..2000).map_while(|_| bind((Ipv4Addr::LOCALHOST, 0).into()).ok()).collect();
        let taken = others.iter().map(|other| other.local_addr().unwrap().as_socket().unwrap().port());
        assert!(others.len() > 100 && taken.into_iter().all(|other| other != port.number()));
        assert!(MasterPort::take([192, 0, 2, 1].into()).is_err(), "not an address of this node");
    }
}
