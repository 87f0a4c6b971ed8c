//! Who is missing at the store of a gang's ranks, from what its nodes say.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::IpAddr;

use muster_core::types::rendezvous::{RendezvousClient, RendezvousHost, RendezvousWait};
use muster_core::types::{Millis, Rank, RankProgress, RendezvousReport};
use muster_core::{Event, Input, JobState, Rendezvous};

use crate::world::{World, name, spec};

const A: [u8; 4] = [10, 0, 0, 1];
const B: [u8; 4] = [10, 0, 0, 2];
const ELSEWHERE: [u8; 4] = [10, 9, 9, 9];
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

/// Two nodes at these addresses and a job of two ranks on each: 100 and 101 on a, 100 and 201 on b. On one machine no
/// two processes have one number: there, b's first is 200.
fn gang(addresses: [[u8; 4]; 2]) -> (World, String) {
    let mut world = World::default();
    for (node, address) in ["a", "b"].into_iter().zip(addresses) {
        world.node(node).address = Some(address.into());
        world.connect(node);
    }
    let mut watched = spec(2, 2);
    (watched.progress_timeout, watched.max_restarts) = (Millis(5_000), 1);
    let job = world.submit(watched);
    let first_of_b = if addresses[0] == addresses[1] { 200 } else { 100 };
    say(&mut world, "a", &job, |report| report.processes = vec![100, 101]);
    say(&mut world, "b", &job, |report| report.processes = vec![first_of_b, 201]);
    (world, job)
}

fn say(world: &mut World, node: &str, job: &str, what: impl FnOnce(&mut muster_core::types::GangReport)) {
    let gang = world.job(job).gang_id();
    let node = name(node);
    let mut report = world.nodes[&node].gangs[&gang].1.clone();
    // What was said before is said again.
    what(&mut report);
    world.nodes.get_mut(&node).unwrap().gangs.get_mut(&gang).unwrap().1 = report.clone();
    world.report(&node, report);
}

fn host(address: [u8; 4], ranks: &[u32], processes: &[u32]) -> RendezvousHost {
    let come = (ranks.len() + processes.len()) as u32;
    let ranks = ranks.iter().copied().map(Rank).collect();
    RendezvousHost { address: address.into(), come, ranks, processes: processes.to_vec() }
}

fn stuck(world: &mut World, job: &str, hosts: &[RendezvousHost], waits: &[RendezvousWait]) -> Rendezvous {
    let come = hosts.iter().map(|host| host.come).sum();
    let (hosts, waits) = (hosts.to_vec(), waits.to_vec());
    let report = RendezvousReport { come, last_came: Millis(7), hosts, waits, waits_more: 0 };
    say(world, "a", job, |said| said.rendezvous = Some(Box::new(report)));
    world.job(job).rendezvous().unwrap()
}

#[test]
fn missing_ranks_are_named_as_far_as_they_can_be_told() {
    let counted = |address: [u8; 4], come| RendezvousHost { come, ..host(address, &[], &[]) };
    let apart: [(&[RendezvousHost], &str, u32); 10] = [
        (&[host(A, &[0, 1], &[]), host(B, &[], &[100])], "3 on b", 1),
        (&[host(A, &[0, 1], &[]), host(B, &[], &[201])], "2 on b", 1),
        (&[host(A, &[0], &[])], "1 on a, 2 on b, 3 on b", 3),
        (&[counted(A, 2), host(B, &[3], &[])], "2 on b", 1),
        (&[counted(A, 2)], "2 on b, 3 on b", 2),
        // A program that b's own process has started: it may be either rank.
        (&[host(A, &[0, 1], &[]), host(B, &[], &[999])], "", 1),
        (&[host(A, &[0], &[]), host(B, &[], &[999])], "1 on a", 2),
        (&[host(A, &[0], &[]), counted(B, 2)], "1 on a", 1),
        // From another address than a node's: it may be anybody, unless its rank is known.
        (&[host(A, &[0, 1], &[]), host(ELSEWHERE, &[], &[100])], "", 1),
        (&[host(A, &[0, 1], &[]), host(ELSEWHERE, &[3], &[])], "2 on b", 1),
    ];
    let together: [(&[RendezvousHost], &str, u32); 3] = [
        (&[host(LOOPBACK, &[0, 1], &[200])], "3 on b", 1),
        (&[host(LOOPBACK, &[], &[201])], "0 on a, 1 on a, 2 on b", 3),
        (&[host(LOOPBACK, &[0], &[999])], "", 2),
    ];
    for (addresses, table) in [([A, B], &apart[..]), ([LOOPBACK, LOOPBACK], &together[..])] {
        let (mut world, job) = gang(addresses);
        for (hosts, expected, total) in table {
            let seen = stuck(&mut world, &job, hosts, &[]);
            let missing: Vec<String> =
                seen.missing.iter().map(|(rank, node)| format!("{rank} on {node}")).collect();
            assert_eq!((missing.join(", ").as_str(), seen.missing_total), (*expected, *total), "{hosts:?}");
        }
        assert_eq!(world.state(&job), JobState::Running, "nothing is done about it");
    }
}

