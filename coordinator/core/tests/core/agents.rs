//! Agents that Muster did not start: rounds begin with the right ones, and all hear what they must.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod model;

use std::collections::BTreeSet;

use model::{World, spec};
use muster_core::agents::{Hello, Place, Said};
use muster_core::types::{Incarnation, Millis, NodeName, RequestId};
use proptest::prelude::*;

#[test]
fn a_round_begins_with_the_last_to_come_and_in_the_order_of_addresses() {
    let mut world = World::new(spec(3, 3, 0), 3);
    (0..2).for_each(|at| world.come(at));
    world.pass(1_500);
    assert_eq!(
        (world.places().as_slice(), world.clients[0].reason.as_str()),
        (&["waits", "waits", "-"].map(str::to_owned)[..], "2 of 3 agents have come")
    );
    world.come(2);
    assert_eq!(world.places(), ["2/3", "1/3", "0/3"], "10.0.0.98 comes before 10.0.0.100");
    let place = world.clients[1].held.unwrap();
    assert_eq!((place.round, place.store_rank, place.store.to_string().as_str()), (1, 0, "10.0.0.98:1003"));
}

#[test]
fn whoever_only_its_own_machine_reaches_does_not_serve_the_others() {
    let mut world = World::new(spec(2, 2, 0), 2);
    world.connect(0);
    world.clients[0].entering = true;
    world.say(0, Said::Enter("127.0.0.1:1".parse().unwrap()));
    // Comes before 127.0.0.1 in no order.
    world.connect(1);
    world.clients[1].entering = true;
    world.say(1, Said::Enter("192.168.0.1:2".parse().unwrap()));
    let place = world.clients[0].held.unwrap();
    assert_eq!((place.rank, place.store_rank, place.store.port()), (0, 1, 2));
}

#[test]
fn the_first_round_waits_for_more_and_later_ones_for_those_that_are_known() {
    let mut world = World::new(spec(1, 4, 5_000), 4);
    world.come(0);
    world.pass(4_000);
    assert!(
        world.clients[0].reason.starts_with("1 agents have come, and up to 4 may within"),
        "{}",
        world.clients[0].reason
    );
    world.come(1);
    assert_eq!(world.places()[..2], ["waits", "waits"]);
    world.pass(1_000);
    assert_eq!(world.places(), ["1/2", "0/2", "-", "-"]);

    world.come(2);
    assert_eq!(world.places(), ["recalled", "recalled", "waits", "-"]);
    assert_eq!(world.clients[0].reason, "n2 has come");
    world.enter(0);
    world.pass(60_000);
    assert_eq!(world.clients[2].reason, "n1 still stop their workers");
    world.enter(1);
    assert_eq!(world.places(), ["1/3", "0/3", "2/3", "-"], "at once, in their order, the new one last");

    // One fails and starts again: all do.
    world.enter(1);
    assert_eq!(world.places(), ["recalled", "waits", "recalled", "-"]);
    world.obey();
    assert_eq!(world.places(), ["1/3", "0/3", "2/3", "-"]);
}

#[test]
fn a_lost_agent_is_told_within_a_second_and_a_spare_takes_its_place() {
    let mut world = World::new(spec(2, 2, 0), 3);
    (0..2).for_each(|at| world.come(at));
    world.come(2);
    world.pass(1_500);
    assert_eq!(world.clients[2].reason, "a round of 2 agents runs, which is as many as it takes");
    world.kill(1);
    world.pass(900);
    assert_eq!(world.places(), ["1/2", "-", "waits"]);
    world.pass(200);
    assert_eq!((world.places()[0].as_str(), world.clients[0].reason.as_str()), ("recalled", "n1 is lost"));
    world.obey();
    assert_eq!(world.places(), ["0/2", "-", "1/2"]);
    // Nobody takes the next one's place: the other waits for it.
    world.kill(2);
    world.pass(2_000);
    world.obey();
    assert_eq!(world.places(), ["waits", "-", "-"]);
    world.come(1);
    assert_eq!(world.places(), ["0/2", "1/2", "-"]);
}

#[test]
fn a_stream_that_breaks_costs_nothing_if_it_is_back_in_time() {
    let mut world = World::new(spec(2, 2, 0), 2);
    (0..2).for_each(|at| world.come(at));
    world.cut(0);
    world.pass(500);
    world.connect(0);
    world.pass(60_000);
    assert_eq!(world.places(), ["1/2", "0/2"]);
    // A stream that took its place before it was known to be broken.
    let old = world.clients[0].link.unwrap();
    world.connect(0);
    let tells = world.run.hear(world.now, &world.id(0), old, Said::Gone);
    world.take(tells);
    world.pass(60_000);
    assert_eq!(world.places(), ["1/2", "0/2"]);
    // Its place was on the way when it broke: it is told again.
    world.clients[0].held = None;
    world.connect(0);
    assert_eq!(world.places(), ["1/2", "0/2"]);
}

