//! Faults and changes of membership as scripts: what is restarted, what it costs, and who is blamed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use muster_core::types::{DesiredPhase, Generation, Millis, NodeName, ObservedPhase, Rank, RankProgress};
use muster_core::{Input, JobState, NodeState, Pulse, Refusal};

use crate::world::{World, name, spec};

fn elastic(min: u32, max: u32, restarts: u32) -> muster_core::types::JobSpec {
    let mut spec = spec(min, 1);
    (spec.max_nodes, spec.max_restarts) = (max, restarts);
    spec
}

fn drain(world: &mut World, node: &str, timeout: Option<u64>) {
    let timeout = timeout.map(Millis);
    let input = Input::Drain { by: None, node: node.into(), reason: "new kernel".into(), timeout };
    world.input(input).unwrap().unwrap();
}

#[test]
fn an_elastic_job_goes_on_with_the_survivors_and_takes_the_lost_one_back() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = world.submit(elastic(1, 2, 3));
    assert_eq!(world.job(&job).world_size(), 2);
    world.disconnect("b");
    world.pass(11_000);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Running, 1));
    assert_eq!(world.job(&job).restarts_used, 1, "a lost node is a fault");
    world.crash("b");
    world.connect("b");
    assert_eq!(world.job(&job).world_size(), 1, "nodes often come back together: a moment is waited");
    world.pass(1_000);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Running, 2));
    assert_eq!((world.job(&job).restarts_used, world.job(&job).generation), (1, Generation(3)));
}

#[test]
fn room_that_appears_while_an_elastic_job_starts_is_not_lost_to_it() {
    let mut world = World::with_nodes(&["a"]);
    world.node("a").frozen = true;
    let job = world.submit(elastic(1, 4, 0));
    for node in ["b", "c", "d"] {
        world.connect(node);
    }
    world.pass(2_000);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Starting, 1));
    world.node("a").frozen = false;
    world.settle();
    world.pass(2_000);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Running, 4));
    assert_eq!(world.job(&job).restarts_used, 0);
}

#[test]
fn nor_is_room_that_appears_while_a_coordinator_takes_up_an_elastic_job_that_starts() {
    let mut world = World::with_nodes(&["a", "b"]);
    world.disconnect("b");
    world.pass(11_000);
    world.node("a").frozen = true;
    let job = world.submit(elastic(1, 2, 0));
    world.restart_coordinator();
    world.connect("a");
    world.connect("b");
    world.pass(2_000);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Starting, 1));
    world.node("a").frozen = false;
    world.settle();
    world.pass(2_000);
    assert_eq!((world.state(&job), world.job(&job).world_size()), (JobState::Running, 2));
}

#[test]
fn every_elastic_job_is_looked_at_when_room_appears_however_many_there_are() {
    let mut world = World::default();
    world.config.scan_max = 2;
    world.restart_coordinator();
    let names = ["a", "b", "c", "d"];
    for node in names {
        world.connect(node);
    }
    let jobs: Vec<String> = names.iter().map(|_| world.submit(elastic(1, 2, 0))).collect();
    world.pass(2_000);
    for node in ["e", "f", "g", "h"] {
        world.connect(node);
    }
    world.pass(4_000);
    let sizes: Vec<u32> = jobs.iter().map(|job| world.job(job).world_size()).collect();
    assert_eq!(sizes, [2, 2, 2, 2]);
}

#[test]
fn growth_does_not_take_what_others_wait_for() {
    let mut world = World::with_nodes(&["a"]);
    let job = world.submit(elastic(1, 2, 0));
    let waiting = world.submit(spec(1, 1));
    world.connect("b");
    world.pass(2_000);
    assert_eq!((world.state(&waiting), world.job(&job).generation), (JobState::Running, Generation(1)));
}

#[test]
fn a_drained_node_is_emptied_without_spending_a_restart() {
    let mut world = World::with_nodes(&["a", "b", "c"]);
    let job = world.submit(spec(2, 1));
    drain(&mut world, "b", None);
    let placed: Vec<&str> = world.job(&job).placements().iter().map(|p| p.node.as_str()).collect();
    assert_eq!((world.state(&job), placed), (JobState::Running, vec!["a", "c"]));
    assert_eq!((world.job(&job).restarts_used, world.job(&job).generation), (0, Generation(2)));
    assert!(world.core.node("b").unwrap().reserved.jobs.is_empty());
    world.restart_coordinator();
    assert!(world.core.node("b").unwrap().drain.is_some(), "it is stored");
    world.input(Input::SetCordon { by: None, node: "b".into(), cordon: None });
    assert!(world.core.node("b").unwrap().drain.is_none());
}

