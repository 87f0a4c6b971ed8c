//! Nodes are emptied and nodes come back: drains, daemons that leave, nodes whose ranks the kernel holds, and elastic
//! gangs that grow. None of it spends a job's restarts.

use std::collections::BTreeSet;

use crate::bugs::{Bug, planted};
use crate::core::{Core, Timer};
use crate::effects::{Effects, Refusal, Reply, ToNode};
use crate::fault::Cause;
use crate::job::{Job, JobState};
use crate::node::{Drain, Node};
use crate::owners::by;
use crate::schedule::{Plan, solve};
use crate::types::{
    Assignment, DesiredPhase, GangId, GangReport, Generation, JobId, Millis, NodeName, ObservedPhase,
    StopMode,
};

impl Core {
    /// A user empties a node.
    pub(crate) fn drain(
        &mut self,
        now: Millis,
        name: &str,
        drain: Drain,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let name = self.node(name)?.name.clone();
        self.begin_drain(now, &name, drain, fx);
        Ok(Reply::Node(Box::new(self.node(name.as_str())?.clone())))
    }

    fn begin_drain(&mut self, now: Millis, name: &NodeName, drain: Drain, fx: &mut Effects) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let by = by(drain.by.as_ref());
        let why = match drain.reason.as_str() {
            "" => format!("node {name} is drained{by}"),
            reason => format!("node {name} is drained{by} ({reason})"),
        };
        let limit = drain.deadline.map(|deadline| deadline.since(now));
        (node.drain, node.uncordoned_by) = (Some(drain), None);
        node.changed = now;
        fx.store_node(name);
        self.move_gangs(now, name, &why, limit, fx);
    }

    /// Stops every gang with ranks on a node, to be started elsewhere. `limit` shortens their grace.
    fn move_gangs(
        &mut self,
        now: Millis,
        name: &NodeName,
        why: &str,
        limit: Option<Millis>,
        fx: &mut Effects,
    ) {
        let held = self.nodes.get(name).map(|node| node.reserved.jobs.clone()).unwrap_or_default();
        for id in held.into_keys() {
            if let (Some(limit), Some(job)) = (limit, self.jobs.get_mut(&id))
                && let Some(gang) = &mut job.gang
            {
                gang.stop_grace = Some(limit.min(gang.stop_grace.unwrap_or(job.spec.stop_grace)));
                if gang.outcome.is_some() {
                    fx.store_job(&id);
                    self.send_assignments(&id, fx);
                }
            }
            self.fault(now, &id, Cause::Move(why.to_owned()), fx);
        }
    }

    /// A daemon is about to end in good order.
    pub(crate) fn leaving(&mut self, now: Millis, name: &NodeName, reason: String, fx: &mut Effects) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let why = format!("node {name} leaves: {reason}");
        node.leaving = Some(reason);
        fx.show_node(name);
        self.move_gangs(now, name, &why, None, fx);
    }

    /// Ranks that were killed and are not gone: the machine needs somebody to look at it.
    pub(crate) fn drain_stuck(&mut self, now: Millis, name: &NodeName, gang: &GangId, fx: &mut Effects) {
        if self.nodes.get(name).is_some_and(|node| node.drain.is_none()) {
            let reason = format!("ranks of {gang} were killed and the kernel holds them; reboot it");
            self.begin_drain(now, name, Drain { reason, by: None, deadline: None }, fx);
        }
    }

    /// News of a gang of which something was left.
    pub(crate) fn report_of_leftover(
        &mut self,
        now: Millis,
        name: &NodeName,
        report: &GangReport,
        fx: &mut Effects,
    ) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if !node.reserved.leftovers.contains_key(&report.gang) {
            return;
        }
        if report.phase == ObservedPhase::Killed {
            self.drain_stuck(now, name, &report.gang, fx);
        } else if report.phase == ObservedPhase::Stopped {
            node.release_leftover(&report.gang);
            let session = node.session;
            self.room.appear();
            fx.show_node(name);
            let forget = self.assignment_of_leftover(name, &report.gang, DesiredPhase::Forgotten);
            if let (Some(session), Some(forget)) = (session, forget) {
                fx.sends.push((name.clone(), session, ToNode::Assign(Box::new(forget))));
            }
        }
    }

    /// What the node says in its Hello of gangs that are over for their jobs is all there is to know of them: it was
    /// cut off, and what ran there may still be stopping.
    pub(crate) fn observe_leftovers(
        &mut self,
        now: Millis,
        name: &NodeName,
        reports: &[GangReport],
        fx: &mut Effects,
    ) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let left = |gang: &GangId| {
            reports.iter().any(|report| report.gang == *gang && report.phase < ObservedPhase::Stopped)
        };
        let gone: Vec<GangId> = node.reserved.leftovers.keys().filter(|gang| !left(gang)).cloned().collect();
        let mut room = false;
        for gang in gone {
            room |= node.release_leftover(&gang);
        }
        if room {
            self.room.appear();
            fx.show_node(name);
        }
        let left = reports.iter().filter(|report| report.phase < ObservedPhase::Stopped);
        for report in left.filter(|_| !planted(Bug::LeftoversForgotten)) {
            let Some(job) = self.jobs.get(&report.gang.job) else { continue };
            let placements = job.placements_of(report.gang.generation).unwrap_or_default();
            let Some(at) = placements.iter().position(|placement| placement.node == *name) else { continue };
            let current = job.generation == report.gang.generation && job.gang.is_some();
            let (spec, placement) = (job.spec.clone(), placements[at].clone());
            if current {
                // It may have been counted as gone. The gang has not ended elsewhere: it waits for this node again.
                if let Some(gang) = self.jobs.get_mut(&report.gang.job).and_then(|job| job.gang.as_mut()) {
                    gang.forget_observed(at);
                }
                continue;
            }
            if let Some(node) = self.nodes.get_mut(name) {
                node.hold_leftover(&report.gang, &spec, &placement);
                fx.show_node(name);
            }
            if report.phase == ObservedPhase::Killed {
                self.drain_stuck(now, name, &report.gang, fx);
            }
        }
    }

    /// What a node shall do with what is left of gangs there: stop it, and say when nothing is.
    pub(crate) fn leftover_assignments(&self, name: &NodeName) -> Vec<Assignment> {
        let Some(node) = self.nodes.get(name) else { return Vec::new() };
        let stop = |gang: &GangId| self.assignment_of_leftover(name, gang, DesiredPhase::Stopped);
        node.reserved.leftovers.keys().filter_map(stop).collect()
    }

    fn assignment_of_leftover(
        &self,
        name: &NodeName,
        gang: &GangId,
        phase: DesiredPhase,
    ) -> Option<Assignment> {
        let job = self.jobs.get(&gang.job)?;
        let mut placements = job.placements_of(gang.generation)?.iter();
        let placement = placements.find(|placement| placement.node == *name)?;
        let mut assignment = job.assignment_as(placement, phase);
        assignment.gang = gang.clone();
        assignment.stop = job.stop_mode(None);
        Some(assignment)
    }

    /// Notes an elastic job that runs on fewer nodes than it may: it is looked at when room appears.
    pub(crate) fn note_growable(&mut self, id: &JobId) {
        if self.jobs.get(id).is_some_and(may_grow) {
            self.growable.insert(id.clone());
        }
    }

    /// Looks at an elastic job that has just begun to run. Room that appeared while it started was no use
    /// to it then, and nothing tells of it again.
    pub(crate) fn look_for_growth(&mut self, now: Millis, id: &JobId) {
        if planted(Bug::RoomForgottenWhileStarting) {
            return self.note_growable(id);
        }
        if let Some(job) = self.jobs.get(id).filter(|job| may_grow(job)) {
            let at = now.plus(self.config.grow_delay);
            self.timers.insert((at, Timer::Grow(id.clone(), job.generation)));
        }
    }

    /// Room has appeared. Nodes often come back together, so it is looked at a little later, once for all.
    /// Each look is at all nodes, so they are as far apart as passes over the queue.
    pub(crate) fn consider_growth(&mut self, now: Millis) {
        let mut at = now.plus(self.config.grow_delay);
        let apart = self.rest_after_visits();
        for id in std::mem::take(&mut self.growable) {
            if let Some(job) = self.jobs.get(&id) {
                self.timers.insert((at, Timer::Grow(id, job.generation)));
                at = at.plus(apart);
            }
        }
    }

    /// Starts an elastic job again if that gives it more nodes.
    pub(crate) fn grow(&mut self, now: Millis, id: &JobId, generation: Generation, fx: &mut Effects) {
        let Some(job) = self.jobs.get(id).filter(|job| job.generation == generation) else { return };
        if job.state != JobState::Running {
            return;
        }
        let before = job.placements().len();
        let more = self.nodes_to_be_had(job);
        self.charge_visits(now);
        if more > before {
            let why = format!("{more} nodes can be had instead of {before}");
            self.fault(now, id, Cause::Move(why), fx);
        } else {
            self.note_growable(id);
        }
    }

    /// Returns on how many nodes a running job could run now, its own included.
    fn nodes_to_be_had(&self, job: &Job) -> usize {
        let own: Vec<Node> = (job.placements().iter())
            .filter_map(|placement| {
                let mut node = self.nodes.get(&placement.node)?.clone();
                node.release(&job.id, &job.spec, placement);
                Some(node)
            })
            .collect();
        let others = self.nodes.values().filter(|node| !node.reserved.jobs.contains_key(&job.id));
        match solve(&job.spec, own.iter().chain(others)) {
            Plan::Place(placements) => placements.len(),
            Plan::Wait(_) => 0,
        }
    }

    /// Returns an elastic job that would stay small beside nodes that fit, although nothing will make it
    /// be looked at.
    pub(crate) fn check_growth(&self) -> Result<(), String> {
        let looked_at: BTreeSet<&JobId> = self
            .timers
            .iter()
            .filter_map(|(_, timer)| match timer {
                Timer::Grow(id, generation) => {
                    self.jobs.get(id).filter(|job| job.generation == *generation).map(|_| id)
                }
                _ => None,
            })
            .collect();
        for job in self.jobs.values().filter(|job| may_grow(job) && !looked_at.contains(&job.id)) {
            let before = job.placements().len();
            let (noted, more) = (self.growable.contains(&job.id), self.nodes_to_be_had(job));
            if !noted || more > before && !self.room.has_appeared() {
                return Err(format!("{} stays on {before} nodes where {more} can be had", job.id));
            }
        }
        Ok(())
    }
}

/// Returns whether an elastic job runs on fewer nodes than it may.
fn may_grow(job: &Job) -> bool {
    job.state == JobState::Running && job.placements().len() < job.spec.max_nodes as usize
}

impl Job {
    /// How a gang of this job is stopped.
    pub(crate) fn stop_mode(&self, gang: Option<&crate::job::Gang>) -> StopMode {
        let own = gang.and_then(|gang| gang.stop_grace);
        let grace = own.unwrap_or(self.spec.stop_grace);
        let signal = gang.and_then(|gang| gang.stop_signal).unwrap_or(self.spec.stop_signal);
        StopMode { signal, grace, dump_stacks: gang.is_some_and(|gang| gang.dump_stacks) }
    }
}
