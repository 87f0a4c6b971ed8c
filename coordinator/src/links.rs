//! The open sessions: how to reach a node, and who reads the logs it sends.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_core::Pulse;
use muster_core::types::{Assignment, GangId, NodeName, Session};
use muster_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;

/// Messages that may wait for one node. Above it the node is too slow to be kept: its session is closed, and
/// the next one starts from the whole desired state.
pub(crate) const LINK_QUEUE_MAX: usize = 1024;

/// Gangs of which a session remembers the node's part. Beyond it all are forgotten, and looked up again: a node holds a
/// few, and one that asks for many has invented them.
const PARTS_MAX: usize = 1024;

/// The ranks of a gang that a node holds or held; none if it never held the gang.
pub(crate) type Part = Option<Range<u32>>;
/// Time between two looks whether a reader's message finds room.
const ROOM_INTERVAL: Duration = Duration::from_millis(20);

/// Takes what one reader gets of one log. Pieces are boxed: a channel has room for 32 of them from its start, and there are
/// many channels.
pub(crate) type LogSender = mpsc::Sender<Box<v1::LogData>>;

/// One node's session.
#[derive(Debug)]
pub(crate) struct Link {
    pub session: Session,
    /// Number of the coordinator's time of leading.
    term: u64,
    sender: mpsc::Sender<Result<v1::SessionResponse, Status>>,
    /// Its heartbeats.
    pub pulse: Arc<Pulse>,
    logs: Mutex<HashMap<u64, LogSender>>,
    next_subscription: AtomicU64,
    /// The node's part of each gang that was assigned to it or asked for. A gang's placement never changes.
    parts: Mutex<BTreeMap<GangId, Part>>,
}

impl Link {
    pub fn new(
        session: Session,
        term: u64,
        sender: mpsc::Sender<Result<v1::SessionResponse, Status>>,
    ) -> Arc<Self> {
        let (logs, next_subscription) = (Mutex::default(), AtomicU64::new(1));
        let (pulse, parts) = (Arc::default(), Mutex::default());
        Arc::new(Self { session, term, sender, pulse, logs, next_subscription, parts })
    }

    /// Remembers the part that an assignment gives the node: what it reports of it needs no question to the driver.
    pub fn assigned(&self, assignment: &Assignment) {
        self.remember(assignment.gang.clone(), Some(assignment.placement.ranks()));
    }

    /// Remembers the node's part of a gang.
    pub fn remember(&self, gang: GangId, part: Part) {
        let mut parts = lock(&self.parts);
        if parts.len() >= PARTS_MAX {
            parts.clear();
        }
        parts.insert(gang, part);
    }

    /// Returns the node's part of a gang, if it is remembered.
    pub fn part(&self, gang: &GangId) -> Option<Part> {
        lock(&self.parts).get(gang).cloned()
    }

    /// Queues a message. False if the queue is full or the stream is gone.
    pub fn send(&self, message: v1::session_response::Message) -> bool {
        self.sender.try_send(Ok(v1::SessionResponse { message: Some(message), term: self.term })).is_ok()
    }

    /// Ends the stream with a status, if it still takes one; no heartbeat is acknowledged from now
    /// on.
    pub fn close(&self, status: Status) {
        self.pulse.end();
        self.sender.try_send(Err(status)).ok();
        lock(&self.logs).clear();
    }

    /// Whether a message for readers finds room. Half of the queue is for what the core says: readers, of which there may be
    /// many, must not be why a node is taken for too slow.
    fn has_room_for_readers(&self) -> bool {
        self.sender.capacity() > LINK_QUEUE_MAX / 2
    }

    /// Waits until a message for readers finds room, or the stream is gone.
    pub async fn room_for_readers(&self) {
        while !self.has_room_for_readers() && !self.sender.is_closed() {
            tokio::time::sleep(ROOM_INTERVAL).await;
        }
    }

    /// Opens a subscription; `make` gets its number.
    pub fn subscribe(&self, sender: LogSender, make: impl FnOnce(u64) -> v1::LogSubscribe) -> Option<u64> {
        let number = self.next_subscription.fetch_add(1, Ordering::Relaxed);
        lock(&self.logs).insert(number, sender);
        let sent = self.send(v1::session_response::Message::LogSubscribe(make(number)));
        if !sent {
            lock(&self.logs).remove(&number);
        }
        sent.then_some(number)
    }

    /// Ends a subscription on both sides.
    pub fn unsubscribe(&self, subscription: u64) {
        // One that finds no room is made up for: the node is told again when it sends more.
        if lock(&self.logs).remove(&subscription).is_some() && self.has_room_for_readers() {
            self.send(v1::session_response::Message::LogUnsubscribe(v1::LogUnsubscribe { subscription }));
        }
    }

    /// Hands a piece of log to its reader. A reader that has more waiting than the credit it gave is gone or
    /// the node overran its credit; either way the subscription ends rather than hold up the session. False if a
    /// reader was there and has lost its stream so.
    pub fn route_log(&self, data: v1::LogData) -> bool {
        let (subscription, last) = (data.subscription, data.end || !data.error.is_empty());
        let reader = lock(&self.logs).get(&subscription).cloned();
        let (read, delivered) =
            (reader.is_some(), reader.is_some_and(|reader| reader.try_send(Box::new(data)).is_ok()));
        if !delivered {
            self.unsubscribe(subscription);
        } else if last {
            lock(&self.logs).remove(&subscription);
        }
        delivered || !read
    }
}

/// All open sessions by node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Links(Arc<Mutex<HashMap<NodeName, Arc<Link>>>>);

impl Links {
    pub fn get(&self, node: &NodeName) -> Option<Arc<Link>> {
        lock(&self.0).get(node).cloned()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.0).len()
    }

    /// Puts a session in the place of the node's older one, which it returns.
    pub fn replace(&self, node: &NodeName, link: Arc<Link>) -> Option<Arc<Link>> {
        lock(&self.0).insert(node.clone(), link)
    }

    /// Closes every session.
    pub fn close_all(&self, status: &Status) {
        for (_, link) in std::mem::take(&mut *lock(&self.0)) {
            link.close(status.clone());
        }
    }

    /// Takes a session out if it is still the node's.
    pub fn remove(&self, node: &NodeName, session: Session) -> Option<Arc<Link>> {
        let mut links = lock(&self.0);
        if links.get(node)?.session == session { links.remove(node) } else { None }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section is one map operation: a panic elsewhere cannot leave the map half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
