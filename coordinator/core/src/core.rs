//! The state and its one entry point, [`Core::step`]. Requests and nodes are handled here, gangs in
//! `gang.rs`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::effects::{Effects, Event, Refusal, Reply, ToNode, Write};
use crate::job::{Job, JobState};
use crate::node::{Inventory, Join, Node, NodeState, Reserved};
use crate::schedule::{Candidate, Plan, solve};
use crate::types::{GangReport, Incarnation, JobId, JobSpec, Millis, NodeName, RequestId, Session};

/// Settings and bounds of the core.
#[derive(Clone, Debug)]
pub struct Config {
    /// Time without a heartbeat after which a node is lost.
    pub lease: Millis,
    /// Most jobs that wait. Each costs up to a spec's 256 KiB of memory.
    pub queued_max: usize,
    /// Ended jobs that are kept for listings; the oldest go first.
    pub ended_max: usize,
    /// Most nodes, ten times the largest cluster aimed at.
    pub nodes_max: usize,
    /// A node that is lost or left is listed for this long.
    pub node_memory: Millis,
    /// Waiting jobs looked at in one pass, so that a long queue of jobs too large for the cluster does not
    /// make every event slow.
    pub scan_max: usize,
    /// Longest wait before a job that crashes at once is started again.
    pub backoff_max: Millis,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lease: Millis::from_secs(10),
            queued_max: 100_000,
            ended_max: 10_000,
            nodes_max: 100_000,
            node_memory: Millis::from_secs(24 * 3600),
            scan_max: 256,
            backoff_max: Millis::from_secs(30),
        }
    }
}

/// Identity and counters of the cluster. None of the counters ever goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Made once when the store is created; job ids follow from it.
    pub seed: u64,
    /// Submissions so far.
    pub orders: u64,
    /// Sessions so far.
    pub sessions: u64,
}

/// Everything that is stored.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counters; none in a new store.
    pub meta: Option<Meta>,
    /// All jobs.
    pub jobs: Vec<Job>,
    /// All nodes.
    pub nodes: Vec<Node>,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A user submits a job.
    Submit {
        /// Makes a repetition harmless.
        request_id: Option<RequestId>,
        /// The checked spec.
        spec: Box<JobSpec>,
    },
    /// A user asks where a job would go.
    PlanJob(Box<JobSpec>),
    /// A user stops a job.
    Cancel {
        /// The job's id as given.
        job: String,
        /// In words.
        reason: String,
    },
    /// A user takes a node out of scheduling or gives it back.
    SetCordon {
        /// The node's name as given.
        node: String,
        /// Why; none gives it back.
        cordon: Option<String>,
    },
    /// A daemon registers.
    Join(Box<Join>),
    /// A daemon opens its session and says everything it observes.
    Hello {
        /// The node.
        node: NodeName,
        /// As in its Join.
        incarnation: Incarnation,
        /// Every gang it holds anything of.
        gangs: Vec<GangReport>,
    },
    /// A daemon's heartbeat.
    Heartbeat {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
    },
    /// A gang's part on a node changed.
    Report {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
        /// What the node observes.
        report: Box<GangReport>,
    },
    /// A session's stream broke.
    Disconnected {
        /// The node.
        node: NodeName,
        /// The session.
        session: Session,
    },
    /// A daemon ends in good order; its ranks are gone.
    Goodbye {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
    },
    /// The driver did not run for a while (a suspended machine, say) and heard no heartbeat meanwhile: every
    /// node gets a whole lease to be heard again.
    Stalled,
    /// A deadline has passed.
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    Lease(NodeName),
    ForgetNode(NodeName),
    StartTimeout(JobId, crate::types::Generation),
    Requeue(JobId),
}

type QueueKey = (Reverse<i32>, u64, JobId);

/// The state machine. See the crate's documentation for the contract.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: Config,
    pub(crate) meta: Meta,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    requests: BTreeMap<RequestId, JobId>,
    pub(crate) queue: BTreeSet<QueueKey>,
    by_order: BTreeMap<u64, JobId>,
    pub(crate) ended: BTreeSet<(Millis, JobId)>,
    pub(crate) nodes: BTreeMap<NodeName, Node>,
    pub(crate) timers: BTreeSet<(Millis, Timer)>,
    /// Room has appeared: every waiting job may fit now.
    pub(crate) rescan: bool,
    /// Jobs that have just come into the queue: only they need a look.
    pub(crate) fresh: BTreeSet<QueueKey>,
}

