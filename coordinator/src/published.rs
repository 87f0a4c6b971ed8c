//! The published state: the records that readers see, and who is told of each change. The driver publishes a change once it
//! is durable; readers share the records and never take a turn of the driver. Nothing is decided here.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use muster_core::types::{JobId, NodeName, Resources};
use muster_core::{Core, Job, Node, NodeState, Refusal};
use tokio::sync::broadcast;

/// States of one job that may wait for a watcher; jobs change a few times in their life.
const JOB_EVENTS_MAX: usize = 64;
/// Node changes that may wait for a watcher; a slower one is told so.
const NODE_EVENTS_MAX: usize = 4096;

/// Each change of some record.
pub(crate) type Changes<T> = broadcast::Receiver<Arc<T>>;

/// The published state, shared. Cheap to clone.
///
/// The lock is held for one change, or for as many records as one look takes: neither the driver nor a reader waits for
/// long.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published(Arc<RwLock<State>>);

impl Published {
    pub fn of(core: &Core) -> Self {
        let published = Self::default();
        let mut state = published.write();
        for job in core.jobs_before(u64::MAX) {
            state.put_job(&Arc::new(job.clone()));
        }
        for node in core.nodes_after(None) {
            state.put_node(&Arc::new(node.clone()));
        }
        drop(state);
        published
    }

    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        // Each change is whole before anything can panic.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts over all records, kept from what changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Jobs that hold nodes.
    pub jobs_active: u32,
    /// Jobs that have ended and are still listed.
    pub jobs_ended: u32,
    /// Nodes whose lease is held.
    pub nodes_ready: u32,
    /// Resources of the nodes that are ready.
    pub total: Sum,
    /// Part of them that jobs hold.
    pub reserved: Sum,
}

/// A sum of resources that is wide enough for what nodes may claim to have, so that it can be taken back exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    gpus: u64,
    cpu_millis: u64,
    memory_bytes: u128,
}

impl Sum {
    fn add(&mut self, amount: Resources) {
        self.gpus += u64::from(amount.gpus);
        self.cpu_millis += u64::from(amount.cpu_millis);
        self.memory_bytes += u128::from(amount.memory_bytes);
    }

    fn remove(&mut self, amount: Resources) {
        self.gpus -= u64::from(amount.gpus);
        self.cpu_millis -= u64::from(amount.cpu_millis);
        self.memory_bytes -= u128::from(amount.memory_bytes);
    }

    /// Returns the sum, or the largest amount where that does not fit.
    pub fn resources(self) -> Resources {
        Resources {
            gpus: self.gpus.try_into().unwrap_or(u32::MAX),
            cpu_millis: self.cpu_millis.try_into().unwrap_or(u32::MAX),
            memory_bytes: self.memory_bytes.try_into().unwrap_or(u64::MAX),
        }
    }
}

/// The records, and the open watches.
#[derive(Debug, Default)]
pub(crate) struct State {
    jobs: HashMap<JobId, Arc<Job>>,
    by_order: BTreeMap<u64, Arc<Job>>,
    nodes: BTreeMap<NodeName, Arc<Node>>,
    totals: Totals,
    /// A job's entry goes when it ends, or changes and nobody listens any more.
    job_watchers: HashMap<JobId, broadcast::Sender<Arc<Job>>>,
    node_watchers: Option<broadcast::Sender<Arc<Node>>>,
}

impl State {
    pub fn job(&self, id: &str) -> Result<&Arc<Job>, Refusal> {
        let job = JobId::new(id).ok().and_then(|id| self.jobs.get(&id));
        job.ok_or_else(|| Refusal::NoJob(id.chars().take(64).collect()))
    }

    pub fn has_job(&self, id: &JobId) -> bool {
        self.jobs.contains_key(id)
    }

    pub fn node(&self, name: &str) -> Result<&Arc<Node>, Refusal> {
        let node = NodeName::new(name).ok().and_then(|name| self.nodes.get(&name));
        node.ok_or_else(|| Refusal::NoNode(name.chars().take(253).collect()))
    }

