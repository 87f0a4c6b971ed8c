//! A gang's life: placed whole, prepared everywhere, launched everywhere, stopped everywhere.
//!
//! A gang only ends once every node has reported its part stopped or is itself gone; only then are its
//! resources free and may a new generation start. What ends it is in `fault.rs`.

use std::collections::BTreeMap;

use crate::bugs::{Bug, planted};
use crate::core::{Core, Timer};
use crate::effects::{Effects, Refusal, ToNode};
use crate::fault::Cause;
use crate::job::{Gang, Job, JobState, Observed, Outcome, PAST_GENERATIONS_MAX, PastGeneration};
use crate::node::NodeState;
use crate::owners::{Caller, by};
use crate::types::{
    DesiredPhase, GangId, GangReport, Generation, JobId, Millis, NodeName, ObservedPhase, RankExit,
    RankProgress, StopSignal,
};

/// A user's wish that a job ends.
pub(crate) struct Cancel {
    pub by: Caller,
    pub reason: String,
    pub signal: Option<StopSignal>,
}

/// So many of them, in words.
pub(crate) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl Core {
    pub(crate) fn start(&mut self, now: Millis, id: &JobId, gang: Gang, fx: &mut Effects) {
        self.dequeue(id);
        let Some(job) = self.jobs.get_mut(id) else { return };
        if !planted(Bug::GenerationReused) || job.generation == Generation(0) {
            job.generation = Generation(job.generation.0 + 1);
        }
        job.state = JobState::Starting;
        job.reason = format!("starting on {}", counted(gang.placements.len(), "node"));
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
    pub(crate) fn send_assignments(&self, id: &JobId, fx: &mut Effects) {
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
            } else if let Some(gang) = job.gang.as_ref().filter(|gang| gang.desired > DesiredPhase::Prepared)
            {
                let why = format!("node {name} came back without its ranks: it was started anew");
                // What was never launched there was interrupted, and did not fail.
                let launched = gang.observed[group_rank] >= Observed::Running;
                let cause = if launched { Cause::Fault(why) } else { Cause::Move(why) };
                self.part_stopped(now, &id, group_rank, cause, fx);
            }
        }
    }

    /// A node's part of a gang is gone for good; `cause` ends the generation unless it is ending already.
    pub(crate) fn part_stopped(
        &mut self,
        now: Millis,
        id: &JobId,
        group_rank: usize,
        cause: Cause,
        fx: &mut Effects,
    ) {
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
            let cause = match state {
                // Whoever stopped the daemon meant to; that is no fault of the job.
                NodeState::Left => Cause::Move(format!("node {name} left: its daemon was stopped")),
                NodeState::Lost | NodeState::Ready | NodeState::Disconnected => Cause::Fault(format!(
                    "node {name} was lost: no heartbeat within {} ms",
                    self.config.lease.0
                )),
            };
            self.part_stopped(now, &id, group_rank, cause, fx);
        }
    }

    /// One node's whole observed state of one gang.
    pub(crate) fn report(&mut self, now: Millis, name: &NodeName, report: &GangReport, fx: &mut Effects) {
        let id = &report.gang.job;
        let current = |generation| generation == report.gang.generation || planted(Bug::OldReportsCount);
        let held = self.nodes.get(name).and_then(|node| node.reserved.jobs.get(id).copied());
        let held = held.or_else(|| planted(Bug::StrangersCount).then_some(0));
        let Some(group_rank) = held.filter(|_| self.jobs.get(id).is_some_and(|job| current(job.generation)))
        else {
            // A late report of what the node held is usual.
            fx.stranger = !self.held(name, &report.gang);
            return self.report_of_leftover(now, name, report, fx);
        };
        self.report_of_leftover(now, name, report, fx);
        let Some(gang) = self.jobs.get_mut(id).and_then(|job| job.gang.as_mut()) else { return };
        let placement = gang.placements[group_rank].clone();
        // What it says of other nodes' ranks counts for nothing.
        let exits: Vec<&RankExit> = report.exits.iter().filter(|exit| placement.holds(exit.rank)).collect();
        let quiet: Vec<RankProgress> =
            report.quiet.iter().filter(|progress| placement.holds(progress.rank)).cloned().collect();
        fx.stranger = exits.len() < report.exits.len() || quiet.len() < report.quiet.len();
        let (seen, done) = match report.phase {
            ObservedPhase::Prepared => (Observed::Prepared, false),
            ObservedPhase::Running => (Observed::Running, false),
            ObservedPhase::Killed => (Observed::Killed, false),
            ObservedPhase::Stopped => {
                let all = exits.len() == placement.procs as usize;
                (Observed::Stopped, all && exits.iter().all(|exit| exit.is_success()))
            }
        };
        let preparing = gang.desired == DesiredPhase::Prepared;
        let quiet_before = gang.quiet.len();
        gang.set_quiet(group_rank, &quiet);
        let mut detailed = false;
        if !report.processes.is_empty() {
            let before = gang.processes.insert(group_rank, report.processes.clone());
            detailed |= before.as_ref() != Some(&report.processes);
        }
        if let Some(surroundings) = &report.surroundings {
            let before = gang.surroundings.insert(group_rank, surroundings.clone());
            detailed |= before.as_ref() != Some(surroundings);
        }
        if group_rank == 0 {
            detailed |= gang.rendezvous != report.rendezvous;
            gang.rendezvous.clone_from(&report.rendezvous);
        }
        if detailed {
            fx.show_job_detail(id);
        }
        let told = !exits.is_empty() || report.error.is_some() || gang.quiet.len() > quiet_before;
        if !gang.observe(group_rank, seen) && !told {
            return;
        }
        if group_rank == 0 && gang.master_port.is_none() {
            gang.master_port = report.master_port;
        }
        let exit = exits.into_iter().find(|exit| !exit.is_success());
        let cause = match (&report.error, exit) {
            (Some(error), _) => {
                Some(Cause::Node { name: name.clone(), error: error.clone(), is_permanent: preparing })
            }
            (None, Some(exit)) => Some(Cause::Exit(name.clone(), exit.clone())),
            (None, None) if seen >= Observed::Killed && !done => {
                Some(Cause::Fault(format!("node {name} stopped its ranks")))
            }
            (None, None) => None,
        };
        if let Some(cause) = cause {
            self.fault(now, &report.gang.job, cause, fx);
        } else {
            self.advance(now, &report.gang.job, fx);
            self.check_progress(now, &report.gang.job, fx);
        }
        self.conclude(now, &report.gang.job, fx);
    }

    /// Whether the node held the gang.
    fn held(&self, name: &NodeName, gang: &GangId) -> bool {
        let leftover = self.nodes.get(name).is_some_and(|node| node.reserved.leftovers.contains_key(gang));
        let job = self.jobs.get(&gang.job);
        leftover || job.is_some_and(|job| job.part_of(name, gang.generation).is_some())
    }

    /// Launches once every node is prepared; the job runs once every node has launched.
    fn advance(&mut self, now: Millis, id: &JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(gang) = job.gang.as_mut() else { return };
        let prepared = gang.all_prepared() || planted(Bug::LaunchBeforeAllPrepared);
        if gang.desired == DesiredPhase::Prepared && prepared && gang.master_port.is_some() {
            gang.desired = DesiredPhase::Running;
            fx.store_job(id);
            self.send_assignments(id, fx);
        } else if gang.desired == DesiredPhase::Running
            && gang.all_running()
            && job.state == JobState::Starting
        {
            job.state = JobState::Running;
            job.reason = {
                let (ranks, nodes) = (job.world_size() as usize, job.placements().len());
                format!("running {} on {}", counted(ranks, "rank"), counted(nodes, "node"))
            };
            job.begin(now);
            self.look_for_growth(now, id);
            fx.store_job(id);
        }
    }

    /// A user stops a job.
    pub(crate) fn cancel(
        &mut self,
        now: Millis,
        id: &str,
        cancel: Cancel,
        fx: &mut Effects,
    ) -> Result<&Job, Refusal> {
        let id = self.changeable(&cancel.by, id)?.id.clone();
        self.dequeue(&id);
        let Some(job) = self.jobs.get_mut(&id) else { return Err(Refusal::NoJob(id.to_string())) };
        if !job.state.is_terminal() || planted(Bug::CancelOverridesEnd) {
            let Cancel { by: Caller { name, .. }, reason, signal } = cancel;
            let by = by(name.as_ref());
            let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            (job.reason, job.cancelled_by) = (format!("cancelled{by}{why}"), name);
            match job.gang.as_mut() {
                Some(gang) if gang.outcome != Some(Outcome::Cancel) => {
                    gang.outcome = Some(Outcome::Cancel);
                    gang.stop_signal = signal.or(gang.stop_signal);
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

    /// Ends the generation once no rank of it executes anything any more.
    pub(crate) fn conclude(&mut self, now: Millis, id: &JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(gang) = job.gang.take_if(|gang| gang.all_ended()) else { return };
        let gang_id = job.gang_id();
        let mut stuck = Vec::new();
        for (placement, seen) in gang.placements.iter().zip(&gang.observed) {
            let Some(node) = self.nodes.get_mut(&placement.node) else { continue };
            fx.show_node(&placement.node);
            if *seen == Observed::Killed {
                // The ranks are as good as dead, but what they hold is not free.
                node.release(id, &job.spec, placement);
                node.hold_leftover(&gang_id, &job.spec, placement);
                stuck.push(placement.node.clone());
                continue;
            }
            node.release(id, &job.spec, placement);
            if let Some(session) = node.session {
                let forget = job.assignment_as(placement, DesiredPhase::Forgotten);
                fx.sends.push((placement.node.clone(), session, ToNode::Assign(Box::new(forget))));
            }
        }
        if gang.outcome.is_none() {
            "every rank ended with exit code 0".clone_into(&mut job.reason);
        }
        if job.past.len() >= PAST_GENERATIONS_MAX {
            job.past.remove(0);
        }
        job.past.push(PastGeneration {
            generation: job.generation,
            placements: gang.placements,
            reason: job.reason.clone(),
            quoted: job.quoted.clone(),
            placed: gang.placed,
            ended: now,
        });
        self.room.appear();
        self.growable.remove(id);
        match gang.outcome {
            None => {
                job.exit = None;
                job.begin(now);
                self.end(now, id, JobState::Succeeded, fx);
            }
            Some(Outcome::Fail) => self.end(now, id, JobState::Failed, fx),
            Some(Outcome::Cancel) => self.end(now, id, JobState::Cancelled, fx),
            Some(Outcome::Restart | Outcome::Move) => {
                if gang.outcome == Some(Outcome::Restart) || planted(Bug::MoveSpendsRestart) {
                    job.restarts_used += 1;
                }
                self.start_again(now, id, fx);
            }
        }
        for node in stuck {
            self.drain_stuck(now, &node, &gang_id, fx);
        }
    }

    /// A job that was running has its place before those that wait: it goes on at once where it fits.
    fn start_again(&mut self, now: Millis, id: &JobId, fx: &mut Effects) {
        fx.store_job(id);
        let Some(at) = self.jobs.get(id).map(|job| job.not_before) else { return };
        if at > now {
            self.timers.insert((at, Timer::Requeue(id.clone())));
        } else if !self.place_or_explain(now, id, fx) {
            self.enqueue(id);
        }
    }

    fn end(&mut self, now: Millis, id: &JobId, state: JobState, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.state = state;
        self.ended.insert((job.finish(now), id.clone()));
        fx.store_job(id);
    }
}
