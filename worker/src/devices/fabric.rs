//! InfiniBand and RoCE ports, and the counters of what goes wrong on them, from sysfs.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use muster_core::{FabricPort, Inventory, LinkLayer, PortState};
use muster_worker_core::health::PortCounters;

use super::{Discovery, entries, number, pci, text};

/// Most ports that are listed; the API takes no more.
const PORTS_MAX: usize = 256;
/// The same of what RoCE's devices count beside it, where the names of InfiniBand stay at 0:
/// packets that came damaged. What is retransmitted or discarded is not among them: that tells of a
/// congested network, and of peers that were killed.
const ERROR_HW_COUNTERS: [&str; 2] = ["rx_icrc_encapsulated", "rx_roce_errors"];
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
        for port in &mut found.fabric_ports {
            port.unfit = unfit(self.sys, port).unwrap_or_default();
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
        unfit: String::new(),
    }
}

/// Returns why ranks are not to use a port, whatever its state is.
fn unfit(sys: &Path, port: &FabricPort) -> Option<String> {
    let (own, dir) = (sys.join("class/infiniband").join(&port.device), sys.join("class/infiniband"));
    // In a machine or container that was given virtual functions alone, they are what is to be used.
    if let Some(physical) = pci::address_in(&own.join("device/physfn")) {
        let is_it =
            |device: &String| pci::address_in(&dir.join(device).join("device")).as_ref() == Some(&physical);
        if let Some(device) = entries(&dir).into_iter().find(is_it) {
            return Some(format!("is a virtual function of {device}, which is here as well"));
        }
    }
    if let Some(why) = closed(&own, &sys.with_file_name("dev"), &port.device) {
        return Some(why);
    }
    let gids = own.join("ports").join(port.port.to_string()).join("gids");
    let is_routable = |index: String| text(&gids.join(index)).is_some_and(|gid| is_routable(&gid));
    if port.link_layer == LinkLayer::Ethernet && !entries(&gids).into_iter().any(is_routable) {
        return Some(
            "has no address that others reach: its network interface has none, or a link-local one".into(),
        );
    }
    None
}

/// Returns why programs cannot use a port's device: each opens its file in /dev. It is opened, for
/// in a container neither a listing nor the file's mode says anything.
fn closed(own: &Path, dev: &Path, device: &str) -> Option<String> {
    let verbs = own.join("device/infiniband_verbs");
    let names = entries(&verbs);
    // Several devices may be one function of the bus.
    let is_its = |name: &&String| text(&verbs.join(name).join("ibdev")).as_deref() == Some(device);
    let name = names.iter().find(is_its).or(names.first())?;
    // The tree of another machine comes without its devices.
    if !dev.is_dir() {
        return None;
    }
    let path = dev.join("infiniband").join(name);
    let error = OpenOptions::new().read(true).write(true).open(&path).err()?;
    let fix = match error.kind() {
        ErrorKind::NotFound => "load ib_uverbs, or give the container /dev/infiniband",
        ErrorKind::PermissionDenied => "give the daemon's user access to it, or the container the device",
        _ => "look at the device's driver in the kernel's log",
    };
    Some(format!("cannot be used by programs: {} cannot be opened: {error}; {fix}", path.display()))
}

/// Returns what is wrong with the GID of this index on a port of RoCE, which a user has named for
/// NCCL.
pub(crate) fn gid_fault(sys: &Path, port: &FabricPort, index: u32) -> Option<String> {
    if port.link_layer != LinkLayer::Ethernet {
        return None;
    }
    let dir = sys.join("class/infiniband").join(&port.device).join("ports").join(port.port.to_string());
    let gid = text(&dir.join("gids").join(index.to_string()));
    let Some(gid) = gid.filter(|gid| gid.parse() != Ok(Ipv6Addr::UNSPECIFIED)) else {
        return Some(format!("{} has no GID {index}", port.name()));
    };
    if !is_routable(&gid) {
        return Some(format!("GID {index} of {} is link-local: {gid}", port.name()));
    }
    let kind = text(&dir.join("gid_attrs/types").join(index.to_string()));
    let kind = kind.filter(|kind| kind.ends_with("v1"))?;
    Some(format!("GID {index} of {} is of {kind}, which no router passes on", port.name()))
}

