//! Network interfaces, and which of them leads where.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;

use muster_core::{Inventory, NetworkInterface};
use nix::ifaddrs::getifaddrs;

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
        for (name, address) in own_addresses() {
            addresses.entry(name).or_default().push(address.to_string());
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

/// This machine's addresses, each with the interface that has it.
fn own_addresses() -> Vec<(String, IpAddr)> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    let ip = |one: nix::ifaddrs::InterfaceAddress| {
        let address = one.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))?;
        // An alias, "eth0:1", is not a name that a socket can be bound to.
        let name = one.interface_name.split(':').next().unwrap_or_default().to_owned();
        Some((name, ip))
    };
    all.filter_map(ip).collect()
}

/// The interface by which `target` is reached, or which has it. Connecting a UDP socket sends nothing; it asks the kernel
/// for the route.
pub(crate) fn interface_towards(target: IpAddr) -> Option<String> {
    let all = own_addresses();
    let with = |wanted: IpAddr| all.iter().find(|(_, ip)| *ip == wanted).map(|(name, _)| name.clone());
    with(target).or_else(|| {
        let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((target, 9)).ok()?;
        with(socket.local_addr().ok()?.ip())
    })
}

/// An address of this host that others may reach.
pub(super) fn address_for_others() -> Option<IpAddr> {
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    own_addresses().into_iter().map(|(_, ip)| ip).find(usable)
}

#[cfg(test)]
mod tests {
    use super::*;

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
