//! Snapshots of a store in turn, and what is told of them.

use std::time::Duration;

use muster_core::types::{
    DesiredPhase, GangId, Generation, JobId, JobSpec, NodeName, NodePlacement, StopMode, StopSignal,
};
use muster_tcpstore::WaitView;

use super::*;

/// Unix time when the machine started.
const BOOT: u64 = 1_760_000_000_000;
const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

fn there(node: u8) -> IpAddr {
    [10, 0, 1, node].into()
}

/// The first of so many nodes with two ranks each; its own ranks are the processes 100 and 101.
fn first_node(nodes: u32) -> Rendezvous {
    let spec = JobSpec::new(vec!["train".into()]);
    let placement = NodePlacement {
        node: NodeName::new("n1").unwrap(),
        address: HERE,
        group_rank: 0,
        first_rank: Rank(0),
        procs: 2,
        gpus: vec![],
    };
    let assignment = Assignment {
        gang: GangId { job: JobId::new("j").unwrap(), generation: Generation(1) },
        phase: DesiredPhase::Running,
        stop: StopMode { signal: StopSignal::default(), grace: spec.stop_grace, dump_stacks: false },
        spec,
        placement,
        world_size: 2 * nodes,
        group_world_size: nodes,
        master_addr: HERE,
        master_port: None,
        restart_count: 0,
    };
    Rendezvous::new(&assignment, vec![100, 101], Millis(0))
}

fn client(address: IpAddr, process: u32) -> ClientView {
    ClientView {
        peer: (address, 40_000).into(),
        process: Some(process),
        rank: None,
        connected: Duration::ZERO,
        requests: 1,
        wait: None,
    }
}

fn waits(client: &ClientView, key: &str, seconds: u64) -> ClientView {
    let waited = Duration::from_secs(seconds);
    let wait = WaitView { keys: vec![key.into()], keys_total: 1, rank: Some(3), waited };
    ClientView { wait: Some(wait), ..client.clone() }
}

/// A look so many seconds after the machine's start; a little later on the wall's clock, as it is read second.
fn look(at: &mut Rendezvous, second: u64, clients: Vec<ClientView>) -> Option<Stuck> {
    let parent = |process| [(201, 200), (200, 101), (9, 1)].into_iter().find(|(child, _)| *child == process);
    let unix = Millis(BOOT + second * 1000 + second % 3);
    let seen = Snapshot { clients, ..Snapshot::default() };
    at.take(Millis(second * 1000), unix, &seen, |process| Some(parent(process)?.1))
}

fn stuck(told: Option<Stuck>) -> RendezvousReport {
    *told.expect("it is news").expect("something is stuck")
}

#[test]
fn ranks_that_have_not_come_are_told_of_once_and_then_the_end_of_it() {
    let mut at = first_node(2);
    // The second of this node's ranks is what its process has started.
    let all = || vec![client(HERE, 100), client(HERE, 201), client(there(2), 100), client(there(2), 7)];
    for second in 1..=3 {
        assert_eq!(look(&mut at, second, vec![]), None, "nobody uses the store");
    }
    assert_eq!(at.deadline(), Millis(8000), "there is nothing to see");
    assert_eq!(look(&mut at, 8, all()[..2].to_vec()), None);
    assert_eq!(at.deadline(), Millis(9000), "some come");
    assert_eq!(look(&mut at, 10, all()[..3].to_vec()), None);
    assert_eq!(look(&mut at, 14, all()[..3].to_vec()), None, "the last came four seconds ago");
    let told = stuck(look(&mut at, 15, all()[..3].to_vec()));
    assert_eq!((told.come, told.last_came), (3, Millis(BOOT + 10_000)));
    let host = |address, come, ranks, processes| RendezvousHost { address, come, ranks, processes };
    let hosts = [host(there(2), 1, vec![], vec![100]), host(HERE, 2, vec![Rank(0), Rank(1)], vec![])];
    assert_eq!(
        told.hosts, hosts,
        "those that lack some come first; numbers of processes are each node's own"
    );
    assert_eq!(look(&mut at, 16, all()[..3].to_vec()), None, "it is as before");
    assert_eq!(look(&mut at, 17, all()[1..3].to_vec()), None, "who has come has come");
    assert_eq!(look(&mut at, 18, all()), Some(None));
    assert_eq!(look(&mut at, 30, vec![]), None, "all have come, and may go");
}

#[test]
fn who_waits_for_a_key_is_told_with_the_time_since_when() {
    let mut at = first_node(2);
    let all = |seconds| {
        let named = ClientView { rank: Some(2), ..client(there(2), 7) };
        let silent = ClientView { process: None, ..client(there(2), 0) };
        let short = waits(&client(there(2), 8), "later", 1);
        vec![
            waits(&client(HERE, 201), "k", seconds),
            waits(&named, "k", 1),
            waits(&silent, "k", 1),
            short,
            client(HERE, 100),
        ]
    };
    assert_eq!(look(&mut at, 4, all(4)), None);
    let told = stuck(look(&mut at, 5, all(5)));
    let who =
        |address, process, rank: Option<u32>| RendezvousClient { address, process, rank: rank.map(Rank) };
    let expected = RendezvousWait {
        key: "k".into(),
        setter: Some(Rank(3)),
        waiting: 3,
        clients: vec![
            who(HERE, Some(201), Some(1)),
            who(there(2), Some(7), Some(2)),
            who(there(2), None, None),
        ],
        since: Millis(BOOT + 2),
    };
    assert_eq!((told.come, told.hosts, told.waits), (4, vec![], vec![expected]), "all have come");
    assert_eq!(look(&mut at, 6, all(6)), None, "the same wait");
    // The wall's clock is set forward: on it, the wait began later.
    let told = at.take(
        Millis(7000),
        Millis(BOOT + 3_607_000),
        &Snapshot { clients: all(7), ..Snapshot::default() },
        |process| (process == 201).then_some(101),
    );
    assert_eq!(stuck(told).waits[0].since, Millis(BOOT + 3_600_000));
    assert_eq!(look(&mut at, 8, all(1)), Some(None), "it got its key, and waits for it anew");
}

#[test]
fn a_large_gang_is_told_in_short() {
    let mut at = first_node(500);
    let mut clients = vec![client(HERE, 100)];
    for node in 0..498_u32 {
        let address = IpAddr::from([10, 1, (node / 256) as u8, (node % 256) as u8]);
        clients.extend((0..2).map(|process| waits(&client(address, 4_000_000 + process), "k", 9)));
        clients.push(waits(&client(address, 4_000_000), &format!("{}{node}", "x".repeat(110)), 9));
    }
    look(&mut at, 9, clients.clone());
    let told = stuck(look(&mut at, 14, [clients, vec![waits(&client(HERE, 100), "first", 99)]].concat()));
    assert_eq!((told.come, told.hosts.len(), told.waits.len(), told.waits_more), (997, 499, 8, 492));
    let processes = told.hosts.iter().map(|host| host.ranks.len() + host.processes.len()).sum::<usize>();
    assert_eq!((told.hosts[0].address, processes), (HERE, 255), "as many whole hosts as there is room for");
    assert_eq!(told.waits[0].key, "first");
    assert!(told.waits.iter().all(|wait| wait.clients.len() <= 8));
    let bytes = serde_json::to_vec(&told).unwrap().len();
    assert!(bytes < 64 << 10, "{bytes} bytes");
}
