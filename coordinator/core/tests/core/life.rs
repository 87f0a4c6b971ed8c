//! A job's life as tables and scripts: what a user sees of placement, faults, cancels and restarts.

use std::net::IpAddr;

use crate::world::{World, name, spec};
use muster_core::types::{DesiredPhase, GangReport, Generation, Millis, ObservedPhase, Resources};
use muster_core::{JobState, NodeState, Refusal};

#[test]
fn two_nodes_train_to_the_end() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = world.submit(spec(2, 2));
    assert_eq!(world.state(&job), JobState::Running);
    assert_eq!((world.job(&job).generation, world.job(&job).world_size()), (Generation(1), 4));
    for rank in 0..4 {
        world.exit(rank, &job, 0);
    }
    assert_eq!(world.state(&job), JobState::Succeeded);
    assert!(world.nodes.values().all(|node| node.gangs.is_empty()), "nodes were told to forget");
}

#[test]
fn ranks_follow_addresses_and_not_names() {
    let mut world = World::default();
    for (node, last) in [("a", 10), ("b", 9), ("c", 100)] {
        world.node(node).address = Some(IpAddr::from([10, 0, 0, last]));
        world.connect(node);
    }
    let job = world.submit(spec(3, 2));
    let order: Vec<_> =
        world.job(&job).placements().iter().map(|p| (p.node.as_str(), p.first_rank.0)).collect();
    assert_eq!(order, [("b", 0), ("a", 2), ("c", 4)]);
}

#[test]
fn a_job_waits_for_nodes_with_the_reason_in_words() {
    let mut world = World::with_nodes(&["a"]);
    let job = world.submit(spec(2, 1));
    assert_eq!(world.state(&job), JobState::Queued);
    assert_eq!(world.job(&job).reason, "waiting: 1 of 2 nodes; no other node has joined");
    world.connect("b");
    assert_eq!(world.state(&job), JobState::Running);
}

#[test]
fn refusals_are_counted_beyond_the_first_three() {
    let mut world = World::with_nodes(&["a", "b", "c", "d", "e"]);
    let mut big = spec(2, 1);
    big.per_proc = Resources { gpus: 1, ..Resources::default() };
    let job = world.submit(big);
    let reason = &world.job(&job).reason;
    assert!(reason.contains("a refused: 0 of 0 GPUs free, 1 needed"), "{reason}");
    assert!(reason.ends_with("2 more refused"), "{reason}");
}

#[test]
fn gpus_have_one_owner_and_come_back() {
    let mut world = World::default();
    world.node("a").gpus = 4;
    world.connect("a");
    let mut two = spec(1, 2);
    two.per_proc = Resources { gpus: 1, ..Resources::default() };
    let jobs = [world.submit(two.clone()), world.submit(two.clone()), world.submit(two)];
    let gpus = |world: &World, job: &str| world.job(job).placements().first().map(|p| p.gpus.clone());
    assert_eq!(gpus(&world, &jobs[0]), Some(vec![0, 1]));
    assert_eq!(gpus(&world, &jobs[1]), Some(vec![2, 3]));
    assert_eq!(world.job(&jobs[2]).reason, "waiting: 0 of 1 nodes; a refused: 0 of 4 GPUs free, 2 needed");
    world.cancel(&jobs[0]);
    assert_eq!((world.state(&jobs[0]), world.state(&jobs[2])), (JobState::Cancelled, JobState::Running));
    assert_eq!(gpus(&world, &jobs[2]), Some(vec![0, 1]));
}

#[test]
fn a_job_without_resources_has_its_nodes_for_itself() {
    let mut world = World::with_nodes(&["a"]);
    let (first, second) = (world.submit(spec(1, 1)), world.submit(spec(1, 1)));
    assert!(
        world.job(&second).reason.contains(&format!("held by job {first}")),
        "{}",
        world.job(&second).reason
    );
    world.exit(0, &first, 0);
    assert_eq!(world.state(&second), JobState::Running);
}