#[test]
fn who_waits_is_named_and_it_is_over_when_the_node_says_so() {
    let (mut world, job) = gang([A, B]);
    let client = |address: [u8; 4], process, rank: Option<u32>| RendezvousClient {
        address: IpAddr::from(address),
        process,
        rank: rank.map(Rank),
    };
    let wait = RendezvousWait {
        key: "k".into(),
        setter: Some(Rank(3)),
        waiting: 5,
        clients: vec![client(B, Some(100), None), client(A, Some(9), Some(0)), client(B, None, None)],
        since: Millis(3),
    };
    let all = [host(A, &[0, 1], &[]), host(B, &[], &[100, 201])];
    let seen = stuck(&mut world, &job, &all, &[RendezvousWait { setter: Some(Rank(4)), ..wait.clone() }]);
    assert_eq!((seen.missing_total, seen.awaited[0].setter.as_ref()), (0, None), "there is no such rank");
    let seen = stuck(&mut world, &job, &all, &[wait]);
    let awaited = &seen.awaited[0];
    assert_eq!(awaited.waiting, [(Rank(0), name("a")), (Rank(2), name("b"))]);
    assert_eq!((awaited.setter.as_ref(), awaited.since), (Some(&(Rank(3), name("b"))), Millis(3)));
    world.restart_coordinator();
    for node in ["a", "b"] {
        world.connect(node);
    }
    assert_eq!(world.job(&job).rendezvous(), Some(seen), "it is not stored, but nodes say everything again");
    say(&mut world, "a", &job, |report| report.rendezvous = None);
    assert_eq!(world.job(&job).rendezvous(), None);
}

#[test]
fn a_hang_says_who_is_missing() {
    let (mut world, job) = gang([A, B]);
    stuck(&mut world, &job, &[host(A, &[0, 1], &[]), host(B, &[], &[100])], &[]);
    for (node, rank) in [("a", 0), ("b", 3)] {
        let quiet = RankProgress { rank: Rank(rank), step: None, silent: Millis(5_000), state: 'S' };
        world.node(node).frozen = true;
        say(&mut world, node, &job, |report| report.quiet = vec![quiet]);
    }
    let reason = &world.job(&job).reason;
    assert!(reason.contains("; rank 3 on node b has not come to the ranks' store; their stacks"), "{reason}");
    assert_eq!(world.job(&job).rendezvous(), None, "they are told to end");
}

#[test]
fn what_a_node_adds_is_shown_to_readers_once() {
    let (mut world, job) = gang([A, B]);
    let node = name("a");
    let session = world.nodes[&node].session.unwrap();
    let gang = world.job(&job).gang_id();
    let mut report = world.nodes[&node].gangs[&gang].1.clone();
    report.processes = vec![300, 301];
    for expected in [true, false] {
        let report = Box::new(report.clone());
        let effects = world.core.step(world.now, Input::Report { node: node.clone(), session, report });
        assert_eq!(effects.events.contains(&Event::JobDetail(gang.job.clone())), expected);
        assert!(effects.writes.is_empty(), "what nodes observe is not stored");
    }
}