#[test]
fn a_coordinator_that_is_started_again_hears_of_the_round() {
    let mut world = World::new(spec(1, 3, 0), 3);
    world.spec.last_call = Millis(1_000);
    (0..2).for_each(|at| world.come(at));
    world.pass(1_000);
    assert_eq!(world.places(), ["1/2", "0/2", "-"]);
    world.restart_coordinator();
    world.connect(1);
    world.come(2);
    assert_eq!(world.places(), ["1/2", "recalled", "waits"], "it has room for one more");
    world.obey();
    world.pass(10_000);
    assert_eq!(world.clients[2].reason, "1 agents have not come back since the coordinator was started");
    world.connect(0);
    world.obey();
    assert_eq!(world.places(), ["1/3", "0/3", "2/3"]);
    assert_eq!(world.clients[0].held.unwrap().round, 2);

    world.restart_coordinator();
    (0..2).for_each(|at| world.connect(at));
    world.pass(14_000);
    assert_eq!(world.places(), ["1/3", "0/3", "2/3"]);
    world.kill(2);
    world.pass(1_100);
    assert_eq!(world.clients[0].reason, "1 agents have not come back");
    world.obey();
    assert_eq!(world.places(), ["1/2", "0/2", "-"]);

    // Those that come first wait for those that may have a round.
    world.restart_coordinator();
    world.come(2);
    world.pass(2_900);
    assert_eq!(world.places()[2], "waits");
    (0..2).for_each(|at| world.connect(at));
    world.obey();
    world.pass(100);
    assert_eq!(world.places(), ["1/3", "0/3", "2/3"]);
}

#[test]
fn the_end_of_a_run_is_told_with_its_failure_and_another_can_begin() {
    let mut world = World::new(spec(2, 3, 0), 3);
    (0..2).for_each(|at| world.come(at));
    world.come(2);
    world.say(2, Said::Leave("no place in time".into()));
    assert_eq!(world.clients[0].closed, None, "it had no place");
    world.obey();
    assert_eq!(world.places()[..2], ["1/2", "0/2"]);
    world.cut(1);
    world.say(0, Said::Leave("ChildFailedError".into()));
    world.connect(1);
    assert_eq!(
        world.clients[1].closed.as_deref(),
        Some("n0: ChildFailedError"),
        "it hears of it when it is back"
    );
    assert!(world.run.is_empty());
    for at in 0..3 {
        world.kill(at);
        world.come(at);
    }
    assert_eq!(world.places(), ["recalled", "recalled", "waits"]);
    world.obey();
    assert_eq!(world.places(), ["1/3", "0/3", "2/3"]);
    world.say(0, Said::Leave(String::new()));
    assert_eq!(world.clients[1].closed.as_deref(), Some(""));
}

#[test]
fn agents_of_one_run_agree() {
    let mut world = World::new(spec(1, 2, 1_000), 1);
    world.come(0);
    let hello = Hello {
        run: RequestId::new("r").unwrap(),
        agent: Incarnation::new("x").unwrap(),
        node: NodeName::new("n").unwrap(),
        spec: spec(2, 2, 0),
        held: None,
    };
    let refused = world.run.join(world.now, 99, hello).unwrap_err();
    assert!(
        refused.contains("1 to 2 nodes with a last call of 1 s, and this one wants 2 to 2 and 0 s"),
        "{refused}"
    );
}

#[derive(Clone, Debug)]
enum Op {
    Come(usize),
    Cut(usize),
    Connect(usize),
    Kill(usize),
    Fail(usize),
    Obey(usize),
    Leave(usize, bool),
    Pass(u64),
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..6_usize).prop_map(Op::Come),
        2 => (0..6_usize).prop_map(Op::Cut),
        4 => (0..6_usize).prop_map(Op::Connect),
        2 => (0..6_usize).prop_map(Op::Kill),
        2 => (0..6_usize).prop_map(Op::Fail),
        6 => (0..6_usize).prop_map(Op::Obey),
        1 => (0..6_usize, any::<bool>()).prop_map(|(at, failed)| Op::Leave(at, failed)),
        3 => (1..5_000_u64).prop_map(Op::Pass),
        1 => Just(Op::Restart),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_those_that_stay_get_a_round(
        (min, more, last_call) in (1..4_u32, 0..3_u32, 0..3_000_u64),
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let mut world = World::new(spec(min, min + more, last_call), 6);
        for op in ops {
            match op {
                Op::Come(at) if world.clients[at].link.is_none() && world.clients[at].held.is_none() => world.come(at),
                Op::Cut(at) => world.cut(at),
                Op::Connect(at) if world.clients[at].link.is_none() => world.connect(at),
                Op::Kill(at) => world.kill(at),
                Op::Fail(at) if world.clients[at].held.is_some() => world.enter(at),
                Op::Obey(at) if world.clients[at].recalled => world.enter(at),
                Op::Leave(at, failed) => {
                    world.say(at, Said::Leave(if failed { "failed".into() } else { String::new() }));
                    world.kill(at);
                }
                Op::Pass(span) => world.pass(span),
                Op::Restart => world.restart_coordinator(),
                _ => {}
            }
        }
        // From here on everybody does what a client does, and nobody dies.
        for at in 0..6 {
            if world.clients[at].link.is_none() {
                world.connect(at);
            }
            if world.clients[at].closed.is_some() {
                world.kill(at);
                world.connect(at);
            }
            if world.clients[at].held.is_none() {
                world.enter(at);
            }
        }
        for _ in 0..20 {
            world.pass(5_000);
            world.obey();
        }
        let placed: Vec<Place> = world.clients.iter().filter_map(|client| client.held).collect();
        prop_assert_eq!(placed.len(), (min + more).min(6) as usize, "{:?}", world.places());
        let rounds: BTreeSet<u64> = placed.iter().map(|place| place.round).collect();
        let ranks: BTreeSet<u32> = placed.iter().map(|place| place.rank).collect();
        prop_assert_eq!((rounds.len(), ranks.len()), (1, placed.len()), "one round, each rank once");
    }
}
