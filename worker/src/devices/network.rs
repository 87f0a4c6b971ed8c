//! Network interfaces, and which of them leads where.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;

use muster_core::{Inventory, NetworkInterface};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use tracing::info;

use super::{Discovery, entries, number, pci, text};

/// Most interfaces that are listed, and most addresses of each; the API takes no more.
const INTERFACES_MAX: usize = 256;
const ADDRESSES_MAX: usize = 16;

pub(super) struct Network<'a> {
    pub sys: &'a Path,
}

impl Discovery for Network<'_> {
    fn discover(&self, found: &mut Inventory) {
        let dir = self.sys.join("class/net");
        let mut addresses: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for own in own_addresses() {
            addresses.entry(own.interface).or_default().push(own.ip.to_string());
        }
        // A container's host has hundreds of virtual ones: those with hardware behind them, and bonds of those.
        let real =
            |name: &String| ["device", "bonding"].iter().any(|what| dir.join(name).join(what).exists());
        let names = entries(&dir).into_iter().filter(real).take(INTERFACES_MAX);
        let interface = |name: String| {
            let at = dir.join(&name);
            let mut addresses = addresses.remove(&name).unwrap_or_default();
            addresses.truncate(ADDRESSES_MAX);
            NetworkInterface {
                addresses,
                up: text(&at.join("operstate")).as_deref() == Some("up"),
                // The kernel says -1 of one without a link.
                speed_mbps: number::<i64>(&at.join("speed"))
                    .and_then(|mbps| mbps.try_into().ok())
                    .unwrap_or(0),
                mtu_bytes: number(&at.join("mtu")).unwrap_or(0),
                numa_node: pci::numa_of(&at.join("device")),
                name,
            }
        };
        found.interfaces = names.map(interface).collect();
    }
}

/// One of this machine's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Own {
    interface: String,
    is_loopback: bool,
    ip: IpAddr,
}

/// This machine's addresses, each with the interface that has it.
fn own_addresses() -> Vec<Own> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    let ip = |one: nix::ifaddrs::InterfaceAddress| {
        let address = one.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))?;
        // An alias, "eth0:1", is not a name that a socket can be bound to.
        let name = one.interface_name.split(':').next().unwrap_or_default().to_owned();
        let is_loopback = one.flags.contains(InterfaceFlags::IFF_LOOPBACK);
        Some(Own { interface: name, is_loopback, ip })
    };
    all.filter_map(ip).collect()
}

/// The interface by which `target` is reached, or which has it. Connecting a UDP socket sends nothing; it asks the kernel
/// for the route.
pub(crate) fn interface_towards(target: IpAddr) -> Option<String> {
    let all = own_addresses();
    if all.iter().any(|own| own.ip == target) {
        return interface_of(&all, target);
    }
    interface_of(&all, source_towards(target).ok()?)
}

/// Returns the address from which `target` is reached. Connecting a UDP socket sends nothing; it
/// asks the kernel for the route.
pub(crate) fn source_towards(target: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((target, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// Returns the address that other nodes are told, of a host that has found `own` behind a name.
/// Many have their own name stand for a loopback address (127.0.1.1, ::1), where no other host
/// finds them. An address or `localhost` is meant as it is.
pub fn for_others(name: &str, own: IpAddr) -> IpAddr {
    let is_meant = name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok();
    if !own.is_loopback() || is_meant {
        return own;
    }
    let Some(address) = address_for_others() else { return own };
    info!(name, loopback = %own, %address, "the name stands for loopback here: others are told the host's address");
    address
}

/// The interface that has an address. A host that is routed to (BGP) has its own on loopback, where nobody reaches ranks that
/// listen on all that the interface has: then it is the only other one with an address. Of several none is named, and NCCL and
/// Gloo find their way by the routes.
fn interface_of(all: &[Own], ip: IpAddr) -> Option<String> {
    let mut with = all.iter().filter(|own| own.ip == ip);
    if let Some(own) = with.clone().find(|own| !own.is_loopback) {
        return Some(own.interface.clone());
    }
    if ip.is_loopback() {
        return with.next().map(|own| own.interface.clone());
    }
    with.next()?;
    let usable = |own: &&Own| !own.is_loopback && own.ip.is_ipv4() == ip.is_ipv4() && is_for_others(&own.ip);
    let others: BTreeSet<&str> = all.iter().filter(usable).map(|own| own.interface.as_str()).collect();
    if others.len() == 1 { others.first().map(ToString::to_string) } else { None }
}

fn is_for_others(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

/// Returns an address of this host that others may reach: that of its way to everywhere else, else
/// any that is not its own affair.
pub(super) fn address_for_others() -> Option<IpAddr> {
    // Addresses for examples (RFC 5737 and 3849), which nobody has: only a default route leads
    // there.
    let anywhere: [IpAddr; 2] = [[192, 0, 2, 1].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()];
    let by_route = anywhere.into_iter().find_map(|target| source_towards(target).ok().filter(is_for_others));
    by_route.or_else(|| own_addresses().into_iter().map(|own| own.ip).find(is_for_others))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, Option<&'a str>);

    #[test]
    fn an_address_on_loopback_that_is_routed_to_does_not_make_loopback_the_way() {
        let own = |interface: &str, ip: &str| Own {
            interface: interface.to_owned(),
            is_loopback: interface == "lo",
            ip: ip.parse().unwrap(),
        };
        let host = |more: &[(&str, &str)]| {
            let base = [("lo", "127.0.0.1"), ("lo", "10.9.9.9"), ("lo", "fd00::9")];
            base.iter().chain(more).map(|(name, ip)| own(name, ip)).collect::<Vec<_>>()
        };
        let table: [Case<'_>; 8] = [
            (&[("eth0", "192.0.2.1")], "10.9.9.9", Some("eth0")),
            (&[("eth0", "192.0.2.1"), ("eth0", "192.0.2.2")], "10.9.9.9", Some("eth0")),
            (&[("eth0", "192.0.2.1"), ("eth1", "192.0.2.3")], "10.9.9.9", None),
            // Without numbers of their own.
            (&[("eth0", "fe80::1"), ("eth1", "fe80::2")], "10.9.9.9", None),
            (&[("eth0", "fe80::1"), ("eth1", "fd01::2")], "fd00::9", Some("eth1")),
            // It is on both.
            (&[("eth1", "10.9.9.9")], "10.9.9.9", Some("eth1")),
            (&[("eth0", "192.0.2.1")], "127.0.0.1", Some("lo")),
            (&[("eth0", "192.0.2.1")], "203.0.113.1", None),
        ];
        for (more, ip, expected) in table {
            assert_eq!(interface_of(&host(more), ip.parse().unwrap()).as_deref(), expected, "{more:?} {ip}");
        }
    }

    #[test]
    fn loopback_is_reached_by_loopback() {
        assert_eq!(interface_towards([127, 0, 0, 1].into()).as_deref(), Some("lo"));
        assert_eq!(
            interface_towards([127, 9, 9, 9].into()).as_deref(),
            Some("lo"),
            "the whole net is its own"
        );
    }
}
