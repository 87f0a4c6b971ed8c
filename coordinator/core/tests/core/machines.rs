//! Placement by what nodes have and where they are: GPUs near to each other, nodes that are not fit for work, and rings
//! that cross the fewest uplinks, beside a search that tries everything.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use muster_core::health::{Finding, Severity, Verdict};
use muster_core::types::{Incarnation, JobSpec, Millis, NodePlacement, Resources};
use muster_core::{
    Caller, Config, Core, Device, FabricPort, Input, Inventory, JobState, Join, Location, Node, Plan,
    PortState, Reply, Snapshot, solve,
};
use proptest::prelude::*;

use crate::world::{World, name, spec};

const START: Millis = Millis::from_secs(1_000);

/// A core with these nodes, all of them ready.
fn core_with(inventories: impl IntoIterator<Item = Inventory>) -> Core {
    let (mut core, _) = Core::load(START, Config::default(), 1, Snapshot::default());
    for (index, inventory) in (0_u32..).zip(inventories) {
        let join = Join {
            name: name(&format!("n{index:05}")),
            address: IpAddr::from((0x0a00_0000 + index).to_be_bytes()),
            incarnation: Incarnation::new("i").unwrap(),
            boot_id: "boot".into(),
            data_id: format!("{index}"),
            inventory,
        };
        let (node, incarnation) = (join.name.clone(), join.incarnation.clone());
        core.step(START, Input::Join(Box::new(join)));
        core.step(START, Input::Hello { node, incarnation, gangs: vec![], leaving: None, number: 1 });
    }
    core
}

fn gpus(count: u32, job: u32) -> JobSpec {
    let per_proc = Resources { gpus: 1, ..Resources::default() };
    JobSpec { per_proc, ..spec(count, job) }
}

/// A machine with 8 GPUs on two NUMA nodes.
fn eight(faulty: &[u32]) -> Inventory {
    let gpu = |index| Device {
        index,
        numa_node: Some(index / 4),
        fault: faulty.contains(&index).then(|| "it is off the bus".to_owned()),
        ..Device::default()
    };
    let total = Resources { gpus: 8, cpu_millis: 64_000, memory_bytes: 1 << 40 };
    Inventory { total, gpus: (0..8).map(gpu).collect(), ..Inventory::default() }
}

/// Submits a job, and gives its placement or why it waits.
fn place(core: &mut Core, spec: JobSpec) -> Result<Vec<NodePlacement>, String> {
    let reply = core
        .step(START, Input::Submit { by: Caller::trusted(), request_id: None, spec: Box::new(spec) })
        .reply;
    let Some(Ok(Reply::Job(job))) = reply else { panic!("{reply:?}") };
    core.check_invariants().unwrap();
    if job.gang.is_some() { Ok(job.placements().to_vec()) } else { Err(job.reason) }
}

