//! The driver's own promises: what is heard in time counts, however long it waits, and readers neither wait nor see what
//! could still be lost.

use std::time::Duration;

use muster_core::types::{Incarnation, JobSpec, Millis, NodeName};
use muster_core::{Caller, Inventory, Join, NodeState};
use muster_store::MemoryStore;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::published::State;

/// Long enough that a busy machine is not taken for a silent node.
const LEASE: Millis = Millis(3_000);

type Messages = mpsc::Receiver<Result<v1::SessionResponse, tonic::Status>>;

/// A node that has joined and opened its session: its name, the session, and what it is told.
async fn connect(handle: &Handle, name: &str) -> (NodeName, Arc<Link>, Messages) {
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
    let link = handle.open_session(hello, sender).await.unwrap();
    (node, link, receiver)
}

type Running = tokio::task::JoinHandle<Result<End, Error>>;

fn run(store: Box<dyn Store>) -> (Handle, CancellationToken, Running) {
    let config = muster_core::Config { lease: LEASE, ..muster_core::Config::default() };
    // No test has points, so no directory is made.
    let metrics = Metrics::new("/nowhere".into());
    let (handle, mut driver) =
        start(store, config, metrics, Monitor::new(), Clock::start(), Arc::new(|| true)).unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let running = tokio::spawn(async move { driver.run(&stopped, &CancellationToken::new()).await });
    (handle, stop, running)
}

fn submission() -> Input {
    let spec = JobSpec::new(vec!["train".to_owned()]).check().unwrap();
    Input::Submit { by: Caller::trusted(), request_id: None, spec: Box::new(spec) }
}

async fn submit(handle: &Handle) -> JobId {
    match handle.request(submission()).await.unwrap() {
        Reply::Job(job) => job.id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_a_reply_reads_what_it_wrote() {
    let (handle, stop, running) = run(Box::new(MemoryStore::default()));
    for count in 1..=200 {
        let id = submit(&handle).await;
        let seen = handle.read(|state| (state.has_job(&id), state.jobs_total())).unwrap();
        assert_eq!(seen, (true, count));
    }
    stop.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_neither_for_the_driver_nor_for_who_waits_there() {
    let (handle, stop, running) = run(Box::new(MemoryStore::default()));
    let id = submit(&handle).await;
    let (release, held) = std::sync::mpsc::channel::<()>();
    let work = Command::Busy(Box::new(move || {
        held.recv().ok();
    }));
    handle.inbox.send((handle.clock.now(), work)).await.unwrap();
    // It holds one in its hands, and as many wait as may.
    while handle.inbox_depth() > 0 {
        tokio::task::yield_now().await;
    }
    while handle.inbox.try_send((handle.clock.now(), Command::Busy(Box::new(|| ())))).is_ok() {}
    assert_eq!(handle.inbox_depth(), INBOX_MAX);
    assert!(handle.read(|state| state.has_job(&id)).unwrap());
    assert_eq!(handle.watch_job(id.as_str()).unwrap().0.id, id);
    drop(release);
    stop.cancel();
    running.await.unwrap().unwrap();
}

/// A store whose disk is full until it is not.
struct Full(MemoryStore, Arc<AtomicBool>);

impl Store for Full {
    fn campaign(&mut self) -> Result<Fence, StoreError> {
        self.0.campaign()
    }

    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.0.load()
    }

    fn commit(&mut self, fence: Fence, batch: &Batch) -> Result<(), StoreError> {
        if self.1.load(std::sync::atomic::Ordering::Acquire) {
            return Err(StoreError::Retryable("the disk is full".to_owned()));
        }
        self.0.commit(fence, batch)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_see_nothing_that_could_still_be_lost() {
    let is_full = Arc::new(AtomicBool::new(false));
    let (handle, stop, running) = run(Box::new(Full(MemoryStore::default(), is_full.clone())));
    let id = submit(&handle).await;
    is_full.store(true, std::sync::atomic::Ordering::Release);
    let refused = handle.request(submission()).await.unwrap_err();
    assert!(matches!(refused, RequestError::StoreUnavailable(_)), "{refused}");
    assert!(handle.trouble().is_some());
    let seen: Vec<JobId> =
        handle.read(|state| state.jobs_before(u64::MAX).map(|job| job.id.clone()).collect()).unwrap();
    assert_eq!(seen, [id]);
    is_full.store(false, std::sync::atomic::Ordering::Release);
    // It was decided, and is shown once it is written.
    while handle.read(State::jobs_total).unwrap() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop.cancel();
    running.await.unwrap().unwrap();
}

/// Each piece of work is too short to be taken for a pause of the process; together they outlast a lease.
#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_are_acknowledged_and_count_while_the_driver_is_busy() {
    let (handle, stop, running) = run(Box::new(MemoryStore::default()));
    let (_, first, mut acks) = connect(&handle, "first").await;
    let (_, silent, _silent_acks) = connect(&handle, "second").await;

    let piece = LEASE.0 / 20;
    let (done, mut over) = tokio::sync::oneshot::channel();
    for _ in 0..30 {
        let busy = Command::Busy(Box::new(move || std::thread::sleep(Duration::from_millis(piece))));
        handle.inbox.send((handle.clock.now(), busy)).await.unwrap();
    }
    let last = Command::Busy(Box::new(move || done.send(()).unwrap()));
    handle.inbox.send((handle.clock.now(), last)).await.unwrap();
    let mut seq = 0;
    while over.try_recv().is_err() {
        seq += 1;
        handle.heartbeat(&first, seq).unwrap();
        // At once: nothing is waited for.
        let mut acknowledged = false;
        while let Ok(message) = acks.try_recv() {
            let ack = v1::session_response::Message::HeartbeatAck(v1::HeartbeatAck { seq });
            acknowledged |= message.unwrap().message == Some(ack);
        }
        assert!(acknowledged, "heartbeat {seq}");
        tokio::time::sleep(Duration::from_millis(piece)).await;
    }
    let state = |name| handle.read(|state| state.node(name).ok().map(|node| node.state)).unwrap();
    while state("second") != Some(NodeState::Lost) {
        handle.heartbeat(&first, seq).unwrap();
        tokio::time::sleep(Duration::from_millis(piece)).await;
    }
    assert_eq!(state("first"), Some(NodeState::Ready));
    assert!(!silent.pulse.beat(handle.clock.now()), "nothing is acknowledged after the end");
    stop.cancel();
    assert_eq!(running.await.unwrap().unwrap(), End::Stopped);
}

/// What a session has acknowledged counts when it ends, and when another one takes its place.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_heartbeat_of_a_session_counts_after_it() {
    let (handle, stop, running) = run(Box::new(MemoryStore::default()));
    let (node, link, _acks) = connect(&handle, "n").await;
    tokio::time::sleep(Duration::from_millis(LEASE.0 * 3 / 4)).await;
    handle.heartbeat(&link, 1).unwrap();
    let heard = link.pulse.last().unwrap();
    handle.disconnected(&node, &link).await.unwrap();
    assert!(!link.pulse.beat(handle.clock.now()));
    let state = || handle.read(|state| state.node("n").ok().map(|node| node.state)).unwrap();
    while state() != Some(NodeState::Lost) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(handle.clock.now() >= heard.plus(LEASE), "the lease lasts from its last heartbeat");
    stop.cancel();
    assert_eq!(running.await.unwrap().unwrap(), End::Stopped);
}
