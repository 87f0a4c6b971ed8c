//! How many jobs and nodes there are of each kind, and how long jobs waited: kept from what changes, one step a change.

use std::collections::{BTreeSet, HashMap};

use muster_core::health::Verdict;
use muster_core::types::{Generation, JobId, Millis, NodeName};
use muster_core::{Core, Job, JobState, Node, NodeState};

use super::Monitor;

/// What was counted of each job and node, so that it can be taken back.
#[derive(Debug)]
pub(crate) struct Tally {
    monitor: Monitor,
    jobs: HashMap<JobId, Seen>,
    nodes: HashMap<NodeName, Share>,
    /// Jobs that wait for their first nodes, by when they were submitted.
    waiting: BTreeSet<(Millis, JobId)>,
}

/// What was seen of a job.
#[derive(Clone, Copy, Debug)]
struct Seen {
    state: JobState,
    generation: Generation,
    restarts: u32,
    started: bool,
}

/// What a node adds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    state: NodeState,
    verdict: Option<Verdict>,
    cordoned: bool,
    draining: bool,
    /// Held, free and faulty, as [`GPUS`] names them.
    gpus: [usize; 3],
}

const GPUS: [&str; 3] = ["held", "free", "faulty"];
const VERDICTS: [Verdict; 3] = [Verdict::Healthy, Verdict::Degraded, Verdict::Quarantined];
const NODE_STATES: [NodeState; 4] =
    [NodeState::Ready, NodeState::Disconnected, NodeState::Lost, NodeState::Left];
const JOB_STATES: [JobState; 8] = [
    JobState::Queued,
    JobState::Starting,
    JobState::Running,
    JobState::Restarting,
    JobState::Stopping,
    JobState::Succeeded,
    JobState::Failed,
    JobState::Cancelled,
];

fn job_state(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Restarting => "restarting",
        JobState::Stopping => "stopping",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

fn node_state(state: NodeState) -> &'static str {
    match state {
        NodeState::Ready => "ready",
        NodeState::Disconnected => "disconnected",
        NodeState::Lost => "lost",
        NodeState::Left => "left",
    }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Healthy => "healthy",
        Verdict::Degraded => "degraded",
        Verdict::Quarantined => "quarantined",
    }
}

/// Nothing is known: this coordinator does not lead. Every series is there, so that none is missed when it is.
pub(super) fn clear(monitor: &Monitor) {
    for state in JOB_STATES {
        monitor.jobs.with_label_values(&[job_state(state)]).set(0);
        if state.is_terminal() {
            monitor.jobs_ended.with_label_values(&[job_state(state)]);
        }
    }
    for state in NODE_STATES {
        monitor.nodes.with_label_values(&[node_state(state)]).set(0);
    }
    for of in VERDICTS {
        monitor.verdicts.with_label_values(&[verdict(of)]).set(0);
    }
    for state in GPUS {
        monitor.gpus.with_label_values(&[state]).set(0);
    }
    for gauge in [&monitor.nodes_cordoned, &monitor.nodes_draining, &monitor.queue_oldest] {
        gauge.set(0);
    }
}

impl Tally {
    /// Counts what was loaded.
    pub fn new(monitor: Monitor, core: &Core) -> Self {
        clear(&monitor);
        let mut tally =
            Self { monitor, jobs: HashMap::new(), nodes: HashMap::new(), waiting: BTreeSet::new() };
        for job in core.jobs_before(u64::MAX) {
            // What happened to it was counted when it did.
            tally.see(job);
        }
        for node in core.nodes_after(None) {
            tally.node(node);
        }
        tally
    }

    /// The time of leading is over.
    pub fn clear(&mut self) {
        clear(&self.monitor);
        self.jobs.clear();
        self.nodes.clear();
        self.waiting.clear();
    }

