//! Which ports are for training, and what else follows from a machine.

use super::*;
use muster_core::types::{
    DesiredPhase, GangId, Generation, JobId, JobSpec, Millis, NodeName, NodePlacement, Rank, Resources,
    StopMode, StopSignal,
};
use muster_core::{NetworkInterface, NumaNode, PortState};

use LinkLayer::{Ethernet, InfiniBand};

fn port(index: usize, link_layer: LinkLayer, gbps: u32) -> FabricPort {
    FabricPort {
        device: format!("mlx5_{index}"),
        port: 1,
        link_layer,
        state: if gbps > 0 { PortState::Active } else { PortState::Down },
        rate_mbps: gbps * 1000,
        ..FabricPort::default()
    }
}

fn gpu(index: u32, numa_node: u32, near: &[&str]) -> Device {
    let near_fabric = near.iter().map(ToString::to_string).collect();
    Device { index, numa_node: Some(numa_node), near_fabric, ..Device::default() }
}

#[test]
fn ports_for_training_are_those_that_work_and_can_reach_each_other() {
    // Link layer and rate of each port (0: it is down), which of them are next to a GPU, and what is chosen.
    type Case = (&'static [(LinkLayer, u32)], &'static [&'static str], &'static str);
    let table: [Case; 8] = [
        (&[(InfiniBand, 400), (InfiniBand, 400)], &[], "mlx5_0:1,mlx5_1:1"),
        (&[(InfiniBand, 400), (InfiniBand, 0)], &[], "mlx5_0:1"),
        (&[(Ethernet, 400), (Ethernet, 400)], &[], "mlx5_0:1,mlx5_1:1"),
        (&[(InfiniBand, 200), (Ethernet, 400)], &[], "mlx5_0:1"),
        (&[(InfiniBand, 400), (InfiniBand, 100)], &[], "mlx5_0:1"),
        (&[(InfiniBand, 400), (InfiniBand, 200)], &[], "mlx5_0:1,mlx5_1:1"),
        (&[(InfiniBand, 400), (InfiniBand, 400)], &["mlx5_1"], "mlx5_1:1"),
        // The one next to the GPU is down: the other is better than none.
        (&[(InfiniBand, 400), (InfiniBand, 0)], &["mlx5_1"], "mlx5_0:1"),
    ];
    for (ports, near, expected) in table {
        let fabric_ports = ports.iter().enumerate().map(|(index, (layer, gbps))| port(index, *layer, *gbps));
        let inventory = Inventory {
            fabric_ports: fabric_ports.collect(),
            gpus: vec![gpu(0, 0, near)],
            ..Inventory::default()
        };
        let (chosen, passed) = compute_ports(&inventory);
        let names: Vec<String> = chosen.iter().map(|port| port.name()).collect();
        assert_eq!(names.join(","), expected, "{ports:?} {near:?}: {passed:?}");
        assert_eq!(chosen.len() + passed.len(), ports.len(), "each has its reason");
    }
}

/// Rails beside GPUs that no subnet manager has configured, and storage that works.
#[test]
fn storage_does_not_take_the_place_of_rails_that_are_not_configured() {
    let init = |index| FabricPort { state: PortState::Init, ..port(index, InfiniBand, 400) };
    let mut inventory = Inventory {
        fabric_ports: vec![init(0), init(1), port(2, InfiniBand, 200)],
        gpus: vec![gpu(0, 0, &["mlx5_0"]), gpu(1, 0, &["mlx5_1"])],
        ..Inventory::default()
    };
    let value = |inventory: &Inventory| {
        let all = of(&assignment(&[0], 1), inventory, "0", &[]).variables;
        let found = all.into_iter().find(|one| one.name == "NCCL_IB_HCA");
        found.map(|one| (one.value, one.reason)).unwrap_or_default()
    };
    let (ports, why) = value(&inventory);
    assert_eq!(ports, "=mlx5_0:1,mlx5_1:1");
    assert!(
        why.starts_with("0 of 3 ports are active and for training; mlx5_2:1 is not next to a GPU"),
        "{why}"
    );
    inventory.fabric_ports[1].state = PortState::Active;
    assert_eq!(value(&inventory).0, "=mlx5_1:1");
    // Where it is not known what is next to a GPU, the rate tells.
    let mut far = Inventory { gpus: vec![gpu(0, 0, &[])], ..inventory.clone() };
    far.fabric_ports[1].state = PortState::Init;
    far.fabric_ports[2].rate_mbps = 100_000;
    assert_eq!(value(&far).0, "=mlx5_0:1,mlx5_1:1");
    // What cannot be used here is no rail.
    far.fabric_ports[0].unfit = "is a virtual function of mlx5_1".to_owned();
    let (ports, why) = value(&far);
    assert!(
        ports == "=mlx5_1:1" && why.contains("mlx5_0:1 is a virtual function of mlx5_1"),
        "{ports} {why}"
    );
}

#[test]
fn an_address_on_loopback_is_said_to_be_there() {
    let mut first = assignment(&[], 0);
    first.placement.address = first.master_addr;
    let nic = |addresses: &[&str]| NetworkInterface {
        name: "eth0".into(),
        addresses: addresses.iter().map(ToString::to_string).collect(),
        ..NetworkInterface::default()
    };
    for (addresses, expected) in
        [(&["10.0.0.1"][..], "eth0 has this node's"), (&["10.9.0.2"], "is on loopback")]
    {
        let inventory = Inventory { interfaces: vec![nic(addresses)], ..Inventory::default() };
        let all = of(&first, &inventory, "0", &[]).variables;
        assert!(all[0].reason.contains(expected), "{all:?}");
    }
}

fn assignment(gpus: &[u32], per_rank: u32) -> Assignment {
    let per_proc = Resources { gpus: per_rank, ..Resources::default() };
    let spec = JobSpec { per_proc, ..JobSpec::new(vec!["train".into()]) };
    Assignment {
        gang: GangId { job: JobId::new("j").unwrap(), generation: Generation(1) },
        phase: DesiredPhase::Prepared,
        spec,
        placement: NodePlacement {
            node: NodeName::new("n").unwrap(),
            address: [10, 0, 0, 2].into(),
            group_rank: 1,
            first_rank: Rank(0),
            procs: gpus.len() as u32 / per_rank.max(1),
            gpus: gpus.to_vec(),
        },
        world_size: 2,
        group_world_size: 2,
        master_addr: [10, 0, 0, 1].into(),
        master_port: None,
        restart_count: 0,
        stop: StopMode { signal: StopSignal::default(), grace: Millis(0), dump_stacks: false },
    }
}

fn of(
    assignment: &Assignment,
    inventory: &Inventory,
    cpus: &str,
    inherited: &[(&str, &str)],
) -> Surroundings {
    let facts = Facts {
        inventory,
        interface: Some("eth0"),
        cpus: &cpus.parse().unwrap(),
        gid_fault: &|port, index| (index != 3).then(|| format!("{} has no GID {index}", port.name())),
        inherited: &|name| {
            inherited.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        },
    };
    derive(assignment, &facts)
}

fn two_nodes() -> Inventory {
    let numa = |id, cpus: &str| NumaNode { id, cpus: cpus.to_owned(), memory_bytes: 0 };
    Inventory {
        gpus: vec![gpu(0, 0, &[]), gpu(1, 0, &[]), gpu(2, 1, &[]), gpu(3, 1, &[])],
        numa_nodes: vec![numa(0, "0-7,16-23"), numa(1, "8-15,24-31")],
        ..Inventory::default()
    }
}

#[test]
fn ranks_get_the_processors_next_to_their_gpus_as_far_as_the_daemon_has_them() {
    let table: [(&[u32], u32, &str, &[&str]); 5] = [
        (&[0, 2], 1, "0-31", &["0-7,16-23", "8-15,24-31"]),
        (&[1, 2], 2, "0-31", &["0-31"]),
        (&[0, 3], 1, "0-9", &["0-7", "8-9"]),
        (&[0, 3], 1, "0-3", &["0-3", ""]),
        (&[], 0, "0-31", &[]),
    ];
    for (gpus, per_rank, cpus, expected) in table {
        let bound = of(&assignment(gpus, per_rank), &two_nodes(), cpus, &[]).bindings;
        let lists: Vec<&str> = bound.iter().map(|binding| binding.cpus.as_str()).collect();
        assert_eq!(lists, expected, "{gpus:?} of {cpus}");
    }
    let own = of(&assignment(&[0], 1), &two_nodes(), "0-31", &[("GOMP_CPU_AFFINITY", "0-3")]).bindings;
    assert_eq!(
        (own[0].cpus.as_str(), own[0].reason.as_str()),
        ("", "GOMP_CPU_AFFINITY is set: the user places threads")
    );
    let flat = Inventory { numa_nodes: Vec::new(), ..two_nodes() };
    assert_eq!(of(&assignment(&[0], 1), &flat, "0-31", &[]).bindings[0].cpus, "");
}

#[test]
fn what_the_job_and_the_daemon_have_set_stays_and_is_shown_as_theirs() {
    let mut inventory = two_nodes();
    inventory.fabric_ports = vec![port(0, InfiniBand, 400)];
    let mut assignment = assignment(&[0], 1);
    assignment.spec.env = [("GLOO_SOCKET_IFNAME".to_owned(), "eth0".to_owned())].into();
    let all =
        of(&assignment, &inventory, "0-31", &[("NCCL_IB_HCA", "mlx5"), ("NCCL_DEBUG", "INFO")]).variables;
    let shown: Vec<_> = all.iter().map(|one| (one.name.as_str(), one.value.as_str(), one.source)).collect();
    let expected = [
        ("NCCL_IB_HCA", "mlx5", VariableSource::Daemon),
        ("NCCL_SOCKET_IFNAME", "=eth0", VariableSource::Node),
        ("GLOO_SOCKET_IFNAME", "eth0", VariableSource::Job),
    ];
    assert_eq!(shown, expected);
    assert!(all[0].reason.contains("derived was =mlx5_0:1: 1 of 1 ports"), "{all:?}");
    assert!(all[2].reason.contains("as derived: eth0 leads to the first node, 10.0.0.1"), "{all:?}");
    // Without GPUs nothing is said of NCCL.
    let names: Vec<String> = of(&super::tests::assignment(&[], 0), &Inventory::default(), "0", &[])
        .variables
        .into_iter()
        .map(|one| one.name)
        .collect();
    assert_eq!(names, ["GLOO_SOCKET_IFNAME"]);
}

#[test]
fn a_gid_that_the_user_names_is_looked_at_and_left() {
    let mut inventory = two_nodes();
    inventory.fabric_ports = vec![port(0, Ethernet, 400), port(1, Ethernet, 400)];
    let shown = |inventory: &Inventory, value: &str| {
        let all = of(&assignment(&[0], 1), inventory, "0", &[("NCCL_IB_GID_INDEX", value)]).variables;
        let found = all.into_iter().find(|one| one.name == "NCCL_IB_GID_INDEX");
        found.map(|one| (one.source, one.value, one.reason))
    };
    let table = [
        ("3", "set by the user; others reach that GID on all 2 ports"),
        (" -1", "set by the user: NCCL chooses"),
        ("5", "warning: mlx5_0:1 has no GID 5, and NCCL connects by no other; leave it out"),
        ("-3", "warning: mlx5_0:1 has no GID -3"),
        ("99999999999", "warning: mlx5_0:1 has no GID 99999999999"),
        ("three", "warning: it is no number"),
    ];
    for (value, expected) in table {
        let (source, kept, reason) = shown(&inventory, value).unwrap();
        assert_eq!((source, kept.as_str()), (VariableSource::Daemon, value), "it stays as it is");
        assert!(reason.starts_with(expected), "{value}: {reason}");
    }
    inventory.fabric_ports = vec![port(0, InfiniBand, 400)];
    assert_eq!(shown(&inventory, "5"), None, "InfiniBand has its own");
    assert_eq!(of(&assignment(&[0], 1), &two_nodes(), "0", &[]).variables.len(), 2, "nothing is set");
}
