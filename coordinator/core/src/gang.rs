//! A gang's life: placed whole, prepared everywhere, launched everywhere, stopped everywhere.
//!
//! A gang only ends once every node has reported its part stopped or is itself gone; only then are its
//! resources free and may a new generation start.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::core::{Core, Timer};
use crate::effects::{Effects, Refusal, ToNode};
use crate::job::{Gang, Job, JobState, Observed, Outcome, PAST_GENERATIONS_MAX, PastGeneration, RootCause};
use crate::node::NodeState;
use crate::schedule::{Candidate, Plan, solve};
use crate::types::{DesiredPhase, GangReport, Generation, JobId, Millis, NodeName, ObservedPhase, RankExit};

/// A generation that ran at least this long before it failed is started again without delay.
const QUICK_FAILURE: Millis = Millis::from_secs(60);
/// Delay before the second restart of a job that crashes at once; doubles with each.
const BACKOFF_FIRST: Millis = Millis(250);

/// What ended a generation.
pub(crate) enum Cause {
    /// A rank ended with something else than success.
    Exit(NodeName, RankExit),
    /// Something else; in words. A new generation may fare better.
    Fault(String),
    /// In words. A new generation would meet the same.
    Permanent(String),
}

impl Core {
    /// Places waiting jobs, in order of priority and submission. A job that does not fit does not hold up
    /// those behind it.
    pub(crate) fn schedule(&mut self, now: Millis, fx: &mut Effects) {
        let fresh = std::mem::take(&mut self.fresh);
        let looked_at: Vec<JobId> = if std::mem::take(&mut self.rescan) {
            self.queue.iter().take(self.config.scan_max).map(|(_, _, id)| id.clone()).collect()
        } else {
            fresh.into_iter().map(|(_, _, id)| id).collect()
        };
        for id in looked_at {
            let Some(job) = self.jobs.get(&id) else { continue };
            match solve(&job.spec, self.nodes.values().map(Candidate::from)) {
                Plan::Place(placements) => self.place(now, &id, Gang::new(placements, now), fx),
                Plan::Wait(reason) => self.explain(&id, reason, fx),
            }
        }
    }

    fn explain(&mut self, id: &JobId, reason: String, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        // The cause of a restart stays visible while the job waits for nodes.
        let reason = match (&job.state, job.reason.split_once("; waiting: ")) {
            (JobState::Restarting, Some((cause, _))) => format!("{cause}; {reason}"),
            (JobState::Restarting, None) => format!("{}; {reason}", job.reason),
            _ => reason,
        };
        if job.reason != reason {
            job.reason = reason;
            fx.show_job(id);
        }
    }

    fn place(&mut self, now: Millis, id: &JobId, gang: Gang, fx: &mut Effects) {
        self.dequeue(id);
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.generation = Generation(job.generation.0 + 1);
        job.state = JobState::Starting;
        job.reason = format!("starting on {} nodes", gang.placements.len());
        for placement in &gang.placements {
            if let Some(node) = self.nodes.get_mut(&placement.node) {
                node.reserve(id, &job.spec, placement);
                fx.show_node(&placement.node);
            }
        }
        job.gang = Some(gang);
        let timeout = Timer::StartTimeout(id.clone(), job.generation);
        self.timers.insert((now.plus(job.spec.start_timeout), timeout));
        fx.store_job(id);
        self.send_assignments(id, fx);
    }

    /// Sends the gang's desired state to each of its nodes that has a session and has not stopped.
    fn send_assignments(&self, id: &JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get(id) else { return };
        let Some(gang) = &job.gang else { return };
        for (placement, seen) in gang.placements.iter().zip(&gang.observed) {
            let session = self.nodes.get(&placement.node).and_then(|node| node.session);
            if let (Some(session), true) = (session, *seen < Observed::Stopped) {
                let assignment = job.assignment_as(placement, gang.desired);
                fx.sends.push((placement.node.clone(), session, ToNode::Assign(Box::new(assignment))));
            }
        }
    }