impl Core {
    /// Takes up a stored state. `seed` is used if the store is new. Every node gets a whole lease to come back
    /// in, and every gang is as it was: nothing is stopped because the coordinator was away.
    pub fn load(now: Millis, config: Config, seed: u64, snapshot: Snapshot) -> (Self, Effects) {
        let mut core = Self {
            meta: snapshot.meta.unwrap_or(Meta { seed, ..Meta::default() }),
            config,
            jobs: BTreeMap::new(),
            requests: BTreeMap::new(),
            queue: BTreeSet::new(),
            by_order: BTreeMap::new(),
            ended: BTreeSet::new(),
            nodes: BTreeMap::new(),
            timers: BTreeSet::new(),
            rescan: true,
            fresh: BTreeSet::new(),
        };
        for mut node in snapshot.nodes {
            (node.state, node.session) = (NodeState::Disconnected, None);
            node.reserved = Reserved::default();
            node.lease_expires = now.plus(core.config.lease);
            core.timers.insert((node.lease_expires, Timer::Lease(node.name.clone())));
            core.nodes.insert(node.name.clone(), node);
        }
        for job in snapshot.jobs {
            core.load_job(now, job);
        }
        let mut fx = Effects { meta_changed: snapshot.meta.is_none(), ..Effects::default() };
        core.finish(now, &mut fx);
        (core, fx)
    }

    fn load_job(&mut self, now: Millis, mut job: Job) {
        let id = job.id.clone();
        if let Some(request) = &job.request_id {
            self.requests.insert(request.clone(), id.clone());
        }
        self.by_order.insert(job.order, id.clone());
        if let Some(gang) = &mut job.gang {
            gang.reset_observed();
            let mut gone = Vec::new();
            for placement in &gang.placements {
                match self.nodes.get_mut(&placement.node) {
                    Some(node) => node.reserve(&id, &job.spec, placement),
                    None => gone.push(placement.group_rank as usize),
                }
            }
            // A node that is no longer known cannot come back with ranks of this gang.
            for group_rank in gone {
                gang.observe(group_rank, crate::job::Observed::Stopped);
            }
            let deadline = now.plus(job.spec.start_timeout);
            self.timers.insert((deadline, Timer::StartTimeout(id.clone(), job.generation)));
        } else if job.state.is_terminal() {
            self.ended.insert((job.finished.unwrap_or_default(), id.clone()));
        } else {
            self.timers.insert((job.not_before, Timer::Requeue(id.clone())));
        }
        self.jobs.insert(id, job);
    }

    /// Takes one input. Never panics on any input; a request that is refused changes nothing.
    pub fn step(&mut self, now: Millis, input: Input) -> Effects {
        let mut fx = Effects::default();
        match input {
            Input::Submit { request_id, spec } => {
                fx.reply = Some(self.submit(now, request_id, *spec, &mut fx).map(Reply::from));
            }
            Input::PlanJob(spec) => fx.reply = Some(Ok(Reply::Plan(self.plan(&spec)))),
            Input::Cancel { job, reason } => {
                fx.reply = Some(self.cancel(now, &job, &reason, &mut fx).map(Reply::from));
            }
            Input::SetCordon { node, cordon } => {
                fx.reply = Some(self.set_cordon(now, &node, cordon, &mut fx));
            }
            Input::Join(join) => fx.reply = Some(self.join(now, *join, &mut fx)),
            Input::Hello { node, incarnation, gangs } => {
                fx.reply = Some(self.hello(now, &node, &incarnation, &gangs, &mut fx));
            }
            Input::Heartbeat { node, session } => self.renew(now, &node, session),
            Input::Report { node, session, report } => {
                self.renew(now, &node, session);
                if self.has_session(&node, session) {
                    self.report(now, &node, &report, &mut fx);
                }
            }
            Input::Disconnected { node, session } => {
                if self.has_session(&node, session) {
                    self.set_node_state(now, &node, NodeState::Disconnected, &mut fx);
                }
            }
            Input::Goodbye { node, session } => {
                if self.has_session(&node, session) {
                    self.node_gone(now, &node, NodeState::Left, &mut fx);
                }
            }
            Input::Stalled => self.renew_all(now),
            Input::Tick => {}
        }
        self.fire_timers(now, &mut fx);
        self.schedule(now, &mut fx);
        self.finish(now, &mut fx);
        fx
    }