#[test]
fn a_drain_with_a_deadline_shortens_the_grace() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = world.submit(spec(2, 1));
    world.node("a").frozen = true;
    drain(&mut world, "b", Some(2_000));
    let told = world.job(&job).assignment(0).unwrap();
    assert_eq!((told.phase, told.stop.grace), (DesiredPhase::Stopped, Millis(2_000)));
    drain(&mut world, "b", Some(500));
    assert_eq!(world.job(&job).assignment(0).unwrap().stop.grace, Millis(500), "less time than before");
    assert!(world.job(&job).reason.contains("node b is drained (new kernel)"), "{}", world.job(&job).reason);
}

#[test]
fn a_daemon_that_leaves_moves_its_gangs() {
    let mut world = World::with_nodes(&["a", "b", "c"]);
    let job = world.submit(spec(2, 1));
    let session = world.node("b").session.unwrap();
    world.input(Input::Leaving { node: name("b"), session, reason: "its daemon is being stopped".into() });
    assert_eq!((world.state(&job), world.job(&job).restarts_used), (JobState::Running, 0));
    assert_eq!(world.job(&job).placements()[1].node.as_str(), "c");
    world.input(Input::Goodbye { node: name("b"), session });
    assert_eq!(world.core.node("b").unwrap().state, NodeState::Left);
}

fn progress(rank: u32, step: Option<u64>, state: char) -> RankProgress {
    RankProgress { rank: Rank(rank), step, silent: Millis(5_000), state }
}

fn say_quiet(world: &mut World, node: &str, job: &str, quiet: Vec<RankProgress>) {
    let gang = world.job(job).gang_id();
    let node: NodeName = name(node);
    let mut report = world.nodes[&node].gangs[&gang].1.clone();
    report.quiet = quiet;
    world.report(&node, report);
}

#[test]
fn a_gang_hangs_when_no_node_of_it_sees_progress_and_the_laggards_are_named() {
    let table = [
        (progress(1, Some(41), 'S'), "rank 1 on node b is at step 41 of 42"),
        (progress(1, Some(42), 'T'), "rank 1 on node b is stopped by a signal or a debugger at step 42"),
        (progress(1, Some(42), 'D'), "rank 1 on node b waits in the kernel at step 42"),
        (progress(1, Some(42), 'S'), "no rank is behind the others"),
        (progress(1, None, 'S'), "rank 1 on node b has reported no step, others 42"),
    ];
    for (laggard, expected) in table {
        let mut world = World::with_nodes(&["a", "b"]);
        let mut watched = spec(2, 1);
        (watched.progress_timeout, watched.max_restarts) = (Millis(5_000), 1);
        let job = world.submit(watched);
        say_quiet(&mut world, "b", &job, vec![laggard.clone()]);
        assert_eq!(world.state(&job), JobState::Running, "others make progress");
        say_quiet(&mut world, "b", &job, vec![]);
        say_quiet(&mut world, "a", &job, vec![progress(0, Some(42), 'S')]);
        assert_eq!(world.state(&job), JobState::Running, "b does again");
        world.node("a").frozen = true;
        say_quiet(&mut world, "b", &job, vec![laggard]);
        assert_eq!(world.state(&job), JobState::Restarting);
        let reason = world.job(&job).reason.clone();
        assert!(reason.contains(&format!("no rank has shown progress for 5 s: {expected};")), "{reason}");
        assert!(world.job(&job).assignment(0).unwrap().stop.dump_stacks, "stacks are wanted");
    }
}

#[test]
fn a_master_port_that_was_taken_costs_no_restart_a_few_times() {
    let mut world = World::with_nodes(&["a"]);
    let job = world.submit(spec(1, 1));
    for attempt in 1..=4 {
        let gang = world.job(&job).gang_id();
        let mut report = world.nodes[&name("a")].gangs[&gang].1.clone();
        let mut exit = muster_core::types::RankExit {
            rank: Rank(0),
            code: Some(1),
            signal: None,
            time: world.now,
            stderr_tail: String::new(),
            out_of_memory: false,
            error: Some("The server socket has failed to listen: errno: 98 - Address already in use".into()),
        };
        exit.stderr_tail = "DistNetworkError: EADDRINUSE".into();
        (report.phase, report.exits) = (ObservedPhase::Stopped, vec![exit]);
        world.report(&name("a"), report);
        let expected = if attempt < 4 { JobState::Running } else { JobState::Failed };
        assert_eq!(world.state(&job), expected, "attempt {attempt}: {}", world.job(&job).reason);
    }
    assert_eq!(world.job(&job).generation, Generation(4));
}