    /// Everything a node observes, at the start of a session. A gang that was being run there and is not
    /// mentioned is gone: the daemon was started anew and its ranks died with it.
    pub(crate) fn observe_all(
        &mut self,
        now: Millis,
        name: &NodeName,
        reports: &[GangReport],
        fx: &mut Effects,
    ) {
        let mentioned: BTreeMap<_, _> = reports.iter().map(|report| (&report.gang, report)).collect();
        let held = self.nodes.get(name).map(|node| node.reserved.jobs.clone()).unwrap_or_default();
        for (id, group_rank) in held {
            let Some(job) = self.jobs.get(&id) else { continue };
            if let Some(report) = mentioned.get(&job.gang_id()) {
                self.report(now, name, report, fx);
            } else if job.gang.as_ref().is_some_and(|gang| gang.desired > DesiredPhase::Prepared) {
                let why = format!("node {name} came back without its ranks: its daemon was started anew");
                self.part_stopped(now, &id, group_rank, Cause::Fault(why), fx);
            }
        }
    }

    /// A node's part of a gang is gone for good; `cause` ends the generation unless it is ending already.
    fn part_stopped(&mut self, now: Millis, id: &JobId, group_rank: usize, cause: Cause, fx: &mut Effects) {
        if let Some(gang) = self.jobs.get_mut(id).and_then(|job| job.gang.as_mut()) {
            gang.observe(group_rank, Observed::Stopped);
        }
        self.fault(now, id, cause, fx);
        self.conclude(now, id, fx);
    }

    /// A node is lost or has left: so are its parts of every gang.
    pub(crate) fn gangs_gone(&mut self, now: Millis, name: &NodeName, state: NodeState, fx: &mut Effects) {
        let held = self.nodes.get(name).map(|node| node.reserved.jobs.clone()).unwrap_or_default();
        for (id, group_rank) in held {
            let why = match state {
                NodeState::Left => format!("node {name} left: its daemon was stopped"),
                NodeState::Lost | NodeState::Ready | NodeState::Disconnected => {
                    format!("node {name} was lost: no heartbeat within {} ms", self.config.lease.0)
                }
            };
            self.part_stopped(now, &id, group_rank, Cause::Fault(why), fx);
        }
    }

    /// One node's whole observed state of one gang.
    pub(crate) fn report(&mut self, now: Millis, name: &NodeName, report: &GangReport, fx: &mut Effects) {
        let id = &report.gang.job;
        let Some(group_rank) = self.nodes.get(name).and_then(|node| node.reserved.jobs.get(id).copied())
        else {
            return;
        };
        let Some(job) = self.jobs.get_mut(id).filter(|job| job.generation == report.gang.generation) else {
            return;
        };
        let Some(gang) = job.gang.as_mut() else { return };
        let placement = gang.placements[group_rank].clone();
        let (seen, done) = match report.phase {
            ObservedPhase::Prepared => (Observed::Prepared, false),
            ObservedPhase::Running => (Observed::Running, false),
            ObservedPhase::Stopped => {
                let all = report.exits.len() == placement.procs as usize;
                (Observed::Stopped, all && report.exits.iter().all(RankExit::is_success))
            }
        };
        let preparing = gang.desired == DesiredPhase::Prepared;
        if !gang.observe(group_rank, seen) && report.exits.is_empty() && report.error.is_none() {
            return;
        }
        if group_rank == 0 && gang.master_port.is_none() {
            gang.master_port = report.master_port;
        }
        let exit = report.exits.iter().find(|exit| placement.holds(exit.rank) && !exit.is_success());
        let cause = match (&report.error, exit) {
            (Some(error), _) if preparing => Some(Cause::Permanent(format!("node {name}: {error}"))),
            (Some(error), _) => Some(Cause::Fault(format!("node {name}: {error}"))),
            (None, Some(exit)) => Some(Cause::Exit(name.clone(), exit.clone())),
            (None, None) if seen == Observed::Stopped && !done => {
                Some(Cause::Fault(format!("node {name} stopped its ranks")))
            }
            (None, None) => None,
        };
        match cause {
            Some(cause) => self.fault(now, &report.gang.job, cause, fx),
            None => self.advance(now, &report.gang.job, fx),
        }
        self.conclude(now, &report.gang.job, fx);
    }

