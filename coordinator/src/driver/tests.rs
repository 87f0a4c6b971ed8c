//! The driver's own promises: what is heard in time counts, however long it waits.

use std::time::Duration;

use muster_core::types::{Incarnation, Millis, NodeName};
use muster_core::{Inventory, Join, NodeState};
use muster_store::MemoryStore;
use tokio_util::sync::CancellationToken;

use super::*;

const LEASE: Millis = Millis(1_000);

async fn arrive(handle: &Handle, name: &str) -> (NodeName, Session) {
    let node = NodeName::new(name).unwrap();
    let incarnation = Incarnation::new("i").unwrap();
    let join = Join {
        name: node.clone(),
        address: [127, 0, 0, 1].into(),
        incarnation: incarnation.clone(),
        boot_id: String::new(),
        data_id: name.to_owned(),
        inventory: Inventory::default(),
    };
    handle.request(Input::Join(Box::new(join))).await.unwrap();
    let hello = Hello { node: node.clone(), incarnation, gangs: vec![], leaving: None, number: 1 };
    let (sender, receiver) = mpsc::channel(16);
    // Nobody reads it, and it is not to look closed.
    std::mem::forget(receiver);
    (node, handle.open_session(hello, sender).await.unwrap().session)
}

/// Each piece of work is too short to be taken for a pause of the process; together they outlast a lease.
#[tokio::test(flavor = "multi_thread")]
async fn no_lease_ends_while_its_heartbeat_waits() {
    let dir = tempfile::tempdir().unwrap();
    let config = muster_core::Config { lease: LEASE, ..muster_core::Config::default() };
    let metrics = Metrics::new(dir.path().to_owned());
    let store = Box::new(MemoryStore::default());
    let (handle, mut driver) =
        start(store, config, metrics, Monitor::new(), Clock::start(), Arc::new(|| true)).unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let running = tokio::spawn(async move { driver.run(&stopped, &CancellationToken::new()).await });
    let (first, first_session) = arrive(&handle, "first").await;
    let (second, second_session) = arrive(&handle, "second").await;

    let heard = handle.clock.now();
    let busy = |_: &Core| -> Later {
        std::thread::sleep(Duration::from_millis(LEASE.0 / 20));
        Box::new(|| ())
    };
    let mut all: Vec<Command> = (0..25).map(|_| Command::Read(Box::new(busy))).collect();
    // The first heartbeat is a step of the core, and would end the lease of the second node.
    all.push(Command::Heartbeat { node: first, session: first_session, seq: 1 });
    all.push(Command::Heartbeat { node: second, session: second_session, seq: 1 });
    for command in all {
        handle.inbox.send((heard, command)).await.unwrap();
    }
    let states = handle.read(|core| core.nodes_after(None).map(|node| node.state).collect::<Vec<_>>());
    assert_eq!(states.await.unwrap(), [NodeState::Ready, NodeState::Ready]);
    stop.cancel();
    assert_eq!(running.await.unwrap().unwrap(), End::Stopped);
}
