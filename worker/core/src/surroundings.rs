//! What follows from a machine for the ranks that are to run on it: NCCL's and Gloo's network, and processors near to each
//! rank's GPUs. Pure: whoever calls says what the machine has and which way leads to the first node.
//!
//! Nothing here overrides a user: what the job or whoever started the daemon has set is shown as theirs, and stays.

use std::collections::BTreeSet;

use muster_core::types::surroundings::{
    DerivedVariable, DeviceName, RankBinding, VALUE_BYTES_MAX, VariableSource,
};
use muster_core::types::{Assignment, CpuList, JobSpec, Surroundings};
use muster_core::{Device, FabricPort, Inventory, LinkLayer, PortState};

/// Ports slower than the fastest by more than this factor are for something else than training, where nothing else tells.
const RATE_FACTOR_MAX: u32 = 2;

/// What the machine is, and what is set already.
pub struct Facts<'a> {
    /// What it has.
    pub inventory: &'a Inventory,
    /// The interface that leads to the gang's first node, if one was found.
    pub interface: Option<&'a str>,
    /// Processors that the daemon may use.
    pub cpus: &'a CpuList,
    /// What is wrong with the GID of an index on a port of RoCE.
    pub gid_fault: &'a dyn Fn(&FabricPort, u32) -> Option<String>,
    /// The daemon's own environment.
    pub inherited: &'a dyn Fn(&str) -> Option<String>,
}

/// Everything that a node adds for its part of a gang.
pub fn derive(assignment: &Assignment, facts: &Facts<'_>) -> Surroundings {
    let inventory = facts.inventory;
    let mut all: Vec<(&str, String, String)> = Vec::new();
    // A job that names nothing has the whole node, its GPUs included.
    let has_gpus = !assignment.placement.gpus.is_empty()
        || (assignment.spec.per_proc.is_zero() && !inventory.gpus.is_empty());
    if has_gpus && let Some((ports, reason)) = hca_list(inventory) {
        all.push(("NCCL_IB_HCA", ports, reason));
    }
    if let Some(interface) = facts.interface {
        let here = assignment.placement.address == assignment.master_addr;
        let address = assignment.master_addr.to_string();
        let on_another =
            inventory.interfaces.iter().any(|nic| nic.name == interface && !nic.addresses.contains(&address));
        let reason = if here && on_another {
            format!("this node's address {address} is on loopback, and {interface} leads to the others")
        } else if here {
            format!(
                "{interface} has this node's address {}, at which the others reach it",
                assignment.master_addr
            )
        } else {
            format!("{interface} leads to the first node, {}", assignment.master_addr)
        };
        if has_gpus {
            all.push(("NCCL_SOCKET_IFNAME", format!("={interface}"), reason.clone()));
        }
        all.push(("GLOO_SOCKET_IFNAME", interface.to_owned(), reason));
    }
    let variables = all.into_iter().map(|(name, value, reason)| {
        let theirs = of_job(&assignment.spec, name)
            .map(|own| (own, VariableSource::Job))
            .or_else(|| Some(((facts.inherited)(name)?, VariableSource::Daemon)));
        let (value, source, reason) = match theirs {
            Some((own, source)) if own == value => {
                (own, source, format!("set by the user, as derived: {reason}"))
            }
            Some((own, source)) => {
                (own, source, format!("set by the user, left as it is; derived was {value}: {reason}"))
            }
            None => (value, VariableSource::Node, reason),
        };
        DerivedVariable { name: name.to_owned(), value, source, reason }
    });
    let gid_index = gid_index(&assignment.spec, facts).filter(|_| has_gpus);
    let variables = variables.chain(gid_index).collect();
    let devices = device_names(inventory, &assignment.placement.gpus);
    Surroundings { variables, bindings: bindings(assignment, facts), devices }
}

/// Returns how CUDA is told of GPUs where one of the machine's is a part of a GPU (MIG): it numbers
/// no parts, and other GPUs otherwise than the driver does then.
fn device_names(inventory: &Inventory, gpus: &[u32]) -> Vec<DeviceName> {
    if !inventory.gpus.iter().any(|gpu| gpu.uuid.starts_with("MIG-")) {
        return Vec::new();
    }
    let given = inventory.gpus.iter().filter(|gpu| gpus.contains(&gpu.index) && !gpu.uuid.is_empty());
    given.map(|gpu| DeviceName { index: gpu.index, name: gpu.uuid.clone() }).collect()
}