    /// Launches once every node is prepared; the job runs once every node has launched.
    fn advance(&mut self, now: Millis, id: &JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        if gang.desired == DesiredPhase::Prepared && gang.all_prepared() && gang.master_port.is_some() {
            gang.desired = DesiredPhase::Running;
            fx.store_job(id);
            self.send_assignments(id, fx);
        } else if gang.desired == DesiredPhase::Running
            && gang.all_running()
            && job.state == JobState::Starting
        {
            job.state = JobState::Running;
            job.reason = format!("running {} ranks on {} nodes", job.world_size(), job.placements().len());
            job.started = job.started.or(Some(now));
            fx.store_job(id);
        }
    }

    /// Begins to end the current generation. The first cause counts; later ones are its consequences.
    pub(crate) fn fault(&mut self, now: Millis, id: &JobId, cause: Cause, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let generation = job.generation;
        let Some(gang) = job.gang.as_mut().filter(|gang| gang.outcome.is_none()) else { return };
        let permanent = matches!(cause, Cause::Permanent(_));
        let (why, exit) = match cause {
            Cause::Exit(node, exit) => {
                (describe_exit(&node, &exit), Some(RootCause { generation, node, exit }))
            }
            Cause::Fault(why) | Cause::Permanent(why) => (why, None),
        };
        let left = job.spec.max_restarts.saturating_sub(job.restarts_used);
        let restart = left > 0 && !permanent;
        gang.outcome = Some(if restart { Outcome::Restart } else { Outcome::Fail });
        gang.desired = DesiredPhase::Stopped;
        job.state = if restart { JobState::Restarting } else { JobState::Stopping };
        job.reason = match (restart, job.restarts_used) {
            (true, used) => format!("{why}; restart {} of {}", used + 1, job.spec.max_restarts),
            (false, 0) => why,
            (false, used) => format!("{why}; after {used} restarts"),
        };
        job.exit = exit;
        let ran = now.since(gang.placed);
        job.not_before = now.plus(if ran >= QUICK_FAILURE || job.restarts_used == 0 {
            Millis(0)
        } else {
            let doublings = (job.restarts_used - 1).min(16);
            Millis(BACKOFF_FIRST.0 << doublings).min(self.config.backoff_max)
        });
        fx.store_job(id);
        self.send_assignments(id, fx);
    }

    /// A user stops a job.
    pub(crate) fn cancel(
        &mut self,
        now: Millis,
        id: &str,
        reason: &str,
        fx: &mut Effects,
    ) -> Result<&Job, Refusal> {
        let id = self.job(id)?.id.clone();
        self.dequeue(&id);
        let Some(job) = self.jobs.get_mut(&id) else { return Err(Refusal::NoJob(id.to_string())) };
        if !job.state.is_terminal() {
            let why = if reason.is_empty() { "cancelled".to_owned() } else { format!("cancelled: {reason}") };
            job.reason = why;
            match job.gang.as_mut() {
                Some(gang) if gang.outcome != Some(Outcome::Cancel) => {
                    gang.outcome = Some(Outcome::Cancel);
                    gang.desired = DesiredPhase::Stopped;
                    job.state = JobState::Stopping;
                    fx.store_job(&id);
                    self.send_assignments(&id, fx);
                    self.conclude(now, &id, fx);
                }
                Some(_) => fx.store_job(&id),
                None => self.end(now, &id, JobState::Cancelled, fx),
            }
        }
        Ok(&self.jobs[&id])
    }

    pub(crate) fn start_timeout(
        &mut self,
        now: Millis,
        id: &JobId,
        generation: Generation,
        fx: &mut Effects,
    ) {
        let Some(job) = self.jobs.get(id).filter(|job| job.generation == generation) else { return };
        if job.state != JobState::Starting {
            return;
        }
        let Some(gang) = &job.gang else { return };
        let late: Vec<&str> = (gang.placements.iter().zip(&gang.observed))
            .filter(|(_, seen)| **seen < Observed::Running)
            .map(|(placement, _)| placement.node.as_str())
            .collect();
        let (count, first) = (late.len(), late.first().copied().unwrap_or("no node"));
        let secs = job.spec.start_timeout.0 / 1000;
        let why =
            format!("not every rank was launched within {secs} s: {first} (of {count} nodes) is not ready");
        self.fault(now, id, Cause::Fault(why), fx);
    }