#[test]
fn the_first_failure_is_the_cause_and_stops_the_gang() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = world.submit(spec(2, 2));
    world.exit(3, &job, 7);
    assert_eq!(world.state(&job), JobState::Failed);
    assert_eq!(world.job(&job).reason, "rank 3 on node b ended with exit code 7");
    let cause = world.job(&job).exit.clone().unwrap();
    assert_eq!((cause.exit.rank.0, cause.exit.code, cause.node.as_str()), (3, Some(7), "b"));
    assert!(world.nodes.values().all(|node| node.gangs.is_empty()), "the others were stopped");
}

#[test]
fn a_fault_spends_the_budget_and_the_next_generation_is_higher() {
    let mut world = World::with_nodes(&["a", "b"]);
    let mut restartable = spec(2, 1);
    restartable.max_restarts = 2;
    let job = world.submit(restartable);
    world.exit(1, &job, 1);
    assert_eq!((world.state(&job), world.job(&job).generation), (JobState::Running, Generation(2)));
    world.exit(1, &job, 1);
    assert_eq!(world.state(&job), JobState::Restarting, "the second quick failure waits");
    world.pass(1000);
    assert_eq!((world.state(&job), world.job(&job).generation), (JobState::Running, Generation(3)));
    world.exit(0, &job, 1);
    assert_eq!((world.state(&job), world.job(&job).restarts_used), (JobState::Failed, 2));
    assert_eq!(world.job(&job).reason, "rank 0 on node a ended with exit code 1; after 2 restarts");
}

#[test]
fn a_node_that_cannot_prepare_fails_the_job_before_anything_ran() {
    let mut world = World::with_nodes(&["a", "b"]);
    world.node("b").frozen = true;
    let mut restartable = spec(2, 1);
    restartable.max_restarts = 5;
    let job = world.submit(restartable);
    assert_eq!(world.state(&job), JobState::Starting, "nobody trains until everybody is prepared");
    let gang = world.job(&job).gang_id();
    assert!(world.nodes[&name("a")].gangs.values().all(|(a, _)| a.phase == DesiredPhase::Prepared));
    let error = Some("program \"train\" was not found".to_owned());
    let phase = ObservedPhase::Stopped;
    let report = GangReport {
        gang,
        phase,
        master_port: None,
        exits: vec![],
        error,
        quiet: vec![],
        processes: vec![],
        rendezvous: None,
        surroundings: None,
    };
    world.report(&name("b"), report);
    assert_eq!(world.state(&job), JobState::Failed, "the next generation would meet the same");
    assert_eq!(world.job(&job).reason, "node b: program \"train\" was not found");
}

#[test]
fn a_gang_that_does_not_start_is_given_up() {
    let mut world = World::with_nodes(&["a", "b"]);
    world.node("b").frozen = true;
    let mut quick = spec(2, 1);
    quick.start_timeout = Millis::from_secs(3);
    let job = world.submit(quick);
    world.pass(4000);
    assert_eq!(world.state(&job), JobState::Stopping);
    assert!(world.job(&job).reason.contains("within 3 s: a (of 2 nodes)"), "{}", world.job(&job).reason);
    world.node("b").frozen = false;
    world.settle();
    assert_eq!(world.state(&job), JobState::Failed);
}

#[test]
fn a_lost_node_is_known_by_its_lease_and_no_sooner() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = world.submit(spec(2, 1));
    world.disconnect("b");
    world.pass(9000);
    assert_eq!(world.state(&job), JobState::Running, "the lease has not ended");
    world.pass(2000);
    assert_eq!(world.core.node("b").unwrap().state, NodeState::Lost);
    assert_eq!(world.state(&job), JobState::Failed);
    assert_eq!(world.job(&job).reason, "node b was lost: no heartbeat within 10000 ms");
}

