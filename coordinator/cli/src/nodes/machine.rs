//! What one machine has, as tables.

use muster_proto::v1;

use crate::output::table;
use crate::units::show_bytes;

/// Everything about a machine that its inventory says, beside totals and labels.
pub(super) fn show(inventory: &v1::Inventory) -> Vec<String> {
    let numa = |node: Option<u32>| node.map_or("-".to_owned(), |node| node.to_string());
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let mut all = limits(inventory);
    let gpu = |gpu: &v1::Device| {
        let state = if gpu.fault.is_empty() { "well".to_owned() } else { format!("faulty: {}", gpu.fault) };
        let memory = if gpu.memory_bytes == 0 { "-".to_owned() } else { show_bytes(gpu.memory_bytes) };
        vec![
            gpu.index.unwrap_or(0).to_string(),
            or_dash(&gpu.model),
            memory,
            or_dash(&gpu.pci_address),
            numa(gpu.numa_node),
            or_dash(&gpu.near_fabric.join(",")),
            or_dash(&gpu.uuid),
            state,
        ]
    };
    let header = ["GPU", "MODEL", "MEMORY", "PCI", "NUMA", "NEXT TO", "UUID", "STATE"];
    add(&mut all, &header, &inventory.gpus.iter().map(gpu).collect::<Vec<_>>());
    let port = |port: &v1::FabricPort| {
        let layer = match port.link_layer() {
            v1::LinkLayer::Unspecified => "?",
            v1::LinkLayer::Infiniband => "InfiniBand",
            v1::LinkLayer::Ethernet => "RoCE",
        };
        let state = port.state().as_str_name().trim_start_matches("PORT_STATE_").to_owned();
        vec![
            format!("{}:{}", port.device, port.port),
            layer.to_owned(),
            if port.unfit.is_empty() {
                format!("{state} ({})", port.physical_state)
            } else {
                format!("{state}, not used: {}", port.unfit)
            },
            format!("{} Gb/s {}", f64::from(port.rate_mbps) / 1000.0, port.speed),
            or_dash(&port.pci_address),
            numa(port.numa_node),
            or_dash(&port.interface),
        ]
    };
    let header = ["PORT", "LINK", "STATE", "RATE", "PCI", "NUMA", "INTERFACE"];
    add(&mut all, &header, &inventory.fabric_ports.iter().map(port).collect::<Vec<_>>());
    let interface = |nic: &v1::NetworkInterface| {
        let speed = if nic.speed_mbps == 0 { "-".to_owned() } else { format!("{} Mb/s", nic.speed_mbps) };
        let link = if nic.up { "up" } else { "down" };
        let addresses = or_dash(&nic.addresses.join(","));
        vec![
            nic.name.clone(),
            addresses,
            link.to_owned(),
            speed,
            nic.mtu_bytes.to_string(),
            numa(nic.numa_node),
        ]
    };
    let header = ["INTERFACE", "ADDRESSES", "LINK", "SPEED", "MTU", "NUMA"];
    add(&mut all, &header, &inventory.interfaces.iter().map(interface).collect::<Vec<_>>());
    let node =
        |node: &v1::NumaNode| vec![node.id.to_string(), node.cpus.clone(), show_bytes(node.memory_bytes)];
    add(&mut all, &["NUMA", "CPUS", "MEMORY"], &inventory.numa_nodes.iter().map(node).collect::<Vec<_>>());
    all
}

fn limits(inventory: &v1::Inventory) -> Vec<String> {
    let limit = |value: Option<u64>, show: fn(u64) -> String| value.map_or("unlimited".to_owned(), show);
    let line = format!(
        "/dev/shm {}, memory that may be locked {}, open files {}",
        show_bytes(inventory.shm_bytes),
        limit(inventory.memlock_bytes, show_bytes),
        limit(inventory.open_files_max, |files| files.to_string()),
    );
    if inventory.driver_version.is_empty() {
        return vec![line];
    }
    let driver =
        format!("GPU driver {}, for CUDA up to {}", inventory.driver_version, inventory.cuda_version);
    vec![line, driver]
}

fn add(all: &mut Vec<String>, header: &[&str], rows: &[Vec<String>]) {
    if !rows.is_empty() {
        all.push(String::new());
        all.extend(table(header, rows));
    }
}
