//! Random histories over the model cluster: the invariants hold after every step, and once faults stop, what
//! can run runs.

use std::collections::{BTreeMap, BTreeSet};

use crate::world::{World, name, spec};
use muster_core::health::{Finding, Severity, Verdict};
use muster_core::types::{Generation, NodeName, Resources};
use muster_core::{Input, JobState};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Submit { nodes: u32, procs: u32, gpus: u32, restarts: u32 },
    Cancel(usize),
    Exit { job: usize, rank: u32, code: i32 },
    Connect(usize),
    Disconnect(usize),
    Crash(usize),
    Freeze(usize, bool),
    Health { node: usize, severity: Option<Severity>, faulty: Option<u32> },
    Uncordon(usize),
    Pass(u64),
    RestartCoordinator,
}

const NODES: [&str; 4] = ["a", "b", "c", "d"];

fn severity() -> impl Strategy<Value = Severity> {
    prop_oneof![Just(Severity::Degraded), Just(Severity::Quarantined)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1..4_u32, 1..3_u32, 0..3_u32, 0..3_u32)
            .prop_map(|(nodes, procs, gpus, restarts)| Op::Submit { nodes, procs, gpus, restarts }),
        1 => (0..8_usize).prop_map(Op::Cancel),
        6 => (0..8_usize, 0..6_u32, prop_oneof![3 => Just(0), 1 => Just(1)])
            .prop_map(|(job, rank, code)| Op::Exit { job, rank, code }),
        4 => (0..4_usize).prop_map(Op::Connect),
        2 => (0..4_usize).prop_map(Op::Disconnect),
        1 => (0..4_usize).prop_map(Op::Crash),
        1 => (0..4_usize, any::<bool>()).prop_map(|(node, frozen)| Op::Freeze(node, frozen)),
        2 => (0..4_usize, prop::option::of(severity()), prop::option::of(0..4_u32))
            .prop_map(|(node, severity, faulty)| Op::Health { node, severity, faulty }),
        1 => (0..4_usize).prop_map(Op::Uncordon),
        3 => (1..20_000_u64).prop_map(Op::Pass),
        1 => Just(Op::RestartCoordinator),
    ]
}

/// What a node says of its health, with a GPU that is faulty.
fn say_health(world: &mut World, node: &str, severity: Option<Severity>, faulty: Option<u32>) {
    let Some(session) = world.node(node).session else { return };
    let found = |severity| Finding { subject: "disk".into(), severity, reason: "full".into() };
    let mut inventory = world.join_of(node).inventory;
    for gpu in inventory.gpus.iter_mut().filter(|gpu| Some(gpu.index) == faulty) {
        gpu.fault = Some("it is off the bus".into());
    }
    world.input(Input::Health {
        node: name(node),
        session,
        findings: severity.map(found).into_iter().collect(),
        inventory: Some(Box::new(inventory)),
    });
}

fn quarantined(world: &World) -> BTreeSet<NodeName> {
    let all = world.core.nodes_after(None);
    all.filter(|node| node.health.verdict() == Verdict::Quarantined).map(|node| node.name.clone()).collect()
}

struct History {
    jobs: Vec<String>,
    generations: BTreeMap<String, Generation>,
    ended: BTreeMap<String, JobState>,
}

impl History {
    /// What must hold over time, not just at one moment.
    fn check(&mut self, world: &World) {
        for id in &self.jobs {
            // Ended jobs beyond the bound may be gone; none other may.
            let Ok(job) = world.core.job(id) else {
                assert!(self.ended.contains_key(id), "{id} was acknowledged and is gone");
                continue;
            };
            let before = self.generations.insert(id.clone(), job.generation).unwrap_or_default();
            assert!(job.generation >= before, "{id}: generation went back");
            assert!(job.restarts_used <= job.spec.max_restarts, "{id}: more restarts than allowed");
            if let Some(state) = self.ended.get(id) {
                assert_eq!(*state, job.state, "{id}: a terminal state changed");
            } else if job.state.is_terminal() {
                self.ended.insert(id.clone(), job.state);
            }
        }
        for (node, model) in &world.nodes {
            let mut owners = BTreeMap::new();
            for (gang, (assignment, report)) in &model.gangs {
                let running = report.phase == muster_core::types::ObservedPhase::Running;
                for gpu in assignment.placement.gpus.iter().filter(|_| running) {
                    let other = owners.insert(*gpu, gang.clone());
                    assert!(other.is_none(), "{node}: GPU {gpu} runs {gang} and {other:?}");
                }
            }
        }
    }
}

