//! What a machine has, as its daemon found it: facts only. What follows from them is decided elsewhere (`schedule.rs`,
//! `health.rs`, and on the node).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::types::Resources;

/// One GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Index on the node.
    pub index: u32,
    /// Identity that survives a reboot.
    pub uuid: String,
    /// Model.
    pub model: String,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// Place on the PCI bus; empty if it is not known.
    #[serde(default)]
    pub pci_address: String,
    /// NUMA node to which it is attached, where there are several.
    #[serde(default)]
    pub numa_node: Option<u32>,
    /// Devices of the fabric ports that are nearest to it.
    #[serde(default)]
    pub near_fabric: Vec<String>,
    /// Why no rank may use it, if none may.
    #[serde(default)]
    pub fault: Option<String>,
}

/// What a fabric port speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LinkLayer {
    /// Something else.
    #[default]
    Other,
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RDMA over it is RoCE.
    Ethernet,
}

/// Where a fabric port is between dead and usable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PortState {
    /// Not known.
    #[default]
    Unknown,
    /// No link.
    Down,
    /// A link that no subnet manager has configured.
    Init,
    /// The subnet manager is configuring it.
    Armed,
    /// In use.
    Active,
    /// A disturbance that it may get over.
    ActiveDefer,
}

impl PortState {
    /// As the kernel names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Down => "DOWN",
            Self::Init => "INIT",
            Self::Armed => "ARMED",
            Self::Active => "ACTIVE",
            Self::ActiveDefer => "ACTIVE_DEFER",
        }
    }
}

/// A port of an RDMA device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FabricPort {
    /// Device, such as `mlx5_0`.
    pub device: String,
    /// Number on the device, from 1.
    pub port: u32,
    /// What it speaks.
    pub link_layer: LinkLayer,
    /// Whether it can be used.
    pub state: PortState,
    /// State of the link below it, as the kernel names it.
    pub physical_state: String,
    /// Megabits per second.
    pub rate_mbps: u32,
    /// Width and speed, such as `4X NDR`.
    pub speed: String,
    /// Place on the PCI bus; empty if it is not known.
    pub pci_address: String,
    /// NUMA node to which it is attached, where there are several.
    pub numa_node: Option<u32>,
    /// Network interface of the same port; empty if there is none.
    pub interface: String,
    /// Why ranks here cannot use it, or are not to, whatever its state is; empty if they can.
    #[serde(default)]
    pub unfit: String,
}

impl FabricPort {
    /// As NCCL names it: `mlx5_0:1`.
    pub fn name(&self) -> String {
        format!("{}:{}", self.device, self.port)
    }

    /// Whether NCCL can use it.
    pub fn is_active(&self) -> bool {
        self.state == PortState::Active
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    /// Name.
    pub name: String,
    /// IP addresses, as text.
    pub addresses: Vec<String>,
    /// Up, with a link.
    pub up: bool,
    /// Megabits per second; 0 if it is not known.
    pub speed_mbps: u32,
    /// Largest packet in bytes; 0 if it is not known.
    pub mtu_bytes: u32,
    /// NUMA node to which it is attached, where there are several.
    pub numa_node: Option<u32>,
}

/// Processors and memory that are near to each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    /// As the kernel counts.
    pub id: u32,
    /// As the kernel lists them, such as `0-31,64-95`.
    pub cpus: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// What a machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Totals.
    pub total: Resources,
    /// GPUs.
    pub gpus: Vec<Device>,
    /// Labels for node selectors.
    pub labels: BTreeMap<String, String>,
    /// Host name.
    pub hostname: String,
    /// Version of the daemon.
    pub version: String,
    /// InfiniBand and RoCE ports.
    #[serde(default)]
    pub fabric_ports: Vec<FabricPort>,
    /// Network interfaces with hardware behind them.
    #[serde(default)]
    pub interfaces: Vec<NetworkInterface>,
    /// NUMA nodes.
    #[serde(default)]
    pub numa_nodes: Vec<NumaNode>,
    /// Bytes that /dev/shm may hold.
    #[serde(default)]
    pub shm_bytes: u64,
    /// Bytes that a process may lock; none without a limit.
    #[serde(default)]
    pub memlock_bytes: Option<u64>,
    /// Files that a process may have open; none without a limit.
    #[serde(default)]
    pub open_files_max: Option<u64>,
    /// Version of the GPU driver.
    #[serde(default)]
    pub driver_version: String,
    /// Newest CUDA version that the driver can run.
    #[serde(default)]
    pub cuda_version: String,
    /// Why the GPUs of the machine cannot be asked or used, all of them; empty if they can, or if there are none.
    #[serde(default)]
    pub gpu_fault: String,
}

/// Key of a node selector for the model of a node's GPUs, such as `h100`.
pub const GPU_MODEL_LABEL: &str = "gpu-model";

impl Inventory {
    /// Returns the model of the GPUs: as the label says, else that which all of them have.
    pub fn gpu_model(&self) -> Option<&str> {
        let own = || {
            let (first, others) = self.gpus.split_first()?;
            let model = first.model.as_str();
            (!model.is_empty() && others.iter().all(|gpu| gpu.model == model)).then_some(model)
        };
        self.labels.get(GPU_MODEL_LABEL).map(String::as_str).or_else(own)
    }
}

/// Returns whether the words of `wanted` stand in a model's name one after the other, in capitals
/// or not: `h100` is `NVIDIA H100 80GB HBM3`. Whole words, for an A10 is no A100.
pub fn is_model(model: &str, wanted: &str) -> bool {
    // A pass asks of many nodes, so nothing is allocated.
    let mut rest = words(model);
    if words(wanted).next().is_none() {
        return false;
    }
    loop {
        let mut here = rest.clone();
        if words(wanted).all(|word| here.next().is_some_and(|own| own.eq_ignore_ascii_case(word))) {
            return true;
        }
        if rest.next().is_none() {
            return false;
        }
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> + Clone {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_whole_words() {
        for (model, wanted, expected) in [
            ("NVIDIA H100 80GB HBM3", "h100", true),
            ("NVIDIA H100 80GB HBM3", "H100-80gb", true),
            ("NVIDIA H100 80GB HBM3", "nvidia h100 80gb hbm3", true),
            ("NVIDIA A100-SXM4-80GB", "A100", true),
            ("NVIDIA A100-SXM4-80GB", "A10", false),
            ("NVIDIA L40S", "L4", false),
            ("NVIDIA GH200 480GB", "H200", false),
            ("NVIDIA H100 80GB HBM3", "80gb h100", false),
            ("NVIDIA H100 80GB HBM3", "", false),
            ("NVIDIA H100 80GB HBM3", " - ", false),
        ] {
            assert_eq!(is_model(model, wanted), expected, "{model} {wanted}");
        }
        let gpu = |model: &str| Device { model: model.to_owned(), ..Device::default() };
        let mut inventory = Inventory { gpus: vec![gpu("A"), gpu("A")], ..Inventory::default() };
        assert_eq!(inventory.gpu_model(), Some("A"));
        inventory.gpus[1] = gpu("B");
        assert_eq!(inventory.gpu_model(), None, "ranks would not all have what was asked for");
        inventory.labels.insert(GPU_MODEL_LABEL.to_owned(), "C".to_owned());
        assert_eq!(inventory.gpu_model(), Some("C"));
        assert_eq!(Inventory::default().gpu_model(), None);
    }
}
