//! What placing jobs costs when there are many of them and many nodes. Costs are counted, never timed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::IpAddr;

use muster_core::types::{Incarnation, JobSpec, Millis};
use muster_core::{Caller, Config, Core, Input, Inventory, Job, Join, Snapshot, Write};

use crate::world::{name, spec};

/// A cluster that has jobs waiting, as it is stored: with these nodes, and without a coordinator.
fn stored(nodes: u32, waiting: impl IntoIterator<Item = JobSpec>) -> Snapshot {
    let now = Millis::from_secs(1_000);
    let (mut core, _) = Core::load(now, Config::default(), 1, Snapshot::default());
    let mut snapshot = Snapshot::default();
    let mut take = |writes: Vec<Write>| {
        for write in writes {
            match write {
                Write::Meta(meta) => snapshot.meta = Some(meta),
                Write::Job(job) => snapshot.jobs.push(*job),
                Write::Node(node) => snapshot.nodes.push(*node),
                Write::Token(token) => snapshot.tokens.push(*token),
                Write::Barred(barred) => snapshot.barred.push(barred),
                Write::DeleteJob(_)
                | Write::DeleteNode(_)
                | Write::DeleteToken(_)
                | Write::DeleteBarred(_) => {}
            }
        }
    };
    for spec in waiting {
        take(
            core.step(now, Input::Submit { by: Caller::trusted(), request_id: None, spec: Box::new(spec) })
                .writes,
        );
    }
    for index in 0..nodes {
        take(core.step(now, Input::Join(Box::new(join(index)))).writes);
    }
    snapshot
}

fn join(index: u32) -> Join {
    Join {
        name: name(&format!("n{index:05}")),
        address: IpAddr::from((0x0a00_0000 + index).to_be_bytes()),
        incarnation: Incarnation::new("i").unwrap(),
        boot_id: "boot".into(),
        data_id: format!("{index}"),
        inventory: Inventory::default(),
    }
}

fn hello(index: u32) -> Input {
    let (node, incarnation) = (join(index).name, join(index).incarnation);
    Input::Hello { node, incarnation, gangs: vec![], leaving: None, number: 1 }
}

/// A job that fits nowhere, because it wants a label; jobs of one rack ask for the same.
fn wants(rack: u32) -> JobSpec {
    let node_selector = [("rack".to_owned(), rack.to_string())].into();
    JobSpec { node_selector, ..spec(1, 1) }
}

/// What it costs that all nodes come back within a second, in nanoseconds.
fn storm(nodes: u32, waiting: u32) -> u64 {
    let snapshot = stored(nodes, (0..waiting).map(wants));
    let now = Millis::from_secs(2_000);
    let (mut core, _) = Core::load(now, Config::default(), 1, snapshot);
    core.step(now, Input::Tick);
    let before = core.placement_spent_ns();
    for index in 0..nodes {
        let now = now.plus(Millis(u64::from(index) * 1000 / u64::from(nodes)));
        core.step(now, Input::Join(Box::new(join(index))));
        core.step(now, hello(index));
    }
    core.placement_spent_ns() - before
}

#[test]
fn a_storm_of_nodes_leaves_time_for_other_things() {
    for (nodes, waiting) in [(500, 200), (1000, 200), (2000, 100)] {
        // Not more than a tenth of the second, and one pass over everything that began within it.
        let pass = u64::from(waiting) * (u64::from(nodes) * 50 + 10_000);
        let spent = storm(nodes, waiting);
        assert!(spent < 100_000_000 + pass, "{nodes} nodes, {waiting} jobs: {spent} ns");
    }
}

#[test]
fn twice_the_nodes_and_twice_the_queue_do_not_cost_four_times_as_much() {
    let (small, large) = (storm(600, 100), storm(1200, 200));
    assert!(large < 2 * small, "{small} ns, then {large} ns");
}

#[test]
fn jobs_that_ask_for_the_same_are_looked_at_once() {
    let cost = |racks: u32| {
        let jobs = (0..100).map(|index| wants(index % racks));
        let now = Millis::from_secs(2_000);
        let (mut core, _) = Core::load(now, Config::default(), 1, stored(2000, jobs));
        core.step(now, Input::Tick);
        core.placement_spent_ns()
    };
    let (alike, different) = (cost(1), cost(100));
    assert!(alike * 5 < different, "alike {alike} ns, different {different} ns");
}

#[test]
fn a_node_that_comes_back_during_a_pause_is_not_forgotten() {
    let snapshot = stored(1000, (0..200).map(wants).chain([spec(1000, 1)]));
    let id = snapshot.jobs.last().unwrap().id.to_string();
    let mut now = Millis::from_secs(2_000);
    let (mut core, _) = Core::load(now, Config::default(), 1, snapshot);
    core.step(now, Input::Tick);
    for index in 0..1000 {
        core.step(now, Input::Join(Box::new(join(index))));
        core.step(now, hello(index));
    }
    let placed = |core: &Core| core.job(&id).map(|job: &Job| job.gang.is_some()).unwrap();
    assert!(!placed(&core), "the passes are apart");
    while !placed(&core) {
        let next = core.next_deadline().unwrap();
        assert!(next.since(Millis::from_secs(2_000)) < Millis::from_secs(5), "nothing will look at it");
        now = now.max(next);
        core.step(now, Input::Tick);
    }
    core.check_invariants().unwrap();
}