#[test]
fn what_the_kernel_holds_ends_the_generation_but_keeps_its_devices() {
    let mut world = World::default();
    for node in ["a", "b"] {
        world.node(node).gpus = 2;
        world.connect(node);
    }
    let mut two = spec(1, 2);
    two.per_proc.gpus = 1;
    two.max_restarts = 1;
    let job = world.submit(two);
    let held = world.job(&job).placements()[0].node.clone();
    let gang = world.job(&job).gang_id();
    let mut report = world.nodes[&held].gangs[&gang].1.clone();
    world.node(held.as_str()).frozen = true;
    world.exit(1, &job, 1);
    report.phase = ObservedPhase::Killed;
    world.report(&held, report.clone());
    assert_eq!((world.state(&job), world.job(&job).generation), (JobState::Running, Generation(2)));
    assert_ne!(world.job(&job).placements()[0].node, held, "it goes on elsewhere");
    let node = world.core.node(held.as_str()).unwrap();
    assert_eq!(node.reserved.gpus.len(), 2, "the devices are not free");
    assert!(node.drain.as_ref().unwrap().reason.contains("the kernel holds them"));
    report.phase = ObservedPhase::Stopped;
    world.report(&held, report);
    assert!(world.core.node(held.as_str()).unwrap().reserved.gpus.is_empty());
}

#[test]
fn a_name_is_taken_over_early_only_with_proof() {
    // (open session, same directory, same boot, same address) and whether it is taken over at once.
    let table = [
        (false, true, true, true, true),
        (false, true, false, true, true),
        (true, true, false, true, true),
        (false, true, false, false, false),
        (false, false, true, true, false),
        (true, false, false, false, false),
    ];
    for (open, same_dir, same_boot, same_address, expected) in table {
        let mut world = World::with_nodes(&["a"]);
        let job = world.submit(elastic(1, 1, 1));
        if !open {
            world.disconnect("a");
        }
        let mut join = world.join_of("a");
        join.incarnation = muster_core::types::Incarnation::new("anew").unwrap();
        if !same_dir {
            join.data_id = "another".into();
        }
        if !same_boot {
            join.boot_id = "another".into();
        }
        if !same_address {
            join.address = [10, 9, 9, 9].into();
        }
        let reply = world.input(Input::Join(Box::new(join))).unwrap();
        let case = (open, same_dir, same_boot, same_address);
        assert_eq!(reply.is_ok(), expected, "{case:?}: {reply:?}");
        if let Err(refusal) = reply {
            let clone = matches!(refusal, Refusal::NameHeld(_));
            assert_eq!(clone, open, "{case:?}: {refusal}");
        }
        assert_eq!(world.state(&job), JobState::Running, "{case:?}: nothing is known of the ranks yet");
    }
}

#[test]
fn a_late_hello_is_passed_over() {
    let mut world = World::with_nodes(&["a"]);
    let job = world.submit(spec(1, 1));
    let incarnation = world.join_of("a").incarnation;
    let late = Input::Hello { node: name("a"), incarnation, gangs: vec![], leaving: None, number: 1 };
    assert!(matches!(world.input(late), Some(Err(Refusal::LateHello(_)))));
    assert_eq!(world.state(&job), JobState::Running);
}

#[test]
fn only_the_session_that_holds_the_lease_renews_it() {
    let mut world = World::with_nodes(&["a"]);
    let session = world.node("a").session.unwrap();
    let pulse = Arc::new(Pulse::default());
    let others = Arc::new(Pulse::default());
    let heard_since = |world: &World| {
        let of = |_: &NodeName, asked| Some(if asked == session { pulse.clone() } else { others.clone() });
        world.core.heard_since(world.now, of)
    };
    assert!(heard_since(&world).is_none(), "nothing is due");
    world.now = world.now.plus(Millis(6_000));
    assert!(pulse.beat(world.now));
    world.now = world.now.plus(Millis(6_000));
    let heard = heard_since(&world).expect("its lease would end");
    world.input(heard);
    assert_eq!(world.core.node("a").unwrap().state, NodeState::Ready);

    world.now = world.now.plus(Millis(6_000));
    assert!(heard_since(&world).is_none(), "the last one was too long ago");
    assert!(!pulse.beat(world.now), "a node must not trust in a lease that has ended");
    world.input(Input::Tick);
    assert_eq!(world.core.node("a").unwrap().state, NodeState::Lost);
}

#[test]
fn times_stay_in_order_when_a_coordinator_comes_back_on_a_clock_that_was_set_back() {
    let mut world = World::with_nodes(&["a"]);
    world.pass(3_600_000);
    let running = world.submit(spec(1, 1));
    let queued = world.submit(spec(1, 1));
    world.now = Millis(1_000);
    world.restart_coordinator();
    world.connect("a");
    world.exit(0, &running, 0);
    world.exit(0, &queued, 0);
    for job in [running, queued] {
        let job = world.job(&job);
        let (started, finished) = (job.started.unwrap(), job.finished.unwrap());
        assert!(job.created <= started && started <= finished, "{job:?}");
    }
}
