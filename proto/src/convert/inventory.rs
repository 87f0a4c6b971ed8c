//! What a machine has, and what is wrong with it.

use std::collections::BTreeSet;

use muster_core::health::{FINDINGS_MAX, Finding, Severity};
use muster_core::{Device, FabricPort, Inventory, LinkLayer, NetworkInterface, NumaNode, PortState};
use prost::Message;

use super::job::{resources_from_wire, resources_to_wire};
use super::{FieldError, field_error};
use crate::v1;

/// Entries of each list of an inventory, far above what real machines have.
const ENTRIES_MAX: usize = 256;
/// Longest text in one.
const TEXT_BYTES_MAX: usize = 1024;
/// Longest list of processors.
const CPUS_BYTES_MAX: usize = 4096;
/// All of an inventory. It is kept for each node, and a page of nodes has to fit a message: real ones have a few KiB.
const INVENTORY_BYTES_MAX: usize = 256 * 1024;
/// Longest subject and reason of a finding.
const SUBJECT_BYTES_MAX: usize = 128;
const FINDING_BYTES_MAX: usize = 512;

fn check_count(field: &str, count: usize) -> Result<(), FieldError> {
    if count > ENTRIES_MAX {
        return Err(field_error(field, format!("are {count}; at most {ENTRIES_MAX} fit")));
    }
    Ok(())
}

fn check_text(field: &str, text: &str) -> Result<(), FieldError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(field_error(
            field,
            format!("has a text of {} bytes; at most {TEXT_BYTES_MAX} fit", text.len()),
        ));
    }
    Ok(())
}

/// Cuts a text at the end, at a character.
pub(super) fn cut(mut text: String, bytes_max: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes_max));
    text
}

/// Checks an inventory.
pub fn inventory_from_wire(wire: v1::Inventory) -> Result<Inventory, FieldError> {
    let bytes = wire.encoded_len();
    if bytes > INVENTORY_BYTES_MAX {
        return Err(field_error(
            "inventory",
            format!("has {bytes} bytes; at most {INVENTORY_BYTES_MAX} fit"),
        ));
    }
    check_count("inventory.labels", wire.labels.len())?;
    check_count("inventory.gpus", wire.gpus.len())?;
    check_count("inventory.fabric_ports", wire.fabric_ports.len())?;
    check_count("inventory.interfaces", wire.interfaces.len())?;
    check_count("inventory.numa_nodes", wire.numa_nodes.len())?;
    check_text("inventory.hostname", &wire.hostname)?;
    check_text("inventory.version", &wire.version)?;
    check_text("inventory.driver_version", &wire.driver_version)?;
    check_text("inventory.cuda_version", &wire.cuda_version)?;
    for (key, value) in &wire.labels {
        check_text("inventory.labels", key)?;
        check_text("inventory.labels", value)?;
    }
    let indices: BTreeSet<u32> = wire.gpus.iter().map(|gpu| gpu.index.unwrap_or(0)).collect();
    if indices.len() < wire.gpus.len() {
        return Err(field_error("inventory.gpus", "hold an index twice; a device would get two owners"));
    }
    let gpus = wire.gpus.into_iter().map(device_from_wire).collect::<Result<Vec<_>, _>>()?;
    let mut total = wire.total.map(resources_from_wire).unwrap_or_default();
    total.gpus = gpus.len() as u32;
    Ok(Inventory {
        total,
        gpus,
        labels: wire.labels,
        hostname: wire.hostname,
        version: wire.version,
        fabric_ports: wire.fabric_ports.into_iter().map(port_from_wire).collect::<Result<_, _>>()?,
        interfaces: wire.interfaces.into_iter().map(interface_from_wire).collect::<Result<_, _>>()?,
        numa_nodes: wire.numa_nodes.into_iter().map(numa_from_wire).collect::<Result<_, _>>()?,
        shm_bytes: wire.shm_bytes,
        memlock_bytes: wire.memlock_bytes,
        open_files_max: wire.open_files_max,
        driver_version: wire.driver_version,
        cuda_version: wire.cuda_version,
        gpu_fault: cut(wire.gpu_fault, FINDING_BYTES_MAX),
    })
}