/// What words of a variable begin with that is set to something that cannot work.
pub const WARNING: &str = "warning: ";

/// Returns what became of a GID that the user has named. Which one is right is left to NCCL, which
/// chooses by itself.
fn gid_index(spec: &JobSpec, facts: &Facts<'_>) -> Option<DerivedVariable> {
    let name = "NCCL_IB_GID_INDEX";
    let of_daemon = || Some(((facts.inherited)(name)?, VariableSource::Daemon));
    let (value, source) = of_job(spec, name).map(|own| (own, VariableSource::Job)).or_else(of_daemon)?;
    let ports = compute_ports(facts.inventory).0;
    let roce: Vec<&FabricPort> =
        ports.into_iter().filter(|port| port.link_layer == LinkLayer::Ethernet).collect();
    if roce.is_empty() {
        return None;
    }
    let instead = "leave it out, and NCCL chooses one (2.21 and later)";
    let reason = match value.trim().parse::<i64>() {
        Ok(-1) => "set by the user: NCCL chooses".to_owned(),
        Ok(index) => {
            let fault = |port: &&FabricPort| match u32::try_from(index) {
                Ok(index) => (facts.gid_fault)(port, index),
                Err(_) => Some(format!("{} has no GID {index}", port.name())),
            };
            match roce.iter().find_map(fault) {
                Some(fault) => format!("{WARNING}{fault}, and NCCL connects by no other; {instead}"),
                None => format!("set by the user; others reach that GID on all {} ports", roce.len()),
            }
        }
        Err(_) if spec.env_files.contains_key(name) => {
            "set by the user in a file, and not checked".to_owned()
        }
        Err(_) => format!("{WARNING}it is no number; {instead}"),
    };
    Some(DerivedVariable { name: name.to_owned(), value, source, reason })
}

/// What the job sets a variable to; of one whose value nodes have in a file, where it comes from.
fn of_job(spec: &JobSpec, name: &str) -> Option<String> {
    let from_file = || spec.env_files.get(name).map(|path| format!("from {path}"));
    spec.env.get(name).cloned().or_else(from_file)
}

type PassedOver<'a> = Vec<(&'a FabricPort, String)>;

/// Returns the ports over which ranks are to speak, and those that are passed over, each with why. One that has a link and
/// is not configured yet tells for what the others are: storage does not take the place of rails that no subnet manager has
/// configured.
pub fn compute_ports(inventory: &Inventory) -> (Vec<&FabricPort>, PassedOver<'_>) {
    let (chosen, mut passed) = training_ports(inventory);
    let (active, waiting): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|port| port.is_active());
    passed.extend(waiting.into_iter().map(|port| (port, format!("is {}", port.state.name()))));
    (active, passed)
}

/// Returns those of the ports that are for training, and not active yet.
pub(crate) fn awaited_ports(inventory: &Inventory) -> Vec<&FabricPort> {
    training_ports(inventory).0.into_iter().filter(|port| !port.is_active()).collect()
}

/// The ports that have a link and are for training, and the others, each with why.
fn training_ports(inventory: &Inventory) -> (Vec<&FabricPort>, PassedOver<'_>) {
    let (mut chosen, mut passed) = (Vec::new(), Vec::new());
    for port in &inventory.fabric_ports {
        match port.state {
            _ if !port.unfit.is_empty() => passed.push((port, port.unfit.clone())),
            PortState::Init | PortState::Armed | PortState::Active | PortState::ActiveDefer => {
                chosen.push(port);
            }
            PortState::Down | PortState::Unknown => {
                passed.push((port, format!("is {}", port.state.name())));
            }
        }
    }
    // Below the same bridge as a GPU: that is what they were put there for. Storage and management are elsewhere.
    let near: BTreeSet<&str> =
        inventory.gpus.iter().flat_map(|gpu| &gpu.near_fabric).map(String::as_str).collect();
    if chosen.iter().any(|port| near.contains(port.device.as_str())) {
        let why = "is not next to a GPU: it is there for storage or management";
        pass_over(&mut chosen, &mut passed, |port| {
            (!near.contains(port.device.as_str())).then(|| why.to_owned())
        });
    }
    if chosen.iter().any(|port| port.is_active() && port.link_layer == LinkLayer::InfiniBand) {
        let why = "is Ethernet (RoCE), and the others are InfiniBand: they cannot reach each other";
        pass_over(&mut chosen, &mut passed, |port| match port.link_layer {
            LinkLayer::InfiniBand => None,
            LinkLayer::Ethernet | LinkLayer::Other => Some(why.to_owned()),
        });
    }
    let fastest = chosen.iter().map(|port| port.rate_mbps).max().unwrap_or(0);
    let gbps = |mbps: u32| f64::from(mbps) / 1000.0;
    pass_over(&mut chosen, &mut passed, |port| {
        let slow = port.rate_mbps.saturating_mul(RATE_FACTOR_MAX) < fastest;
        slow.then(|| format!("has {} Gb/s, and the fastest {}", gbps(port.rate_mbps), gbps(fastest)))
    });
    (chosen, passed)
}