    /// Returns the jobs submitted before the one of order `before`, newest first.
    pub fn jobs_before(&self, before: u64) -> impl Iterator<Item = &Arc<Job>> {
        self.by_order.range(..before).rev().map(|(_, job)| job)
    }

    /// Returns the nodes by name, after `after`.
    pub fn nodes_after(&self, after: Option<&NodeName>) -> impl Iterator<Item = &Arc<Node>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.nodes.range::<NodeName, _>((from, Bound::Unbounded)).map(|(_, node)| node)
    }

    pub fn jobs_total(&self) -> usize {
        self.jobs.len()
    }

    pub fn nodes_total(&self) -> usize {
        self.nodes.len()
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Returns the job, and each of its later states. An ended job has none, and costs nothing to watch.
    pub fn watch_job(&mut self, id: &str) -> Result<(Arc<Job>, Changes<Job>), Refusal> {
        let job = self.job(id)?.clone();
        if job.state.is_terminal() {
            return Ok((job, broadcast::channel(1).1));
        }
        let sender = self.job_watchers.entry(job.id.clone());
        let changes = sender.or_insert_with(|| broadcast::channel(JOB_EVENTS_MAX).0).subscribe();
        Ok((job, changes))
    }

    /// Returns every node, and each one that changes.
    pub fn watch_nodes(&mut self) -> (Vec<Arc<Node>>, Changes<Node>) {
        let sender = self.node_watchers.get_or_insert_with(|| broadcast::channel(NODE_EVENTS_MAX).0);
        (self.nodes.values().cloned().collect(), sender.subscribe())
    }

    /// Takes a job's record over, and tells who watches it.
    pub fn job_changed(&mut self, job: &Arc<Job>) {
        self.put_job(job);
        let Some(sender) = self.job_watchers.get(&job.id) else { return };
        if sender.send(job.clone()).is_err() || job.state.is_terminal() {
            self.job_watchers.remove(&job.id);
        }
    }

    /// Takes a node's record over, and tells who watches.
    pub fn node_changed(&mut self, node: &Arc<Node>) {
        self.put_node(node);
        if let Some(sender) = &self.node_watchers {
            // Nobody listening is no error.
            sender.send(node.clone()).ok();
        }
    }

    /// Takes a job's record over.
    pub fn put_job(&mut self, job: &Arc<Job>) {
        self.by_order.insert(job.order, job.clone());
        if let Some(before) = self.jobs.insert(job.id.clone(), job.clone()) {
            self.totals.remove_job(&before);
        }
        self.totals.add_job(job);
    }

    pub fn delete_job(&mut self, id: &JobId) {
        if let Some(job) = self.jobs.remove(id) {
            self.by_order.remove(&job.order);
            self.job_watchers.remove(id);
            self.totals.remove_job(&job);
        }
    }

    fn put_node(&mut self, node: &Arc<Node>) {
        if let Some(before) = self.nodes.insert(node.name.clone(), node.clone()) {
            self.totals.remove_node(&before);
        }
        self.totals.add_node(node);
    }

    pub fn forget_node(&mut self, name: &NodeName) {
        if let Some(node) = self.nodes.remove(name) {
            self.totals.remove_node(&node);
        }
    }
}

impl Totals {
    fn add_job(&mut self, job: &Job) {
        self.jobs_active += u32::from(job.gang.is_some());
        self.jobs_ended += u32::from(job.state.is_terminal());
    }

    fn remove_job(&mut self, job: &Job) {
        self.jobs_active -= u32::from(job.gang.is_some());
        self.jobs_ended -= u32::from(job.state.is_terminal());
    }

    fn add_node(&mut self, node: &Node) {
        if node.state == NodeState::Ready {
            self.nodes_ready += 1;
            self.total.add(node.inventory.total);
            self.reserved.add(node.reserved.amount);
        }
    }

    fn remove_node(&mut self, node: &Node) {
        if node.state == NodeState::Ready {
            self.nodes_ready -= 1;
            self.total.remove(node.inventory.total);
            self.reserved.remove(node.reserved.amount);
        }
    }
}
