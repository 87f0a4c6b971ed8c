//! A node reports of what is placed on it, and of nothing else.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::world::{World, exit_of, name, spec};
use muster_core::types::{
    GangId, GangReport, Generation, Millis, NodeName, ObservedPhase, Rank, RankProgress,
};
use muster_core::{Input, JobState};

/// A report that every rank of a job of two ranks has ended so.
fn ended(gang: &GangId, code: i32) -> GangReport {
    GangReport {
        gang: gang.clone(),
        phase: ObservedPhase::Stopped,
        master_port: Some(1),
        exits: (0..2).map(|rank| exit_of(rank, Some(code), None, Millis(0))).collect(),
        error: None,
        quiet: Vec::new(),
        processes: Vec::new(),
        rendezvous: None,
        surroundings: None,
    }
}

/// Hands a node's report to the core. Returns whether it was a stranger's.
fn stranger(world: &mut World, node: &NodeName, report: GangReport) -> bool {
    let session = world.nodes[node].session.unwrap();
    let input = Input::Report { node: node.clone(), session, report: Box::new(report) };
    let effects = world.core.step(world.now, input);
    let is_stranger = effects.stranger;
    world.carry_out(effects);
    is_stranger
}

/// The node that holds a rank, and one that holds none.
fn holder_and_other(world: &World, job: &str, rank: u32) -> (NodeName, NodeName) {
    let placements = world.job(job).placements();
    let holder = placements.iter().find(|placement| placement.holds(Rank(rank))).unwrap().node.clone();
    let holds = |node: &NodeName| placements.iter().any(|placement| placement.node == *node);
    let other = world.nodes.keys().find(|node| !holds(node)).unwrap().clone();
    (holder, other)
}

#[test]
fn a_report_of_a_gang_that_the_node_does_not_hold_changes_nothing() {
    let mut world = World::with_nodes(&["a", "b", "c"]);
    let job = world.submit(spec(2, 1));
    let gang = world.job(&job).gang_id();
    let (_, other) = holder_and_other(&world, &job, 0);
    let before = format!("{:?}", world.job(&job));
    let later = GangId { generation: Generation(2), ..gang.clone() };
    let unknown = GangId { job: muster_core::types::JobId::new("nosuchjob").unwrap(), ..gang.clone() };
    for gang in [gang, later, unknown] {
        for code in [0, 1] {
            assert!(stranger(&mut world, &other, ended(&gang, code)), "{gang}");
        }
    }
    assert_eq!(format!("{:?}", world.job(&job)), before);
}

#[test]
fn a_node_reports_its_own_ranks_alone() {
    let mut world = World::with_nodes(&["a", "b", "c"]);
    let job = world.submit(spec(2, 1));
    let gang = world.job(&job).gang_id();
    let (second, _) = holder_and_other(&world, &job, 1);
    let silent = |rank| RankProgress { rank: Rank(rank), step: None, silent: Millis(1), state: 'S' };
    let running = GangReport { phase: ObservedPhase::Running, exits: Vec::new(), ..ended(&gang, 0) };
    // The first rank's exit and silence are not the second node's to tell.
    let exit = GangReport { exits: vec![exit_of(0, Some(7), None, Millis(0))], ..running.clone() };
    assert!(stranger(&mut world, &second, exit));
    assert!(stranger(&mut world, &second, GangReport { quiet: vec![silent(0)], ..running.clone() }));
    assert!(!stranger(&mut world, &second, GangReport { quiet: vec![silent(1)], ..running }));
    assert_eq!((world.state(&job), world.job(&job).exit.clone()), (JobState::Running, None));
}

#[test]
fn a_late_report_of_a_gang_that_the_node_held_is_no_strangers() {
    let mut world = World::with_nodes(&["a", "b", "c"]);
    let job = world.submit(spec(2, 1));
    let gang = world.job(&job).gang_id();
    let (first, other) = holder_and_other(&world, &job, 0);
    world.exit(0, &job, 0);
    world.exit(1, &job, 0);
    assert_eq!(world.state(&job), JobState::Succeeded);
    assert!(!stranger(&mut world, &first, ended(&gang, 1)), "it comes again");
    assert!(stranger(&mut world, &other, ended(&gang, 1)));
    let known = world.core.job(gang.job.as_str()).unwrap();
    assert!(
        known.part_of(&first, gang.generation).is_some()
            && known.part_of(&name("z"), gang.generation).is_none()
    );
    assert_eq!(world.state(&job), JobState::Succeeded);
}
