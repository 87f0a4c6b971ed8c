//! Where devices are on the PCI bus, and which are next to each other.

use std::path::{Path, PathBuf};

use muster_core::Inventory;

use super::number;

/// The directory of a device below a bus address.
pub(super) fn dir_of(sys: &Path, address: &str) -> PathBuf {
    sys.join("bus/pci/devices").join(address)
}

/// The NUMA node of a device; none if the kernel knows of none.
pub(super) fn numa_of(device: &Path) -> Option<u32> {
    number::<i64>(&device.join("numa_node")).and_then(|node| u32::try_from(node).ok())
}

/// The bus address in the name of a device's directory, if it is one such as `0000:1a:00.0`.
pub(super) fn address_in(device: &Path) -> Option<String> {
    let name = device.canonicalize().ok()?.file_name()?.to_str()?.to_owned();
    is_address(&name).then_some(name)
}

fn is_address(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')) && name.matches(':').count() == 2
}

/// As the kernel writes it: NVML has `00000000:1B:00.0`.
pub(super) fn normal(address: &str) -> String {
    let address = address.to_ascii_lowercase();
    match address.split_once(':') {
        Some((domain, rest)) if domain.len() > 4 => format!("{}:{rest}", &domain[domain.len() - 4..]),
        _ => address,
    }
}

/// Fills in to which NUMA node each GPU is attached and which fabric ports are nearest to it, where nobody has said so.
pub(super) fn relate(sys: &Path, found: &mut Inventory) {
    let place = |address: &str| {
        let path = if address.is_empty() { None } else { dir_of(sys, address).canonicalize().ok() };
        path.map(|path| bridges(&path))
    };
    let ports: Vec<_> = found
        .fabric_ports
        .iter()
        .map(|port| (port.device.clone(), place(&port.pci_address), port.numa_node))
        .collect();
    for gpu in &mut found.gpus {
        gpu.pci_address = normal(&gpu.pci_address);
        let own = place(&gpu.pci_address);
        if gpu.numa_node.is_none() && own.is_some() {
            gpu.numa_node = numa_of(&dir_of(sys, &gpu.pci_address));
        }
        if !gpu.near_fabric.is_empty() {
            continue;
        }
        let shared = |other: &Option<Vec<String>>| match (&own, other) {
            (Some(own), Some(other)) => own.iter().zip(other).take_while(|(a, b)| a == b).count(),
            _ => 0,
        };
        let nearest = ports.iter().map(|(_, place, _)| shared(place)).max().unwrap_or(0);
        let is_near = |(_, place, numa): &&(String, Option<Vec<String>>, Option<u32>)| {
            if nearest > 0 { shared(place) == nearest } else { numa.is_some() && *numa == gpu.numa_node }
        };
        gpu.near_fabric = ports.iter().filter(is_near).map(|(device, ..)| device.clone()).collect();
        gpu.near_fabric.dedup();
    }
    // With one node there is nothing to be near to.
    if found.numa_nodes.len() < 2 {
        found.gpus.iter_mut().for_each(|gpu| gpu.numa_node = None);
        found.fabric_ports.iter_mut().for_each(|port| port.numa_node = None);
        found.interfaces.iter_mut().for_each(|nic| nic.numa_node = None);
    }
}

/// The bridges above a device, from the root down: two devices that share one are below the same switch or port.
fn bridges(device: &Path) -> Vec<String> {
    let names = device.components().filter_map(|part| part.as_os_str().to_str());
    let mut all: Vec<String> = names.filter(|name| is_address(name)).map(ToOwned::to_owned).collect();
    all.pop();
    all
}
