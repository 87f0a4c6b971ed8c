//! The state and its one entry point, [`Core::step`]. Requests are handled in `requests.rs`, nodes in
//! `lease.rs`, waiting jobs in `waiting.rs`, gangs in `gang.rs`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::access::{Barred, Token};
use crate::bugs::{Bug, planted};
use crate::effects::{Effects, Event, Reply, Write};
use crate::gang::Cancel;
use crate::health::Fleet;
use crate::input::{Heard, Input};
use crate::job::{Job, Observed};
use crate::lease::Hello;
use crate::node::{Drain, Node, NodeState, Reserved};
use crate::quota::{Backlog, QueueMax};
use crate::types::{Generation, JobId, Millis, NodeName, Owner, RequestId, TokenName};
use crate::waiting::Room;

/// Settings and bounds of the core.
#[derive(Clone, Debug)]
pub struct Config {
    /// Time without a heartbeat after which a node is lost.
    pub lease: Millis,
    /// Most that waits.
    pub queue_max: QueueMax,
    /// Highest priority that a job has unless an operator submits it: people ask for more than the others until all do.
    pub priority_max: i32,
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
    /// Time from the return of a node until elastic jobs are started again with it: nodes often return together.
    pub grow_delay: Millis,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lease: Millis::from_secs(10),
            queue_max: QueueMax::default(),
            priority_max: 100,
            ended_max: 10_000,
            nodes_max: 100_000,
            node_memory: Millis::from_secs(24 * 3600),
            scan_max: 256,
            backoff_max: Millis::from_secs(30),
            grow_delay: Millis(500),
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
    /// All tokens.
    pub tokens: Vec<Token>,
    /// All nodes that were shut out.
    pub barred: Vec<Barred>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    Lease(NodeName),
    /// A node may be fit for work again.
    Recover(NodeName),
    ForgetNode(NodeName),
    StartTimeout(JobId, Generation),
    Requeue(JobId),
    Grow(JobId, Generation),
    Pass,
}

/// A submission: an id of a request is its owner's.
pub(crate) type RequestKey = (Option<Owner>, RequestId);

pub(crate) type QueueKey = (Reverse<i32>, u64, JobId);