fn device_from_wire(wire: v1::Device) -> Result<Device, FieldError> {
    let texts = [&wire.uuid, &wire.model, &wire.pci_address, &wire.fault];
    texts.into_iter().try_for_each(|text| check_text("inventory.gpus", text))?;
    check_count("inventory.gpus.near_fabric", wire.near_fabric.len())?;
    wire.near_fabric.iter().try_for_each(|text| check_text("inventory.gpus.near_fabric", text))?;
    Ok(Device {
        index: wire.index.unwrap_or(0),
        uuid: wire.uuid,
        model: wire.model,
        memory_bytes: wire.memory_bytes,
        pci_address: wire.pci_address,
        numa_node: wire.numa_node,
        near_fabric: wire.near_fabric,
        fault: (!wire.fault.is_empty()).then_some(wire.fault),
    })
}

fn port_from_wire(wire: v1::FabricPort) -> Result<FabricPort, FieldError> {
    // What a newer version names otherwise is not known here, and no port to speak over.
    let (link_layer, state) = (wire.link_layer(), wire.state());
    let texts = [&wire.device, &wire.physical_state, &wire.speed, &wire.pci_address, &wire.interface];
    texts.into_iter().try_for_each(|text| check_text("inventory.fabric_ports", text))?;
    Ok(FabricPort {
        device: wire.device,
        port: wire.port,
        link_layer: match link_layer {
            v1::LinkLayer::Unspecified => LinkLayer::Other,
            v1::LinkLayer::Infiniband => LinkLayer::InfiniBand,
            v1::LinkLayer::Ethernet => LinkLayer::Ethernet,
        },
        state: match state {
            v1::PortState::Unspecified => PortState::Unknown,
            v1::PortState::Down => PortState::Down,
            v1::PortState::Init => PortState::Init,
            v1::PortState::Armed => PortState::Armed,
            v1::PortState::Active => PortState::Active,
            v1::PortState::ActiveDefer => PortState::ActiveDefer,
        },
        physical_state: wire.physical_state,
        rate_mbps: wire.rate_mbps,
        speed: wire.speed,
        pci_address: wire.pci_address,
        numa_node: wire.numa_node,
        interface: wire.interface,
        unfit: cut(wire.unfit, FINDING_BYTES_MAX),
    })
}

fn interface_from_wire(wire: v1::NetworkInterface) -> Result<NetworkInterface, FieldError> {
    check_text("inventory.interfaces", &wire.name)?;
    check_count("inventory.interfaces.addresses", wire.addresses.len())?;
    wire.addresses.iter().try_for_each(|text| check_text("inventory.interfaces.addresses", text))?;
    Ok(NetworkInterface {
        name: wire.name,
        addresses: wire.addresses,
        up: wire.up,
        speed_mbps: wire.speed_mbps,
        mtu_bytes: wire.mtu_bytes,
        numa_node: wire.numa_node,
    })
}

fn numa_from_wire(wire: v1::NumaNode) -> Result<NumaNode, FieldError> {
    if wire.cpus.len() > CPUS_BYTES_MAX {
        return Err(field_error(
            "inventory.numa_nodes.cpus",
            format!("have more than {CPUS_BYTES_MAX} bytes"),
        ));
    }
    Ok(NumaNode { id: wire.id, cpus: wire.cpus, memory_bytes: wire.memory_bytes })
}