/// Takes out those that there is something against.
fn pass_over<'a>(
    chosen: &mut Vec<&'a FabricPort>,
    passed: &mut PassedOver<'a>,
    against: impl Fn(&FabricPort) -> Option<String>,
) {
    for port in std::mem::take(chosen) {
        match against(port) {
            None => chosen.push(port),
            Some(why) => passed.push((port, why)),
        }
    }
}

fn hca_list(inventory: &Inventory) -> Option<(String, String)> {
    let (chosen, passed) = compute_ports(inventory);
    // NCCL would take what is active instead, such as the port of the storage: it is told of the right ones all the same.
    let named = if chosen.is_empty() { awaited_ports(inventory) } else { chosen.clone() };
    if named.is_empty() {
        return None;
    }
    let names: Vec<String> = named.iter().map(|port| port.name()).collect();
    // With '=' NCCL takes exactly these; without it mlx5_1 would stand for mlx5_10 as well.
    let value = format!("={}", names.join(","));
    if value.len() > VALUE_BYTES_MAX {
        return None;
    }
    let of =
        format!("{} of {} ports are active and for training", chosen.len(), inventory.fabric_ports.len());
    let others = passed.iter().map(|(port, why)| format!("{} {why}", port.name()));
    let reason: Vec<String> = std::iter::once(of).chain(others).collect();
    Some((value, reason.join("; ")))
}

fn bindings(assignment: &Assignment, facts: &Facts<'_>) -> Vec<RankBinding> {
    let per_rank = assignment.spec.per_proc.gpus as usize;
    if per_rank == 0 {
        return Vec::new();
    }
    let own = ["KMP_AFFINITY", "GOMP_CPU_AFFINITY"]
        .into_iter()
        .find(|name| of_job(&assignment.spec, name).is_some() || (facts.inherited)(name).is_some());
    let of_rank = |(local_rank, gpus): (u32, &[u32])| {
        let (cpus, reason) = match own {
            Some(name) => (CpuList::default(), format!("{name} is set: the user places threads")),
            None => near_cpus(gpus, facts),
        };
        RankBinding { local_rank, gpus: gpus.to_vec(), cpus: cpus.to_string(), reason }
    };
    (0..).zip(assignment.placement.gpus.chunks(per_rank)).map(of_rank).collect()
}

/// The processors of the NUMA nodes to which the GPUs are attached.
fn near_cpus(gpus: &[u32], facts: &Facts<'_>) -> (CpuList, String) {
    let none = |why: &str| (CpuList::default(), why.to_owned());
    let all = &facts.inventory.numa_nodes;
    if all.len() < 2 {
        return none("the machine has no more than one NUMA node");
    }
    let device =
        |index: &u32| -> Option<&Device> { facts.inventory.gpus.iter().find(|gpu| gpu.index == *index) };
    let nodes: Option<BTreeSet<u32>> = gpus.iter().map(|index| device(index)?.numa_node).collect();
    let Some(nodes) = nodes else { return none("it is not known to which NUMA node its GPUs are attached") };
    let lists = all.iter().filter(|node| nodes.contains(&node.id));
    let near: BTreeSet<u32> =
        lists.filter_map(|node| node.cpus.parse::<CpuList>().ok()).flat_map(|l| l.0).collect();
    let cpus = CpuList(near).and(facts.cpus);
    if cpus.0.is_empty() {
        return none("the daemon may use no processor of its GPUs' NUMA node");
    }
    let ids: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    (cpus, format!("NUMA node {}, to which its GPUs are attached", ids.join(" and ")))
}

#[cfg(test)]
#[path = "surroundings_tests.rs"]
mod tests;