/// The state machine. See the crate's documentation for the contract.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: Config,
    pub(crate) meta: Meta,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) requests: BTreeMap<RequestKey, JobId>,
    pub(crate) queue: BTreeSet<QueueKey>,
    /// How much waits.
    pub(crate) backlog: Backlog,
    pub(crate) by_order: BTreeMap<u64, JobId>,
    pub(crate) ended: BTreeSet<(Millis, JobId)>,
    pub(crate) nodes: BTreeMap<NodeName, Node>,
    pub(crate) timers: BTreeSet<(Millis, Timer)>,
    pub(crate) room: Room,
    /// What nodes of a kind have in common.
    pub(crate) fleet: Fleet,
    /// Jobs that have just come into the queue: only they need a look.
    pub(crate) fresh: BTreeSet<QueueKey>,
    /// Elastic jobs that run on fewer nodes than they may, and that no timer will look at.
    pub(crate) growable: BTreeSet<JobId>,
    pub(crate) tokens: BTreeMap<TokenName, Token>,
    pub(crate) barred: BTreeMap<NodeName, Millis>,
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
            backlog: Backlog::default(),
            by_order: BTreeMap::new(),
            ended: BTreeSet::new(),
            nodes: BTreeMap::new(),
            timers: BTreeSet::new(),
            room: Room::default(),
            fleet: Fleet::default(),
            fresh: BTreeSet::new(),
            growable: BTreeSet::new(),
            tokens: snapshot.tokens.into_iter().map(|token| (token.name.clone(), token)).collect(),
            barred: snapshot.barred.into_iter().map(|barred| (barred.node, barred.at)).collect(),
        };
        for mut node in snapshot.nodes {
            (node.state, node.session) = (NodeState::Disconnected, None);
            node.reserved = Reserved::default();
            node.set_inventory(node.inventory.clone());
            core.fleet.add(&node.inventory);
            node.lease_expires = now.plus(core.config.lease);
            core.timers.insert((node.lease_expires, Timer::Lease(node.name.clone())));
            core.nodes.insert(node.name.clone(), node);
        }
        for job in snapshot.jobs {
            core.load_job(now, job);
        }
        core.room.appear();
        let mut fx = Effects { meta_changed: snapshot.meta.is_none(), ..Effects::default() };
        core.finish(&mut fx);
        (core, fx)
    }

    fn load_job(&mut self, now: Millis, mut job: Job) {
        let id = job.id.clone();
        // Somebody may have set the clock back while no coordinator ran: no wait becomes longer by that.
        if !planted(Bug::WaitsByWallClock) {
            job.not_before = job.not_before.min(now.plus(self.config.backoff_max));
        }
        if let Some(request) = job.request_id.as_ref().filter(|_| !planted(Bug::RequestsForgotten)) {
            self.requests.insert((job.owner.clone(), request.clone()), id.clone());
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
                gang.observe(group_rank, Observed::Stopped);
            }
            let deadline = now.plus(job.spec.start_timeout);
            self.timers.insert((deadline, Timer::StartTimeout(id.clone(), job.generation)));
            if planted(Bug::RestartStopsGangs) {
                gang.desired = crate::types::DesiredPhase::Stopped;
            }
        } else if job.state.is_terminal() {
            self.ended.insert((job.finished.unwrap_or_default(), id.clone()));
        } else if job.not_before <= now {
            // No node can take it yet, and it knows why it has waited: it is no news, and waits for the next pass.
            self.queue.insert(queue_key(&job));
        } else {
            self.timers.insert((job.not_before, Timer::Requeue(id.clone())));
        }
        self.backlog.note(&job);
        self.jobs.insert(id.clone(), job);
        self.note_growable(&id);
    }

    /// Takes one input. Never panics on any input; a request that is refused changes nothing.
    pub fn step(&mut self, now: Millis, input: Input) -> Effects {
        let mut fx = Effects::default();
        match input {
            Input::Submit { by, request_id, spec } => {
                fx.reply = Some(self.submit(now, by, request_id, *spec, &mut fx).map(Reply::from));
            }
            Input::Cancel { by, job, reason, signal } => {
                let cancel = Cancel { by, reason, signal };
                fx.reply = Some(self.cancel(now, &job, cancel, &mut fx).map(Reply::from));
            }
            Input::SetCordon { by, node, cordon } => {
                fx.reply = Some(self.set_cordon(now, by, &node, cordon, &mut fx));
            }
            Input::Drain { by, node, reason, timeout } => {
                let drain = Drain { reason, by, deadline: timeout.map(|span| now.plus(span)) };
                fx.reply = Some(self.drain(now, &node, drain, &mut fx));
            }
            Input::CreateToken(token) => fx.reply = Some(self.create_token(now, *token, &mut fx)),
            Input::RevokeToken { name } => fx.reply = Some(self.revoke_token(&name, &mut fx)),
            Input::SpendToken { name, hash } => {
                fx.reply = Some(self.spend_token(now, &name, &hash, &mut fx));
            }
            Input::BarNode(node) => fx.reply = Some(self.bar_node(now, node, &mut fx)),
            Input::Join(join) => fx.reply = Some(self.join(now, *join, &mut fx)),
            Input::Hello { node, incarnation, gangs, leaving, number } => {
                let hello = Hello { incarnation, gangs, leaving, number };
                fx.reply = Some(self.hello(now, &node, hello, &mut fx));
            }
            Input::Leaving { node, session, reason } => {
                if self.has_session(&node, session) {
                    self.leaving(now, &node, reason, &mut fx);
                }
            }
            Input::Heartbeats(heard) => {
                for Heard { node, session, at } in heard {
                    self.renew(at, &node, session);
                }
            }
            Input::Report { node, session, report } => {
                if self.has_session(&node, session) {
                    self.report(now, &node, &report, &mut fx);
                }
            }
            Input::Health { node, session, findings, inventory } => {
                self.health(now, &node, session, (findings, inventory), &mut fx);
            }
            Input::Disconnected { node, session } => {
                if self.has_session(&node, session) {
                    self.set_node_state(now, &node, NodeState::Disconnected, &mut fx);
                    if planted(Bug::DisconnectedIsGone) {
                        self.node_gone(now, &node, NodeState::Lost, &mut fx);
                    }
                }
            }
            Input::Goodbye { node, session } => {
                if self.has_session(&node, session) {
                    self.node_gone(now, &node, NodeState::Left, &mut fx);
                }
            }
            Input::Stalled => {
                self.renew_all(now);
                self.put_off_starts(now);
            }
            Input::Tick => {}
        }
        self.fire_timers(now, &mut fx);
        self.schedule(now, &mut fx);
        self.finish(&mut fx);
        fx
    }

    /// When `Tick` is due next, unless something else comes first.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Returns the nodes of which the next step at `now` looks whether their leases have ended.
    pub(crate) fn leases_due(&self, now: Millis) -> impl Iterator<Item = &NodeName> {
        self.timers.iter().take_while(move |(at, _)| *at <= now).filter_map(|(_, timer)| match timer {
            Timer::Lease(name) => Some(name),
            _ => None,
        })
    }

    fn fire_timers(&mut self, now: Millis, fx: &mut Effects) {
        while let Some((at, _)) = self.timers.first()
            && *at <= now
        {
            let Some((_, timer)) = self.timers.pop_first() else { return };
            match timer {
                Timer::Lease(name) => self.lease_timer(now, &name, fx),
                Timer::Recover(name) => self.judge(now, &name, fx),
                Timer::ForgetNode(name) => self.forget_node(now, &name, fx),
                Timer::StartTimeout(id, generation) => self.start_timeout(now, &id, generation, fx),
                // The pass comes after all timers.
                Timer::Pass => {}
                Timer::Grow(id, generation) => self.grow(now, &id, generation, fx),
                Timer::Requeue(id) => {
                    if self.jobs.get(&id).is_some_and(|job| job.gang.is_none() && !job.state.is_terminal()) {
                        self.enqueue(&id);
                    }
                }
            }
        }
    }

    pub(crate) fn enqueue(&mut self, id: &JobId) {
        if let Some(job) = self.jobs.get(id) {
            let key = queue_key(job);
            self.queue.insert(key.clone());
            self.fresh.insert(key);
        }
    }

    pub(crate) fn dequeue(&mut self, id: &JobId) {
        if let Some(job) = self.jobs.get(id) {
            let key = queue_key(job);
            self.queue.remove(&key);
            self.fresh.remove(&key);
        }
    }

    /// Turns what was touched into writes, and drops the oldest ended jobs beyond the bound.
    fn finish(&mut self, fx: &mut Effects) {
        while self.ended.len() > self.config.ended_max {
            let Some((_, id)) = self.ended.pop_first() else { break };
            if let Some(job) = self.jobs.remove(&id) {
                self.by_order.remove(&job.order);
                if let Some(request) = job.request_id {
                    self.requests.remove(&(job.owner, request));
                }
            }
            fx.stored_jobs.insert(id.clone());
            fx.events.insert(Event::JobDeleted(id));
        }
        if std::mem::take(&mut fx.meta_changed) {
            fx.writes.push(Write::Meta(self.meta));
        }
        for id in std::mem::take(&mut fx.stored_jobs) {
            // Whatever begins or ceases to wait is stored.
            match self.jobs.get(&id) {
                Some(job) if planted(Bug::PlacedJobsWait) && job.gang.is_some() => {}
                Some(job) => self.backlog.note(job),
                None => self.backlog.forget(&id),
            }
            fx.writes.push(match self.jobs.get(&id) {
                Some(job) => Write::Job(Box::new(job.clone())),
                None => Write::DeleteJob(id),
            });
        }
        for name in std::mem::take(&mut fx.stored_tokens) {
            fx.writes.push(match self.tokens.get(&name) {
                Some(token) => Write::Token(Box::new(token.clone())),
                None => Write::DeleteToken(name),
            });
        }
        for node in std::mem::take(&mut fx.stored_barred) {
            fx.writes.push(match self.barred.get(&node) {
                Some(at) => Write::Barred(Barred { node, at: *at }),
                None => Write::DeleteBarred(node),
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

fn queue_key(job: &Job) -> QueueKey {
    (Reverse(job.spec.priority), job.order, job.id.clone())
}

impl From<&Job> for Reply {
    fn from(job: &Job) -> Self {
        Self::Job(Box::new(job.clone()))
    }
}
