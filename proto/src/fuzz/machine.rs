//! Inventories, findings, and what nodes add to the environment of their ranks.

use muster_core::Inventory;
use muster_core::health::FINDINGS_MAX;
use muster_core::types::surroundings::{REASON_BYTES_MAX, VALUE_BYTES_MAX, VARIABLES_MAX};
use prost::Message;

use super::{check_refusal, encoded, message, survives};
use crate::{convert, v1};

fn check_inventory(inventory: &Inventory) {
    assert_eq!(inventory.total.gpus as usize, inventory.gpus.len(), "what is there is what counts");
    for (index, gpu) in inventory.gpus.iter().enumerate() {
        let twice = inventory.gpus[..index].iter().any(|other| other.index == gpu.index);
        assert!(!twice, "a device has one owner");
    }
    assert!(convert::inventory_to_wire(inventory).encoded_len() < 300 << 10, "a page of them fits a message");
    survives(inventory, convert::inventory_to_wire, convert::inventory_from_wire);
}

/// A node's health: both halves of it.
pub(super) fn node_health(bytes: &[u8]) {
    let Some(wire) = message::<v1::NodeHealth>(bytes) else { return };
    match wire.inventory.map(convert::inventory_from_wire).transpose() {
        Ok(inventory) => inventory.iter().for_each(check_inventory),
        Err(error) => check_refusal(&[error]),
    }
    match convert::findings_from_wire(wire.findings) {
        Ok(findings) => {
            assert!(findings.len() <= FINDINGS_MAX);
            assert!(
                findings.iter().all(|finding| finding.subject.len() <= 128 && finding.reason.len() <= 512)
            );
            let again = findings.iter().map(convert::finding_to_wire).collect();
            assert_eq!(convert::findings_from_wire(again).as_ref(), Ok(&findings));
        }
        Err(error) => check_refusal(&[error]),
    }
}

pub(super) fn node_health_samples() -> Vec<Vec<u8>> {
    let gpu = |index: u32| v1::Device {
        index: Some(index),
        uuid: format!("GPU-{index}"),
        pci_address: format!("0000:{index}a:00.0"),
        numa_node: Some(index % 2),
        near_fabric: vec![format!("mlx5_{index}")],
        fault: if index == 1 { "it is off the bus".into() } else { String::new() },
        ..Default::default()
    };
    let port = |device: &str, state: v1::PortState, layer: v1::LinkLayer| v1::FabricPort {
        device: device.into(),
        port: 1,
        state: state.into(),
        link_layer: layer.into(),
        rate_mbps: 400_000,
        speed: "4X NDR".into(),
        ..Default::default()
    };
    let finding = |severity: v1::HealthVerdict, reason: &str| v1::Finding {
        subject: "disk".into(),
        severity: severity.into(),
        reason: reason.into(),
    };
    let wire = v1::NodeHealth {
        findings: vec![
            finding(v1::HealthVerdict::Degraded, "nearly full"),
            finding(v1::HealthVerdict::Quarantined, &"é".repeat(400)),
        ],
        inventory: Some(v1::Inventory {
            total: Some(v1::Resources { gpus: 7, cpu_millis: 64_000, memory_bytes: 1 << 40 }),
            gpus: vec![gpu(0), gpu(1)],
            fabric_ports: vec![
                port("mlx5_0", v1::PortState::Active, v1::LinkLayer::Infiniband),
                port("mlx5_1", v1::PortState::Down, v1::LinkLayer::Ethernet),
            ],
            interfaces: vec![v1::NetworkInterface {
                name: "eth0".into(),
                addresses: vec!["10.0.0.1".into()],
                up: true,
                ..Default::default()
            }],
            numa_nodes: vec![v1::NumaNode { id: 1, cpus: "0-3,8".into(), memory_bytes: 1 << 30 }],
            memlock_bytes: Some(0),
            ..Default::default()
        }),
    };
    vec![encoded(&wire)]
}

pub(super) fn surroundings(bytes: &[u8]) {
    let Some(wire) = message::<v1::Surroundings>(bytes) else { return };
    match convert::surroundings_from_wire(wire) {
        Ok(checked) => {
            assert!(checked.variables.len() <= VARIABLES_MAX);
            assert!(checked.variables.iter().all(|variable| variable.value.len() <= VALUE_BYTES_MAX));
            assert!(checked.bindings.iter().all(|binding| binding.reason.len() <= REASON_BYTES_MAX));
            survives(&checked, convert::surroundings_to_wire, convert::surroundings_from_wire);
        }
        Err(error) => check_refusal(&[error]),
    }
}

pub(super) fn sample_surroundings() -> v1::Surroundings {
    v1::Surroundings {
        variables: vec![v1::DerivedVariable {
            name: "NCCL_IB_HCA".into(),
            value: "=mlx5_0:1".into(),
            source: v1::VariableSource::Node.into(),
            reason: "1 of 1 ports are active".into(),
        }],
        bindings: vec![v1::RankBinding {
            local_rank: 0,
            gpus: vec![0, 1],
            cpus: "0-31".into(),
            reason: "NUMA node 0".into(),
        }],
    }
}