    /// When `Tick` is due next, unless something else comes first.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// One job.
    pub fn job(&self, id: &str) -> Result<&Job, Refusal> {
        let job = JobId::new(id).ok().and_then(|id| self.jobs.get(&id));
        job.ok_or_else(|| Refusal::NoJob(id.chars().take(64).collect()))
    }

    /// One node.
    pub fn node(&self, name: &str) -> Result<&Node, Refusal> {
        let node = NodeName::new(name).ok().and_then(|name| self.nodes.get(&name));
        node.ok_or_else(|| Refusal::NoNode(name.chars().take(253).collect()))
    }

    /// Jobs submitted before the one of order `before`, newest first.
    pub fn jobs_before(&self, before: u64) -> impl Iterator<Item = &Job> {
        self.by_order.range(..before).rev().filter_map(|(_, id)| self.jobs.get(id))
    }

    /// Nodes by name, after `after`.
    pub fn nodes_after(&self, after: Option<&NodeName>) -> impl Iterator<Item = &Node> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.nodes.range::<NodeName, _>((from, Bound::Unbounded)).map(|(_, node)| node)
    }

    /// How many jobs have ended, of those that are kept.
    pub fn jobs_ended(&self) -> usize {
        self.ended.len()
    }

    /// How many jobs wait for nodes.
    pub fn jobs_queued(&self) -> usize {
        self.queue.len()
    }

    /// How many jobs are known.
    pub fn jobs_total(&self) -> usize {
        self.jobs.len()
    }

    /// Counters and identity.
    pub fn meta(&self) -> Meta {
        self.meta
    }

    fn submit(
        &mut self,
        now: Millis,
        request_id: Option<RequestId>,
        spec: JobSpec,
        fx: &mut Effects,
    ) -> Result<&Job, Refusal> {
        if let Some(id) = request_id.as_ref().and_then(|request| self.requests.get(request)) {
            let job = &self.jobs[id];
            if job.spec == spec {
                return Ok(job);
            }
            let request_id = request_id.map(|id| id.to_string()).unwrap_or_default();
            return Err(Refusal::RequestReused { request_id, job: id.clone() });
        }
        if self.queue.len() >= self.config.queued_max {
            return Err(Refusal::QueueFull { queued: self.queue.len() });
        }
        let id = self.mint_job_id();
        fx.meta_changed = true;
        if let Some(request) = &request_id {
            self.requests.insert(request.clone(), id.clone());
        }
        let job = Job {
            id: id.clone(),
            order: self.meta.orders,
            request_id,
            spec,
            state: JobState::Queued,
            generation: crate::types::Generation(0),
            restarts_used: 0,
            reason: "waiting to be placed".to_owned(),
            gang: None,
            exit: None,
            past: Vec::new(),
            created: now,
            started: None,
            finished: None,
            not_before: now,
        };
        self.by_order.insert(job.order, id.clone());
        self.jobs.insert(id.clone(), job);
        self.enqueue(&id);
        fx.store_job(&id);
        self.schedule(now, fx);
        Ok(&self.jobs[&id])
    }

    /// Ids are short enough to type and differ between clusters: a counter, scrambled with the seed.
    fn mint_job_id(&mut self) -> JobId {
        const ALPHABET: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz023456789";
        loop {
            self.meta.orders += 1;
            let mut bits = splitmix64(self.meta.seed ^ splitmix64(self.meta.orders));
            let text: String = std::iter::repeat_with(|| {
                let digit = ALPHABET[(bits % 32) as usize];
                bits /= 32;
                char::from(digit)
            })
            .take(8)
            .collect();
            if let Ok(id) = JobId::new(text)
                && !self.jobs.contains_key(&id)
            {
                return id;
            }
        }
    }

    fn plan(&self, spec: &JobSpec) -> Plan {
        solve(spec, self.nodes.values().map(Candidate::from))
    }

    fn set_cordon(
        &mut self,
        now: Millis,
        name: &str,
        cordon: Option<String>,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let name = self.node(name)?.name.clone();
        let Some(node) = self.nodes.get_mut(&name) else { return Err(Refusal::NoNode(name.to_string())) };
        if node.cordon != cordon {
            self.rescan |= cordon.is_none();
            node.cordon = cordon;
            node.changed = now;
            fx.store_node(&name);
        }
        Ok(Reply::Node(Box::new(node.clone())))
    }

    fn join(&mut self, now: Millis, join: Join, fx: &mut Effects) -> Result<Reply, Refusal> {
        let name = join.name.clone();
        match self.nodes.get_mut(&name) {
            None => {
                if self.nodes.len() >= self.config.nodes_max {
                    return Err(Refusal::TooManyNodes { nodes: self.nodes.len() });
                }
                self.nodes.insert(name.clone(), Node::new(join, now));
                fx.store_node(&name);
            }
            Some(node) => {
                let same = node.incarnation == join.incarnation;
                if !same && node.state == NodeState::Ready {
                    return Err(Refusal::NameHeld(name));
                }
                // Written only if something differs: ten thousand nodes that reconnect cost no write.
                if !same || node.address != join.address || node.inventory != join.inventory {
                    node.incarnation = join.incarnation;
                    node.boot_id = join.boot_id;
                    node.address = join.address;
                    node.inventory = join.inventory;
                    fx.store_node(&name);
                }
            }
        }
        self.grant_lease(now, &name);
        let node = &self.nodes[&name];
        Ok(Reply::Node(Box::new(node.clone())))
    }

    fn hello(
        &mut self,
        now: Millis,
        name: &NodeName,
        incarnation: &Incarnation,
        gangs: &[GangReport],
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let Some(node) = self.nodes.get_mut(name).filter(|node| node.incarnation == *incarnation) else {
            return Err(Refusal::NotJoined(name.clone()));
        };
        if let Some(older) = node.session.take() {
            fx.sends.push((name.clone(), older, ToNode::Close("a newer session was opened".to_owned())));
        }
        self.meta.sessions += 1;
        fx.meta_changed = true;
        let session = Session(self.meta.sessions);
        node.session = Some(session);
        self.grant_lease(now, name);
        self.set_node_state(now, name, NodeState::Ready, fx);
        self.observe_all(now, name, gangs, fx);
        let jobs = &self.nodes[name].reserved.jobs;
        let assignments = jobs.iter().filter_map(|(id, rank)| self.jobs.get(id)?.assignment(*rank)).collect();
        // What the reports just caused is already in the assignments.
        fx.sends.retain(|(node, at, _)| !(node == name && *at == session));
        fx.sends.push((name.clone(), session, ToNode::Welcome(assignments)));
        Ok(Reply::Session(session))
    }

    pub(crate) fn has_session(&self, name: &NodeName, session: Session) -> bool {
        self.nodes.get(name).is_some_and(|node| node.session == Some(session))
    }

    fn renew(&mut self, now: Millis, name: &NodeName, session: Session) {
        if let Some(node) = self.nodes.get_mut(name)
            && node.session == Some(session)
        {
            // The timer that is set looks at this when it fires: a heartbeat costs no timer.
            node.lease_expires = now.plus(self.config.lease);
        }
    }

    fn renew_all(&mut self, now: Millis) {
        for node in self.nodes.values_mut() {
            node.lease_expires = node.lease_expires.max(now.plus(self.config.lease));
        }
    }

    fn grant_lease(&mut self, now: Millis, name: &NodeName) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.lease_expires = now.plus(self.config.lease);
            self.timers.insert((node.lease_expires, Timer::Lease(name.clone())));
        }
    }

    fn set_node_state(&mut self, now: Millis, name: &NodeName, state: NodeState, fx: &mut Effects) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if state != NodeState::Ready {
            node.session = None;
        }
        if node.state != state {
            self.rescan |= state == NodeState::Ready;
            (node.state, node.changed) = (state, now);
            fx.show_node(name);
        }
    }

    /// The node's ranks are gone for good: it said so, or its lease ended.
    fn node_gone(&mut self, now: Millis, name: &NodeName, state: NodeState, fx: &mut Effects) {
        self.set_node_state(now, name, state, fx);
        self.gangs_gone(now, name, state, fx);
        self.timers.insert((now.plus(self.config.node_memory), Timer::ForgetNode(name.clone())));
    }

    fn fire_timers(&mut self, now: Millis, fx: &mut Effects) {
        while let Some((at, _)) = self.timers.first()
            && *at <= now
        {
            let Some((_, timer)) = self.timers.pop_first() else { return };
            match timer {
                Timer::Lease(name) => self.lease_timer(now, &name, fx),
                Timer::ForgetNode(name) => self.forget_node(now, &name, fx),
                Timer::StartTimeout(id, generation) => self.start_timeout(now, &id, generation, fx),
                Timer::Requeue(id) => {
                    if self.jobs.get(&id).is_some_and(|job| job.gang.is_none() && !job.state.is_terminal()) {
                        self.enqueue(&id);
                    }
                }
            }
        }
    }

    fn lease_timer(&mut self, now: Millis, name: &NodeName, fx: &mut Effects) {
        let Some(node) = self.nodes.get(name) else { return };
        match node.state {
            NodeState::Lost | NodeState::Left => {}
            NodeState::Ready | NodeState::Disconnected if node.lease_expires > now => {
                self.timers.insert((node.lease_expires, Timer::Lease(name.clone())));
            }
            NodeState::Ready | NodeState::Disconnected => {
                if let Some(session) = node.session {
                    let why = "the lease ended without a heartbeat".to_owned();
                    fx.sends.push((name.clone(), session, ToNode::Close(why)));
                }
                self.node_gone(now, name, NodeState::Lost, fx);
            }
        }
    }

    fn forget_node(&mut self, now: Millis, name: &NodeName, fx: &mut Effects) {
        let Some(node) = self.nodes.get(name) else { return };
        let gone = matches!(node.state, NodeState::Lost | NodeState::Left);
        if gone && node.reserved.jobs.is_empty() && now.since(node.changed) >= self.config.node_memory {
            self.nodes.remove(name);
            fx.stored_nodes.insert(name.clone());
        }
    }

    pub(crate) fn enqueue(&mut self, id: &JobId) {
        if let Some(job) = self.jobs.get(id) {
            let key = (Reverse(job.spec.priority), job.order, id.clone());
            self.queue.insert(key.clone());
            self.fresh.insert(key);
        }
    }

    pub(crate) fn dequeue(&mut self, id: &JobId) {
        if let Some(job) = self.jobs.get(id) {
            let key = (Reverse(job.spec.priority), job.order, id.clone());
            self.queue.remove(&key);
            self.fresh.remove(&key);
        }
    }

    /// Turns what was touched into writes, and drops the oldest ended jobs beyond the bound.
    fn finish(&mut self, _now: Millis, fx: &mut Effects) {
        while self.ended.len() > self.config.ended_max {
            let Some((_, id)) = self.ended.pop_first() else { break };
            if let Some(job) = self.jobs.remove(&id) {
                self.by_order.remove(&job.order);
                if let Some(request) = job.request_id {
                    self.requests.remove(&request);
                }
            }
            fx.stored_jobs.insert(id.clone());
            fx.events.insert(Event::JobDeleted(id));
        }
        if std::mem::take(&mut fx.meta_changed) {
            fx.writes.push(Write::Meta(self.meta));
        }
        for id in std::mem::take(&mut fx.stored_jobs) {
            fx.writes.push(match self.jobs.get(&id) {
                Some(job) => Write::Job(Box::new(job.clone())),
                None => Write::DeleteJob(id),
            });
        }
        for name in std::mem::take(&mut fx.stored_nodes) {
            fx.writes.push(match self.nodes.get(&name) {
                Some(node) => Write::Node(Box::new(node.clone())),
                None => Write::DeleteNode(name),
            });
        }
    }
}

/// The cluster totals shown by GetCluster need the inventory of every node; callers ask rarely.
impl Core {
    /// Nodes and what is in them, for totals.
    pub fn inventories(&self) -> impl Iterator<Item = (&NodeState, &Inventory, &Reserved)> {
        self.nodes.values().map(|node| (&node.state, &node.inventory, &node.reserved))
    }
}

impl From<&Job> for Reply {
    fn from(job: &Job) -> Self {
        Self::Job(Box::new(job.clone()))
    }
}

/// A mixing function whose outputs differ for different inputs (Steele et al., "Fast splittable
/// pseudorandom number generators", 2014).
fn splitmix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