/// Returns whether others reach a port of RoCE by this GID: not by none, nor by a link-local address.
fn is_routable(gid: &str) -> bool {
    let Ok(address) = gid.parse::<Ipv6Addr>() else { return false };
    match address.to_ipv4_mapped() {
        Some(v4) => !v4.is_unspecified() && !v4.is_link_local(),
        None => !address.is_unspecified() && !address.is_unicast_link_local(),
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
    let dir: PathBuf = dir.join(port.port.to_string());
    let count = |name: &str| number::<u64>(&dir.join("counters").join(name)).unwrap_or(0);
    let hw_count = |name: &str| number::<u64>(&dir.join("hw_counters").join(name)).unwrap_or(0);
    let errors = ERROR_COUNTERS.iter().map(|name| count(name));
    let errors = errors.chain(ERROR_HW_COUNTERS.iter().map(|name| hw_count(name)));
    PortCounters { link_downed: count("link_downed"), errors: errors.fold(0, u64::saturating_add) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes a device with one port at a place on the bus.
    fn device(sys: &Path, name: &str, pci: &str, layer: &str, gids: &[&str]) {
        let dir = sys.join("class/infiniband").join(name);
        let gid_dir = dir.join("ports/1/gids");
        fs::create_dir_all(&gid_dir).unwrap();
        fs::create_dir_all(sys.join("devices").join(pci)).unwrap();
        symlink(sys.join("devices").join(pci), dir.join("device")).unwrap();
        let port = dir.join("ports/1");
        fs::write(port.join("state"), "4: ACTIVE\n").unwrap();
        fs::write(port.join("link_layer"), format!("{layer}\n")).unwrap();
        for (index, gid) in gids.iter().enumerate() {
            fs::write(gid_dir.join(index.to_string()), format!("{gid}\n")).unwrap();
        }
    }

    fn unfit(sys: &Path) -> Vec<String> {
        let mut found = Inventory::default();
        Fabric { sys }.discover(&mut found);
        found.fabric_ports.into_iter().map(|port| port.unfit).collect()
    }

    #[test]
    fn virtual_functions_are_not_used_beside_their_physical_one() {
        let sys = tempfile::tempdir().unwrap();
        let link_local = ["fe80:0000:0000:0000:0200:0000:0000:0001"];
        device(sys.path(), "mlx5_1", "0000:1b:00.1", "InfiniBand", &link_local);
        let function = sys.path().join("devices/0000:1b:00.1/physfn");
        fs::create_dir_all(sys.path().join("devices/0000:1b:00.0")).unwrap();
        symlink(sys.path().join("devices/0000:1b:00.0"), function).unwrap();
        assert_eq!(unfit(sys.path()), [""], "a machine that was given the virtual one alone");
        device(sys.path(), "mlx5_0", "0000:1b:00.0", "InfiniBand", &link_local);
        assert_eq!(unfit(sys.path()), ["", "is a virtual function of mlx5_0, which is here as well"]);
    }

    #[test]
    fn ethernet_ports_need_an_address_that_others_reach() {
        let none = "0000:0000:0000:0000:0000:0000:0000:0000";
        let link_local = "fe80:0000:0000:0000:0200:00ff:fe00:0001";
        let table: [(&str, &[&str], bool); 8] = [
            ("Ethernet", &[], false),
            ("Ethernet", &[none, link_local], false),
            ("Ethernet", &[link_local, "0000:0000:0000:0000:0000:ffff:a9fe:0001"], false),
            ("Ethernet", &[link_local, "0000:0000:0000:0000:0000:ffff:0a00:0001"], true),
            ("Ethernet", &[link_local, "fd00:0000:0000:0000:0000:0000:0000:0001"], true),
            ("Ethernet", &["no address"], false),
            ("InfiniBand", &[link_local], true),
            ("InfiniBand", &[], true),
        ];
        for (layer, gids, fit) in table {
            let sys = tempfile::tempdir().unwrap();
            device(sys.path(), "mlx5_0", "0000:1b:00.0", layer, gids);
            assert_eq!(unfit(sys.path())[0].is_empty(), fit, "{layer} {gids:?}");
        }
    }

    #[test]
    fn a_port_whose_device_cannot_be_opened_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let (sys, dev) = (dir.path().join("sys"), dir.path().join("dev"));
        device(&sys, "mlx5_0", "0000:1b:00.0", "InfiniBand", &[]);
        let verbs = sys.join("class/infiniband/mlx5_0/device/infiniband_verbs");
        for (name, of) in [("uverbs1", "rocep1"), ("uverbs7", "mlx5_0")] {
            fs::create_dir_all(verbs.join(name)).unwrap();
            fs::write(verbs.join(name).join("ibdev"), format!("{of}\n")).unwrap();
        }
        assert_eq!(unfit(&sys), [""], "the tree of another machine");
        fs::create_dir(&dev).unwrap();
        let path = dev.join("infiniband/uverbs7");
        let why = unfit(&sys).remove(0);
        let words = format!("cannot be used by programs: {} cannot be opened: No such file", path.display());
        assert!(why.starts_with(&words) && why.ends_with("give the container /dev/infiniband"), "{why}");
        fs::create_dir_all(&path).unwrap();
        let why = unfit(&sys).remove(0);
        assert!(why.contains("Is a directory") && why.ends_with("kernel's log"), "{why}");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(unfit(&sys), [""]);
    }

    #[test]
    fn a_gid_that_a_user_names_must_be_there_and_lead_to_others() {
        let sys = tempfile::tempdir().unwrap();
        let gids = [
            "fe80:0000:0000:0000:0200:00ff:fe00:0001",
            "0000:0000:0000:0000:0000:0000:0000:0000",
            "0000:0000:0000:0000:0000:ffff:0a00:0001",
            "0000:0000:0000:0000:0000:ffff:0a00:0001",
        ];
        device(sys.path(), "mlx5_0", "0000:1b:00.0", "Ethernet", &gids);
        let types = sys.path().join("class/infiniband/mlx5_0/ports/1/gid_attrs/types");
        fs::create_dir_all(&types).unwrap();
        fs::write(types.join("2"), "IB/RoCE v1\n").unwrap();
        fs::write(types.join("3"), "RoCE v2\n").unwrap();
        let mut found = Inventory::default();
        Fabric { sys: sys.path() }.discover(&mut found);
        let port = found.fabric_ports.remove(0);
        let fault = |index| gid_fault(sys.path(), &port, index).unwrap_or_default();
        assert!(fault(0).contains("is link-local: fe80:"), "{}", fault(0));
        assert_eq!(fault(1), "mlx5_0:1 has no GID 1");
        assert_eq!(fault(2), "GID 2 of mlx5_0:1 is of IB/RoCE v1, which no router passes on");
        assert_eq!(fault(3), "");
        assert_eq!(fault(9), "mlx5_0:1 has no GID 9");
        let port = FabricPort { link_layer: LinkLayer::InfiniBand, ..port };
        assert_eq!(gid_fault(sys.path(), &port, 9), None);
    }

    #[test]
    fn damaged_packets_count_whichever_directory_counts_them() {
        let sys = tempfile::tempdir().unwrap();
        device(sys.path(), "mlx5_0", "0000:1b:00.0", "Ethernet", &[]);
        let mut found = Inventory::default();
        Fabric { sys: sys.path() }.discover(&mut found);
        let port = &found.fabric_ports[0];
        assert_eq!(counters(sys.path(), port), PortCounters::default());
        for (file, value) in [
            ("counters/symbol_error", 3),
            ("counters/link_downed", 2),
            ("counters/port_xmit_wait", 1000),
            ("hw_counters/rx_icrc_encapsulated", 40),
            ("hw_counters/local_ack_timeout_err", 5000),
        ] {
            let path = sys.path().join("class/infiniband/mlx5_0/ports/1").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        assert_eq!(counters(sys.path(), port), PortCounters { link_downed: 2, errors: 43 });
    }
}