    pub fn job(&mut self, job: &Job) {
        let monitor = self.monitor.clone();
        let before = self.see(job);
        if before.is_none() {
            monitor.jobs_submitted.inc();
        }
        let before = before.unwrap_or(Seen {
            state: JobState::Queued,
            generation: Generation(0),
            restarts: 0,
            started: false,
        });
        if let Some(gang) = job.gang.as_ref().filter(|_| job.generation > before.generation) {
            monitor.placements.inc();
            if before.generation == Generation(0) {
                monitor.queue_wait.observe(seconds(gang.placed.since(job.created)));
            }
        }
        // One that is short has ended before anybody looks.
        let placed = job.gang.as_ref().map(|gang| gang.placed).or(job.past.last().map(|past| past.placed));
        if let (Some(started), Some(placed), false) = (job.started, placed, before.started) {
            monitor.job_start.observe(seconds(started.since(placed)));
        }
        monitor.job_restarts.inc_by(u64::from(job.restarts_used.saturating_sub(before.restarts)));
        if job.state.is_terminal() && !before.state.is_terminal() {
            monitor.jobs_ended.with_label_values(&[job_state(job.state)]).inc();
        }
    }

    pub fn job_deleted(&mut self, id: &JobId) {
        if let Some(seen) = self.jobs.remove(id) {
            self.monitor.jobs.with_label_values(&[job_state(seen.state)]).dec();
        }
    }

    pub fn node(&mut self, node: &Node) {
        let share = Share::of(node);
        let before = self.nodes.insert(node.name.clone(), share);
        if before == Some(share) {
            return;
        }
        if share.state == NodeState::Lost && before.is_some_and(|before| before.state != NodeState::Lost) {
            self.monitor.nodes_lost.inc();
        }
        if let Some(before) = before {
            self.add(before, -1);
        }
        self.add(share, 1);
    }

    pub fn node_forgotten(&mut self, name: &NodeName) {
        if let Some(share) = self.nodes.remove(name) {
            self.add(share, -1);
        }
    }

    /// Counts the job as it is now, and gives what it was.
    fn see(&mut self, job: &Job) -> Option<Seen> {
        let (state, started) = (job.state, job.started.is_some());
        let seen = Seen { state, generation: job.generation, restarts: job.restarts_used, started };
        let before = self.jobs.insert(job.id.clone(), seen);
        if let Some(before) = before {
            self.monitor.jobs.with_label_values(&[job_state(before.state)]).dec();
        }
        self.monitor.jobs.with_label_values(&[job_state(state)]).inc();
        let entry = (job.created, job.id.clone());
        let changed = match state {
            JobState::Queued => self.waiting.insert(entry),
            _ => self.waiting.remove(&entry),
        };
        if changed {
            let oldest = self.waiting.first().map_or(0, |(created, _)| created.0 / 1000);
            self.monitor.queue_oldest.set(oldest as i64);
        }
        before
    }

    fn add(&self, share: Share, sign: i64) {
        let monitor = &self.monitor;
        monitor.nodes.with_label_values(&[node_state(share.state)]).add(sign);
        monitor.nodes_cordoned.add(sign * i64::from(share.cordoned));
        monitor.nodes_draining.add(sign * i64::from(share.draining));
        if let Some(of) = share.verdict {
            monitor.verdicts.with_label_values(&[verdict(of)]).add(sign);
        }
        for (state, count) in GPUS.iter().zip(share.gpus) {
            monitor.gpus.with_label_values(&[state]).add(sign * count as i64);
        }
    }
}

impl Share {
    fn of(node: &Node) -> Self {
        let ready = node.state == NodeState::Ready;
        let (held, free) = (node.reserved.gpus.len(), node.free_gpus().count());
        let faulty = node.inventory.gpus.len().saturating_sub(held + free);
        Self {
            state: node.state,
            verdict: ready.then(|| node.health.verdict()),
            cordoned: node.cordon.is_some(),
            draining: node.drain.is_some(),
            gpus: if ready { [held, free, faulty] } else { [0; 3] },
        }
    }
}

fn seconds(span: Millis) -> f64 {
    span.0 as f64 / 1000.0
}