#[test]
fn a_gang_gets_gpus_that_are_near_to_each_other_and_well() {
    // What jobs of so many GPUs get, one after the other.
    type Case = (&'static [u32], &'static [(u32, &'static [u32])]);
    let table: [Case; 4] = [
        (&[], &[(3, &[0, 1, 2]), (4, &[4, 5, 6, 7]), (1, &[3])]),
        (&[], &[(2, &[0, 1]), (2, &[2, 3]), (3, &[4, 5, 6])]),
        (&[1], &[(4, &[4, 5, 6, 7]), (3, &[0, 2, 3])]),
        (&[], &[(1, &[0]), (6, &[1, 2, 4, 5, 6, 7])]),
    ];
    for (faulty, jobs) in table {
        let mut core = core_with([eight(faulty)]);
        for (count, expected) in jobs {
            let got = place(&mut core, gpus(1, *count)).unwrap();
            assert_eq!(got[0].gpus, *expected, "{count} of those without {faulty:?}");
        }
    }
}

#[test]
fn a_job_that_wants_a_faulty_gpu_waits_and_says_so() {
    let mut core = core_with([eight(&[3])]);
    let why = place(&mut core, gpus(1, 8)).unwrap_err();
    assert_eq!(why, "waiting: 0 of 1 nodes; n00000 refused: 7 of 8 GPUs free (1 faulty), 8 needed");
    let node = core.node("n00000").unwrap().name.clone();
    let session = core.node("n00000").unwrap().session.unwrap();
    let inventory = Some(Box::new(eight(&[])));
    core.step(START, Input::Health { node, session, findings: vec![], inventory });
    let job = core.jobs_before(u64::MAX).next().unwrap();
    assert_eq!(job.state, JobState::Starting, "a GPU that is well again makes room: {}", job.reason);
}

fn finding(severity: Severity) -> Vec<Finding> {
    vec![Finding { subject: "disk".into(), severity, reason: "full".into() }]
}

#[test]
fn a_quarantined_node_gets_nothing_new_and_comes_back_after_a_calm() {
    let mut world = World::with_nodes(&["a", "b"]);
    let first = world.submit(spec(2, 1));
    let say = |world: &mut World, node: &str, findings| {
        let session = world.core.node(node).unwrap().session.unwrap();
        world.input(Input::Health { node: name(node), session, findings, inventory: None });
    };
    say(&mut world, "a", finding(Severity::Quarantined));
    assert_eq!(world.state(&first), JobState::Running, "what runs there goes on");
    world.cancel(&first);
    let second = world.submit(spec(2, 1));
    assert_eq!(world.job(&second).reason, "waiting: 1 of 2 nodes; a refused: quarantined (disk: full)");
    // The verdict is stored, and what was found is said again.
    world.restart_coordinator();
    world.connect("a");
    world.connect("b");
    assert_eq!(world.core.node("a").unwrap().health.verdict(), Verdict::Quarantined);
    say(&mut world, "a", vec![]);
    assert_eq!(world.state(&second), JobState::Queued, "it has to last");
    world.pass(299_000);
    assert_eq!(world.state(&second), JobState::Queued);
    world.pass(2_000);
    assert_eq!(world.state(&second), JobState::Running);
}

#[test]
fn degraded_nodes_are_taken_last() {
    let mut core = core_with((0..3).map(|_| eight(&[])));
    let (node, session) = (name("n00000"), core.node("n00000").unwrap().session.unwrap());
    let findings = finding(Severity::Degraded);
    core.step(START, Input::Health { node, session, findings, inventory: None });
    let nodes = |placements: Vec<NodePlacement>| -> Vec<String> {
        placements.iter().map(|placement| placement.node.to_string()).collect()
    };
    assert_eq!(nodes(place(&mut core, gpus(2, 4)).unwrap()), ["n00001", "n00002"]);
    assert_eq!(nodes(place(&mut core, gpus(3, 4)).unwrap()), ["n00000", "n00001", "n00002"]);
}

#[test]
fn a_node_with_fewer_rails_than_those_like_it_is_degraded() {
    let rails = |active: u32| {
        let port = |index| FabricPort {
            device: format!("mlx5_{index}"),
            port: 1,
            state: if index < active { PortState::Active } else { PortState::Down },
            rate_mbps: 400_000,
            ..FabricPort::default()
        };
        Inventory { fabric_ports: (0..8).map(port).collect(), ..eight(&[]) }
    };
    let mut core = core_with([rails(8), rails(8), rails(8), rails(7)]);
    let (node, session) = (name("n00003"), core.node("n00003").unwrap().session.unwrap());
    core.step(START, Input::Health { node, session, findings: vec![], inventory: None });
    let health = &core.node("n00003").unwrap().health;
    let reason = "fabric: 7 of 8 ports are active (mlx5_7:1 is DOWN); 3 of 3 nodes like it have 8";
    assert_eq!((health.verdict(), health.reason()), (Verdict::Degraded, reason));
}

fn located(zone: u32, spine: u32, leaf: u32) -> Inventory {
    let labels = [
        ("zone", format!("z{zone}")),
        ("spine", format!("z{zone}s{spine}")),
        ("leaf", format!("z{zone}s{spine}l{leaf}")),
    ];
    let labels = labels.map(|(key, value)| (key.to_owned(), value)).into();
    Inventory { labels, ..eight(&[]) }
}

/// Uplinks that the ring through a gang's nodes crosses.
fn crossings(core: &Core, placements: &[NodePlacement]) -> u32 {
    let at = |placement: &NodePlacement| &core.node(placement.node.as_str()).unwrap().location;
    let all: Vec<&Location> = placements.iter().map(at).collect();
    ring(&all)
}

fn ring(all: &[&Location]) -> u32 {
    (0..all.len()).map(|index| all[index].uplinks_to(all[(index + 1) % all.len()])).sum()
}

/// The fewest crossings of any ring through any so many of the nodes: everything is tried.
fn fewest(all: &[Location], wanted: usize, chosen: &mut Vec<usize>) -> u32 {
    if chosen.len() == wanted {
        let at: Vec<&Location> = chosen.iter().map(|index| &all[*index]).collect();
        return ring(&at);
    }
    let mut best = u32::MAX;
    for index in 0..all.len() {
        // A ring has no beginning: its lowest node is as good as any.
        if !chosen.contains(&index) && chosen.first().is_none_or(|first| index > *first) {
            chosen.push(index);
            best = best.min(fewest(all, wanted, chosen));
            chosen.pop();
        }
    }
    best
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]
    #[test]
    fn no_ring_crosses_fewer_uplinks(
        places in prop::collection::vec((0_u32..2, 0_u32..2, 0_u32..3), 3..8),
        wanted in 2_usize..6,
    ) {
        let wanted = wanted.min(places.len());
        let core = core_with(places.iter().map(|(zone, spine, leaf)| located(*zone, *spine, *leaf)));
        let Plan::Place(placed) = solve(&gpus(wanted as u32, 8), core.nodes_after(None)) else {
            panic!("they fit");
        };
        let all: Vec<Location> = core.nodes_after(None).map(|node: &Node| node.location.clone()).collect();
        prop_assert_eq!(placed.len(), wanted);
        prop_assert_eq!(crossings(&core, &placed), fewest(&all, wanted, &mut Vec::new()));
    }
}

/// A cluster of zones, spines and leaves, of which some nodes are missing here and there.
fn cluster(zones: u32, spines: u32, leaves: u32, nodes: u32) -> Vec<Inventory> {
    let mut all = Vec::new();
    for zone in 0..zones {
        for spine in 0..spines {
            for leaf in 0..leaves {
                let here = nodes - (leaf * 7 + spine * 3 + zone) % (nodes / 2);
                all.extend((0..here).map(|_| located(zone, spine, leaf)));
            }
        }
    }
    all
}

#[test]
fn a_thousand_nodes_are_searched_in_few_steps() {
    // Zones, spines, leaves, nodes of a leaf at most; the job's nodes; what its ring crosses.
    let table = [
        ((2, 4, 8, 24), 20, 0),
        ((2, 4, 8, 24), 100, 5),
        ((2, 4, 8, 24), 300, 17),
        ((1, 1, 64, 24), 512, 23),
        ((2, 8, 8, 32), 800, 35),
        ((4, 8, 16, 32), 2000, 80),
    ];
    for ((zones, spines, leaves, nodes), wanted, expected) in table {
        let all = cluster(zones, spines, leaves, nodes);
        let count = all.len() as u64;
        let mut core = core_with(all);
        let before = core.placement_spent_ns();
        let placed = place(&mut core, gpus(wanted, 8)).unwrap();
        let spent = core.placement_spent_ns() - before;
        let crossed = crossings(&core, &placed);
        let leaves: BTreeMap<Location, u32> = placed.iter().fold(BTreeMap::new(), |mut leaves, placement| {
            *leaves.entry(core.node(placement.node.as_str()).unwrap().location.clone()).or_default() += 1;
            leaves
        });
        assert_eq!(crossed, expected, "{wanted} of {count} nodes on {} leaves", leaves.len());
        assert!(spent < count * 10_000, "{wanted} of {count} nodes: {spent} ns");
    }
}

#[test]
fn nodes_that_are_each_alone_are_placed_all_the_same() {
    let mut core = core_with((0..2000).map(|index| located(0, 0, index)));
    let before = core.placement_spent_ns();
    assert_eq!(place(&mut core, gpus(1000, 8)).unwrap().len(), 1000);
    assert!(core.placement_spent_ns() - before < 100_000_000, "no search without an end");
}

#[test]
fn a_job_gets_nodes_of_the_model_that_it_names() {
    let of = |model: &str| {
        let mut inventory = eight(&[]);
        inventory.gpus.iter_mut().for_each(|gpu| gpu.model = model.to_owned());
        inventory
    };
    let (a100, h100) = (of("NVIDIA A100-SXM4-80GB"), of("NVIDIA H100 80GB HBM3"));
    let mut core = core_with([a100.clone(), h100, Inventory::default(), a100]);
    let asked = |model: &str, nodes: u32| {
        let node_selector = [(muster_core::GPU_MODEL_LABEL.to_owned(), model.to_owned())].into();
        JobSpec { node_selector, ..gpus(nodes, 8) }
    };
    assert_eq!(place(&mut core, asked("h100", 1)).unwrap()[0].node.as_str(), "n00001");
    let two = place(&mut core, asked("A100 SXM4", 2)).unwrap();
    assert_eq!(two.iter().map(|at| at.node.as_str()).collect::<Vec<_>>(), ["n00000", "n00003"]);
    assert_eq!(
        place(&mut core, asked("A10", 1)).unwrap_err(),
        "waiting: 0 of 1 nodes; no node has GPUs \"A10\", known are NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3; \
         n00000 refused: its GPUs are \"NVIDIA A100-SXM4-80GB\", not \"A10\"; n00001 refused: its GPUs are \
         \"NVIDIA H100 80GB HBM3\", not \"A10\"; n00002 refused: has no GPUs of one model, and is to have \"A10\"; 1 more \
         refused"
    );
    let why = place(&mut core, asked("h100", 1)).unwrap_err();
    assert!(
        why.starts_with("waiting: 0 of 1 nodes; n00001 refused: 0 of 8 GPUs free, 8 needed; n00000 refused"),
        "{why}"
    );
}

#[test]
fn a_reason_names_those_first_that_matter() {
    // By their names the others come first.
    let mut world = World::with_nodes(&["a1", "a2", "a3", "b1", "c1", "d1", "e1", "e2"]);
    world.node("f1").gpus = 1;
    world.connect("f1");
    let mut one = spec(1, 1);
    one.per_proc = Resources { gpus: 1, ..Resources::default() };
    let busy = world.submit(one.clone());
    assert_eq!(world.state(&busy), JobState::Running);
    for node in ["a1", "a2", "a3"] {
        let session = world.core.node(node).unwrap().session.unwrap();
        world.input(Input::Goodbye { node: name(node), session });
        world.node(node).session = None;
    }
    world.crash("b1");
    world.input(Input::SetCordon { by: None, node: "c1".into(), cordon: Some("bad fan".into()) });
    let waits = world.submit(one);
    let reason = |world: &World| world.job(&waits).reason.clone();
    let first = "waiting: 0 of 1 nodes; f1 refused: 0 of 1 GPUs free, 1 needed; d1 refused: 0 of 0 GPUs free, 1 needed; \
                 e1 refused: 0 of 0 GPUs free, 1 needed; 3 more refused; 3 have left";
    assert_eq!(reason(&world), first);
    // Of nothing but nodes that have left these are named.
    let mut world = World::with_nodes(&["a"]);
    let session = world.core.node("a").unwrap().session.unwrap();
    world.input(Input::Goodbye { node: name("a"), session });
    world.node("a").session = None;
    let waits = world.submit(spec(1, 1));
    assert_eq!(world.job(&waits).reason, "waiting: 0 of 1 nodes; a refused: left");
}
