//! InfiniBand and RoCE ports, and the counters of what goes wrong on them, from sysfs.

use std::path::{Path, PathBuf};

use muster_core::{FabricPort, Inventory, LinkLayer, PortState};
use muster_worker_core::health::PortCounters;

use super::{Discovery, entries, number, pci, text};

/// Most ports that are listed; the API takes no more.
const PORTS_MAX: usize = 256;
/// What counts as an error of the link. Discards for want of credit and the like are no fault of it.
const ERROR_COUNTERS: [&str; 5] = [
    "symbol_error",
    "link_error_recovery",
    "port_rcv_errors",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
];

pub(super) struct Fabric<'a> {
    pub sys: &'a Path,
}

impl Discovery for Fabric<'_> {
    fn discover(&self, found: &mut Inventory) {
        let dir = self.sys.join("class/infiniband");
        for device in entries(&dir) {
            let ports = dir.join(&device).join("ports");
            let numbers = entries(&ports).into_iter().filter_map(|port| port.parse().ok());
            found.fabric_ports.extend(numbers.map(|port| read(&dir.join(&device), &device, port)));
        }
        found.fabric_ports.truncate(PORTS_MAX);
    }
}

fn read(dir: &Path, device: &str, port: u32) -> FabricPort {
    let at = dir.join("ports").join(port.to_string());
    let field = |name: &str| text(&at.join(name)).unwrap_or_default();
    // "4: ACTIVE"
    let after_number =
        |value: String| value.split_once(": ").map_or(value.clone(), |(_, name)| name.to_owned());
    let (rate_mbps, speed) = rate(&field("rate"));
    let hardware = dir.join("device");
    FabricPort {
        device: device.to_owned(),
        port,
        link_layer: match field("link_layer").as_str() {
            "InfiniBand" => LinkLayer::InfiniBand,
            "Ethernet" => LinkLayer::Ethernet,
            _ => LinkLayer::Other,
        },
        state: match field("state").split(':').next().unwrap_or_default() {
            "1" => PortState::Down,
            "2" => PortState::Init,
            "3" => PortState::Armed,
            "4" => PortState::Active,
            "5" => PortState::ActiveDefer,
            _ => PortState::Unknown,
        },
        physical_state: after_number(field("phys_state")),
        rate_mbps,
        speed,
        pci_address: pci::address_in(&hardware).unwrap_or_default(),
        numa_node: pci::numa_of(&hardware),
        interface: interface(&at, &hardware, port).unwrap_or_default(),
    }
}

/// "400 Gb/sec (4X NDR)", "2.5 Gb/sec (1X SDR)"
fn rate(text: &str) -> (u32, String) {
    let (amount, rest) = text.split_once(" Gb/sec").unwrap_or(("0", ""));
    let gbps: f64 = amount.trim().parse().unwrap_or(0.0);
    ((gbps * 1000.0).round() as u32, rest.trim().trim_matches(['(', ')']).to_owned())
}

/// The network interface of the same port.
fn interface(port_dir: &Path, hardware: &Path, port: u32) -> Option<String> {
    if let Some(name) = text(&port_dir.join("gid_attrs/ndevs/0")) {
        return Some(name);
    }
    let net = hardware.join("net");
    let names = entries(&net);
    let number_of = |name: &String| number::<u32>(&net.join(name).join("dev_port")).unwrap_or(0);
    names.iter().find(|name| number_of(name) + 1 == port).cloned()
}

/// What has gone wrong on a port since it was made, as far as its device counts.
pub(super) fn counters(sys: &Path, port: &FabricPort) -> PortCounters {
    let dir = sys.join("class/infiniband").join(&port.device).join("ports");
    let dir: PathBuf = dir.join(port.port.to_string()).join("counters");
    let count = |name: &str| number::<u64>(&dir.join(name)).unwrap_or(0);
    PortCounters {
        link_downed: count("link_downed"),
        errors: ERROR_COUNTERS.iter().map(|name| count(name)).fold(0, u64::saturating_add),
    }
}