    /// Ends the generation once every node's part has stopped.
    fn conclude(&mut self, now: Millis, id: &JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(gang) = job.gang.take_if(|gang| gang.all_stopped()) else { return };
        for placement in &gang.placements {
            let Some(node) = self.nodes.get_mut(&placement.node) else { continue };
            node.release(id, &job.spec, placement);
            fx.show_node(&placement.node);
            if let Some(session) = node.session {
                let forget = job.assignment_as(placement, DesiredPhase::Forgotten);
                fx.sends.push((placement.node.clone(), session, ToNode::Assign(Box::new(forget))));
            }
        }
        if job.past.len() >= PAST_GENERATIONS_MAX {
            job.past.remove(0);
        }
        job.past.push(PastGeneration { generation: job.generation, placements: gang.placements });
        self.rescan = true;
        match gang.outcome {
            None => {
                "every rank ended with exit code 0".clone_into(&mut job.reason);
                job.exit = None;
                job.started = job.started.or(Some(now));
                self.end(now, id, JobState::Succeeded, fx);
            }
            Some(Outcome::Fail) => self.end(now, id, JobState::Failed, fx),
            Some(Outcome::Cancel) => self.end(now, id, JobState::Cancelled, fx),
            Some(Outcome::Restart) => {
                job.restarts_used += 1;
                let at = job.not_before;
                fx.store_job(id);
                if at <= now {
                    self.enqueue(id);
                } else {
                    self.timers.insert((at, Timer::Requeue(id.clone())));
                }
            }
        }
    }

    fn end(&mut self, now: Millis, id: &JobId, state: JobState, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.state = state;
        job.finished = Some(now);
        self.ended.insert((now, id.clone()));
        fx.store_job(id);
    }

    /// Checks what must hold between any two steps; for tests and simulation. Returns what is violated.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut owners: BTreeMap<(&NodeName, u32), &JobId> = BTreeMap::new();
        for (id, job) in &self.jobs {
            let queued = self.queue.contains(&(Reverse(job.spec.priority), job.order, id.clone()));
            if job.state.is_terminal() && (job.gang.is_some() || queued || job.finished.is_none()) {
                return Err(format!("{id} has ended but still holds a gang or a place in the queue"));
            }
            let Some(gang) = &job.gang else { continue };
            let mut next = 0;
            for (index, placement) in gang.placements.iter().enumerate() {
                if placement.first_rank.0 != next || placement.group_rank as usize != index {
                    return Err(format!("{id}: ranks are not contiguous at node {}", placement.node));
                }
                next += placement.procs;
                for gpu in &placement.gpus {
                    if let Some(other) = owners.insert((&placement.node, *gpu), id) {
                        return Err(format!("{} GPU {gpu} is owned by {other} and {id}", placement.node));
                    }
                }
            }
            let nodes = gang.placements.len() as u32;
            if !(job.spec.min_nodes..=job.spec.max_nodes).contains(&nodes) {
                return Err(format!("{id} runs on {nodes} nodes"));
            }
        }
        Ok(())
    }
}

/// How a rank ended, in words.
fn describe_exit(node: &NodeName, exit: &RankExit) -> String {
    let how = match (exit.code, exit.signal) {
        (_, Some(signal)) => format!("was ended by signal {signal}{}", signal_name(signal)),
        (Some(code), None) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    };
    let last = exit.stderr_tail.lines().rev().find(|line| !line.trim().is_empty());
    let last = last.map(|line| format!(": {}", line.chars().take(200).collect::<String>()));
    format!("rank {} on node {node} {how}{}", exit.rank, last.unwrap_or_default())
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => " (SIGHUP)",
        2 => " (SIGINT)",
        3 => " (SIGQUIT)",
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        13 => " (SIGPIPE)",
        15 => " (SIGTERM)",
        _ => "",
    }
}