#[test]
fn a_node_that_joins_and_hears_nothing_is_lost_all_the_same() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = world.submit(spec(2, 1));
    world.disconnect("b");
    for _ in 0..5 {
        world.pass(2500);
        let again = world.join_of("b");
        world.input(muster_core::Input::Join(Box::new(again)));
    }
    assert_eq!(world.core.node("b").unwrap().state, NodeState::Lost, "it has stopped its ranks long ago");
    assert_eq!(world.state(&job), JobState::Failed);
}

#[test]
fn a_pause_of_the_coordinator_loses_no_node() {
    let mut world = World::with_nodes(&["a"]);
    let job = world.submit(spec(1, 1));
    world.now = world.now.plus(Millis::from_secs(3600));
    world.input(muster_core::Input::Stalled);
    world.pass(5000);
    assert_eq!(world.state(&job), JobState::Running);
}

#[test]
fn a_pause_of_the_coordinator_fails_no_start() {
    let mut world = World::with_nodes(&["a"]);
    world.node("a").frozen = true;
    let job = world.submit(spec(1, 1));
    assert_eq!(world.state(&job), JobState::Starting);
    world.now = world.now.plus(Millis::from_secs(3600));
    world.input(muster_core::Input::Stalled);
    world.input(muster_core::Input::Tick);
    assert_eq!(world.state(&job), JobState::Starting, "{}", world.job(&job).reason);
}

#[test]
fn a_daemon_started_anew_has_lost_its_ranks() {
    let mut world = World::with_nodes(&["a", "b"]);
    let mut restartable = spec(2, 1);
    restartable.max_restarts = 1;
    let job = world.submit(restartable);
    world.crash("b");
    world.connect("b");
    assert_eq!((world.state(&job), world.job(&job).generation), (JobState::Running, Generation(2)));
    assert_eq!(world.job(&job).restarts_used, 1);
    // What ended the first is not forgotten while the second runs.
    let past = &world.job(&job).past[0];
    assert_eq!((past.generation, past.placed <= past.ended), (Generation(1), true));
    assert!(past.reason.starts_with("node b "), "{}", past.reason);
}

#[test]
fn a_coordinator_that_restarts_touches_nothing() {
    let mut world = World::with_nodes(&["a", "b"]);
    let running = world.submit(spec(2, 1));
    let queued = world.submit(spec(2, 1));
    world.restart_coordinator();
    assert_eq!(world.state(&running), JobState::Running);
    world.connect("a");
    world.connect("b");
    assert_eq!((world.state(&running), world.job(&running).generation), (JobState::Running, Generation(1)));
    assert_eq!(world.state(&queued), JobState::Queued);
    world.exit(0, &running, 0);
    world.exit(1, &running, 0);
    assert_eq!((world.state(&running), world.state(&queued)), (JobState::Succeeded, JobState::Running));
}

#[test]
fn an_exit_while_the_coordinator_is_away_is_heard_when_it_is_back() {
    let mut world = World::with_nodes(&["a"]);
    let job = world.submit(spec(1, 1));
    world.disconnect("a");
    world.exit(0, &job, 0);
    assert_eq!(world.state(&job), JobState::Running);
    world.connect("a");
    assert_eq!(world.state(&job), JobState::Succeeded);
}

#[test]
fn a_request_id_makes_one_job() {
    let mut world = World::default();
    let first = world.submit_as(Some("r1"), spec(1, 1)).unwrap();
    let again = world.submit_as(Some("r1"), spec(1, 1)).unwrap();
    assert_eq!(first.id, again.id);
    let refused = world.submit_as(Some("r1"), spec(2, 1)).unwrap_err();
    assert!(matches!(refused, Refusal::RequestReused { .. }), "{refused}");
    world.restart_coordinator();
    assert_eq!(world.submit_as(Some("r1"), spec(1, 1)).unwrap().id, first.id, "also after a restart");
}

#[test]
fn a_live_daemon_keeps_its_name() {
    let mut world = World::with_nodes(&["a"]);
    let session = world.node("a").session;
    let clone = world.node("a");
    (clone.incarnation, clone.data_id) = (99, Some("another directory".into()));
    world.connect("a");
    assert_eq!(world.node("a").session, session, "the clone was refused");
}