fn apply(world: &mut World, history: &mut History, op: &Op) {
    let job = |index: usize| history.jobs.get(index % history.jobs.len().max(1)).cloned();
    match *op {
        Op::Submit { nodes, procs, gpus, restarts } => {
            let mut spec = spec(nodes, procs);
            spec.per_proc = Resources { gpus, ..Resources::default() };
            spec.max_restarts = restarts;
            let id = world.submit(spec);
            history.jobs.push(id);
        }
        Op::Cancel(index) => {
            if let Some(id) = job(index).filter(|id| world.core.job(id).is_ok()) {
                world.cancel(&id);
            }
        }
        Op::Exit { job: index, rank, code } => {
            if let Some(id) = job(index).filter(|id| world.core.job(id).is_ok()) {
                world.exit(rank, &id, code);
            }
        }
        Op::Connect(node) => world.connect(NODES[node]),
        Op::Disconnect(node) => world.disconnect(NODES[node]),
        Op::Crash(node) => world.crash(NODES[node]),
        Op::Freeze(node, frozen) => {
            world.node(NODES[node]).frozen = frozen;
            world.settle();
        }
        Op::Health { node, severity, faulty } => say_health(world, NODES[node], severity, faulty),
        Op::Uncordon(node) => {
            world.input(Input::SetCordon { by: None, node: NODES[node].to_owned(), cordon: None });
        }
        Op::Pass(millis) => world.pass(millis),
        Op::RestartCoordinator => world.restart_coordinator(),
    }
}

/// Every node is back and does what it is told; every rank that runs ends well.
fn heal(world: &mut World, history: &History) {
    for round in 0..40 {
        for node in NODES {
            world.node(node).frozen = false;
            if world.node(node).session.is_none() {
                world.connect(node);
            }
        }
        for node in NODES {
            say_health(world, node, None, None);
            world.input(Input::SetCordon { by: None, node: node.to_owned(), cordon: None });
        }
        world.settle();
        world.pass(if round == 0 { 130_000 } else { 31_000 });
        for id in &history.jobs {
            for rank in 0..6 {
                if world.core.job(id).is_ok() {
                    world.exit(rank, id, 0);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_and_what_can_run_runs(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::default();
        for node in NODES {
            world.node(node).gpus = 4;
            world.connect(node);
        }
        let mut history = History { jobs: vec![], generations: BTreeMap::new(), ended: BTreeMap::new() };
        for op in &ops {
            let (before, known) = (quarantined(&world), history.generations.clone());
            apply(&mut world, &mut history, op);
            history.check(&world);
            // Nothing but news of a node makes its verdict worse, so one that was quarantined before and is now was so
            // all the time.
            let out: BTreeSet<NodeName> = &before & &quarantined(&world);
            for job in history.jobs.iter().filter_map(|id| world.core.job(id).ok()) {
                let new = known.get(job.id.as_str()).is_none_or(|generation| *generation < job.generation);
                let placed = job.placements().iter().filter(|_| new && job.gang.is_some());
                for placement in placed {
                    prop_assert!(!out.contains(&placement.node), "{} got {}", placement.node, job.id);
                }
            }
        }
        heal(&mut world, &history);
        history.check(&world);
        for id in &history.jobs {
            if let Ok(job) = world.core.job(id) {
                let fits = job.spec.procs_per_node * job.spec.per_proc.gpus <= 4;
                prop_assert!(job.state.is_terminal() || !fits, "{id} is {:?}: {}", job.state, job.reason);
            }
        }
    }

    #[test]
    fn the_same_history_gives_the_same_state(ops in prop::collection::vec(op(), 1..40)) {
        let run = || {
            let mut world = World::default();
            let mut history = History { jobs: vec![], generations: BTreeMap::new(), ended: BTreeMap::new() };
            for op in &ops {
                apply(&mut world, &mut history, op);
            }
            format!("{:?}", world.core)
        };
        prop_assert_eq!(run(), run());
    }
}
