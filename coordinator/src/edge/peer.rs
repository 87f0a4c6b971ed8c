//! Which user of this machine is at the other end of a connection over loopback.
//!
//! The kernel is asked for the peer's socket by its addresses and ports (sock_diag), which takes some
//! microseconds however many sockets there are. A socket that its owner has closed has no user any
//! more and is shown as root's: such an answer is none.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use rustix::process::geteuid;
use tonic::Status;

use crate::access;

/// Bytes of the kernel's answer: one socket, without attributes that were not asked for.
const ANSWER_BYTES_MAX: usize = 4096;

/// Who may call on a port of loopback that asks nobody who he is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LoopbackUsers {
    /// Root and the user who runs the coordinator.
    #[default]
    Own,
    /// These users as well, by their ids.
    Also(BTreeSet<u32>),
    /// Every user of the machine.
    Any,
}

impl LoopbackUsers {
    /// Returns whose a connection is, or refuses, in words, one of a user who may not call. Where everybody may, it may
    /// not be known.
    pub(crate) fn check(&self, peer: SocketAddr, local: SocketAddr) -> Result<Option<u32>, Status> {
        let also = match self {
            Self::Any => return Ok(user(peer, local).ok()),
            Self::Own => None,
            Self::Also(users) => Some(users),
        };
        let own = geteuid().as_raw();
        let words = match user(peer, local) {
            Ok(user) if user == 0 || user == own => return Ok(Some(user)),
            Ok(user) if also.is_some_and(|users| users.contains(&user)) => return Ok(Some(user)),
            Ok(user) => format!(
                "this coordinator runs as user {own} and takes calls on loopback from that user and root, not \
                 from user {user}; start it with --loopback-users {user}, or with --tls-dir and tokens"
            ),
            Err(error) => format!(
                "this coordinator takes calls on loopback from certain users, and cannot tell who calls: \
                 {error}; call by its Unix socket, or start it with --loopback-users any"
            ),
        };
        Err(access::denied(words))
    }
}

/// Returns the user whose socket is bound to `peer` and connected to `local`.
fn user(peer: SocketAddr, local: SocketAddr) -> io::Result<u32> {
    let (peer_ip, local_ip) = (peer.ip().to_canonical(), local.ip().to_canonical());
    let family = match peer_ip {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    };
    let socket_id = SocketId {
        source_port: peer.port(),
        destination_port: local.port(),
        source_address: peer_ip,
        destination_address: local_ip,
        interface_id: 0,
        // Any.
        cookie: [0xff; 8],
    };
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    // The answer is there when the question is sent.
    socket.set_non_blocking(true)?;
    socket.send(&bytes, 0)?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
    socket.recv(&mut answer, 0)?;
    let answer = NetlinkMessage::<SockDiagMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) if found.header.inode != 0 => {
            Ok(found.header.uid)
        }
        NetlinkPayload::InnerMessage(_) => Err(gone()),
        NetlinkPayload::Error(error) if error.raw_code() == -rustix::io::Errno::NOENT.raw_os_error() => {
            Err(gone())
        }
        NetlinkPayload::Error(error) => Err(error.to_io()),
        other => Err(io::Error::other(format!("the kernel answered {other:?}"))),
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "its socket is closed")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_kernel_tells_whose_the_other_end_is() {
        let own = geteuid().as_raw();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (taken, peer) = listener.accept().unwrap();
            let local = taken.local_addr().unwrap();
            assert_eq!(user(peer, local).unwrap(), own, "{address}");
            assert_eq!(LoopbackUsers::Own.check(peer, local).unwrap(), Some(own));
            drop(client);
            let refused = LoopbackUsers::Own.check(peer, local).unwrap_err();
            assert!(refused.message().contains("its socket is closed"), "{refused}");
            assert_eq!(LoopbackUsers::Any.check(peer, local).unwrap(), None);
        }
    }
}