#[test]
fn cancel_ends_a_job_in_every_state_and_only_once() {
    let mut world = World::with_nodes(&["a"]);
    let (running, queued) = (world.submit(spec(1, 1)), world.submit(spec(1, 1)));
    for job in [&queued, &running] {
        world.cancel(job);
        assert_eq!(world.state(job), JobState::Cancelled);
        let finished = world.job(job).finished;
        world.pass(1000);
        world.cancel(job);
        assert_eq!(world.job(job).finished, finished, "a terminal state never changes");
    }
}

#[test]
fn priority_comes_before_order_and_a_large_job_does_not_block() {
    let mut world = World::with_nodes(&["a"]);
    let holder = world.submit(spec(1, 1));
    let large = world.submit(spec(5, 1));
    let low = world.submit(spec(1, 1));
    let mut urgent = spec(1, 1);
    urgent.priority = 5;
    let high = world.submit(urgent);
    world.exit(0, &holder, 0);
    assert_eq!(world.state(&high), JobState::Running);
    world.exit(0, &high, 0);
    assert_eq!((world.state(&large), world.state(&low)), (JobState::Queued, JobState::Running));
}

#[test]
fn an_elastic_job_takes_what_fits_up_to_its_most() {
    let mut world = World::with_nodes(&["a", "b", "c"]);
    let mut elastic = spec(1, 1);
    elastic.max_nodes = 2;
    let job = world.submit(elastic);
    assert_eq!(world.job(&job).world_size(), 2);
}

#[test]
fn cordoned_nodes_and_foreign_labels_are_passed_over() {
    let mut world = World::default();
    world.node("a").labels.insert("zone".into(), "x".into());
    world.connect("a");
    let mut picky = spec(1, 1);
    picky.node_selector.insert("zone".into(), "y".into());
    let job = world.submit(picky);
    assert_eq!(world.job(&job).reason, r#"waiting: 0 of 1 nodes; a refused: label zone is "x", not "y""#);
    let cordon = |cordon| muster_core::Input::SetCordon { by: None, node: "a".into(), cordon };
    world.input(cordon(Some("bad fan".into())));
    let plain = world.submit(spec(1, 1));
    assert_eq!(world.job(&plain).reason, "waiting: 0 of 1 nodes; a refused: cordoned (bad fan)");
    world.input(cordon(None));
    assert_eq!(world.state(&plain), JobState::Running);
}

#[test]
fn the_first_start_of_an_elastic_job_waits_for_its_last_call_and_later_ones_do_not() {
    let mut world = World::default();
    let mut elastic = spec(2, 1);
    (elastic.max_nodes, elastic.last_call, elastic.max_restarts) = (4, Millis(5_000), 1);
    let job = world.submit(elastic);
    for node in ["a", "b"] {
        world.connect(node);
    }
    let reason =
        "waiting: 2 nodes can start, and up to 4 may come within 5 s of the first of them (last_call)";
    assert_eq!((world.state(&job), world.job(&job).reason.as_str()), (JobState::Queued, reason));
    world.pass(4_000);
    // Too few again: the call is made anew once the fewest are back.
    world.crash("b");
    world.pass(20_000);
    assert_eq!(world.state(&job), JobState::Queued);
    world.connect("b");
    world.pass(4_000);
    world.connect("c");
    assert_eq!(world.state(&job), JobState::Queued);
    world.pass(1_500);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Running, 3));
    world.exit(0, &job, 1);
    world.pass(1_500);
    assert_eq!((world.state(&job), world.job(&job).generation), (JobState::Running, Generation(2)));
}

#[test]
fn with_its_most_nodes_an_elastic_job_waits_for_nothing() {
    let mut world = World::with_nodes(&["a"]);
    let mut elastic = spec(1, 1);
    (elastic.max_nodes, elastic.last_call) = (2, Millis::from_secs(600));
    let job = world.submit(elastic);
    assert_eq!(world.state(&job), JobState::Queued);
    world.connect("b");
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Running, 2));
}