/// An inventory as it is.
pub fn inventory_to_wire(inventory: &Inventory) -> v1::Inventory {
    let gpu = |gpu: &Device| v1::Device {
        index: Some(gpu.index),
        uuid: gpu.uuid.clone(),
        model: gpu.model.clone(),
        memory_bytes: gpu.memory_bytes,
        pci_address: gpu.pci_address.clone(),
        numa_node: gpu.numa_node,
        near_fabric: gpu.near_fabric.clone(),
        fault: gpu.fault.clone().unwrap_or_default(),
    };
    let interface = |nic: &NetworkInterface| v1::NetworkInterface {
        name: nic.name.clone(),
        addresses: nic.addresses.clone(),
        up: nic.up,
        speed_mbps: nic.speed_mbps,
        mtu_bytes: nic.mtu_bytes,
        numa_node: nic.numa_node,
    };
    let numa = |node: &NumaNode| v1::NumaNode {
        id: node.id,
        cpus: node.cpus.clone(),
        memory_bytes: node.memory_bytes,
    };
    v1::Inventory {
        total: Some(resources_to_wire(inventory.total)),
        gpus: inventory.gpus.iter().map(gpu).collect(),
        labels: inventory.labels.clone(),
        hostname: inventory.hostname.clone(),
        version: inventory.version.clone(),
        fabric_ports: inventory.fabric_ports.iter().map(port_to_wire).collect(),
        interfaces: inventory.interfaces.iter().map(interface).collect(),
        numa_nodes: inventory.numa_nodes.iter().map(numa).collect(),
        shm_bytes: inventory.shm_bytes,
        memlock_bytes: inventory.memlock_bytes,
        open_files_max: inventory.open_files_max,
        driver_version: inventory.driver_version.clone(),
        cuda_version: inventory.cuda_version.clone(),
        gpu_fault: inventory.gpu_fault.clone(),
    }
}

fn port_to_wire(port: &FabricPort) -> v1::FabricPort {
    let link_layer = match port.link_layer {
        LinkLayer::Other => v1::LinkLayer::Unspecified,
        LinkLayer::InfiniBand => v1::LinkLayer::Infiniband,
        LinkLayer::Ethernet => v1::LinkLayer::Ethernet,
    };
    let state = match port.state {
        PortState::Unknown => v1::PortState::Unspecified,
        PortState::Down => v1::PortState::Down,
        PortState::Init => v1::PortState::Init,
        PortState::Armed => v1::PortState::Armed,
        PortState::Active => v1::PortState::Active,
        PortState::ActiveDefer => v1::PortState::ActiveDefer,
    };
    v1::FabricPort {
        device: port.device.clone(),
        port: port.port,
        link_layer: link_layer.into(),
        state: state.into(),
        physical_state: port.physical_state.clone(),
        rate_mbps: port.rate_mbps,
        speed: port.speed.clone(),
        pci_address: port.pci_address.clone(),
        numa_node: port.numa_node,
        interface: port.interface.clone(),
        unfit: port.unfit.clone(),
    }
}

/// Checks what a node has found to be wrong with it. Of a severity that is not known the least is believed.
pub fn findings_from_wire(wire: Vec<v1::Finding>) -> Result<Vec<Finding>, FieldError> {
    if wire.len() > FINDINGS_MAX {
        return Err(field_error(
            "health.findings",
            format!("are {}; at most {FINDINGS_MAX} fit", wire.len()),
        ));
    }
    let finding = |wire: v1::Finding| {
        let severity = match wire.severity() {
            v1::HealthVerdict::Quarantined => Severity::Quarantined,
            v1::HealthVerdict::Degraded | v1::HealthVerdict::Healthy | v1::HealthVerdict::Unspecified => {
                Severity::Degraded
            }
        };
        Finding {
            subject: cut(wire.subject, SUBJECT_BYTES_MAX),
            severity,
            reason: cut(wire.reason, FINDING_BYTES_MAX),
        }
    };
    Ok(wire.into_iter().map(finding).collect())
}

/// A finding as it is.
pub fn finding_to_wire(finding: &Finding) -> v1::Finding {
    let severity = match finding.severity {
        Severity::Degraded => v1::HealthVerdict::Degraded,
        Severity::Quarantined => v1::HealthVerdict::Quarantined,
    };
    v1::Finding {
        subject: finding.subject.clone(),
        severity: severity.into(),
        reason: finding.reason.clone(),
    }
}
