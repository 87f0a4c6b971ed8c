//! Desired assignments against what runs.
//!
//! Level-triggered: an assignment and a report each say the whole of their half, so either may be lost or
//! repeated. The core never decides that a gang should stop because a rank ended; that is the coordinator's.

use std::collections::{BTreeMap, VecDeque};

use muster_core::bugs::{Bug, planted};
use muster_core::types::{
    Assignment, CoordinatorLoss, DesiredPhase, GangId, GangReport, Generation, JobId, Millis, ObservedPhase,
};

use crate::lease::Lease;
use crate::messages::{Adopted, Effect, Input};
use crate::part::Part;

/// Gangs that may run at once: far above what one machine can.
const GANGS_MAX: usize = 256;
/// Gangs held at once, with those refused and those not forgotten yet: a Hello may name 1024. What comes beyond
/// it goes unanswered, and the coordinator's start timeout deals with it.
const HELD_MAX: usize = 2 * GANGS_MAX;
/// Jobs of which the newest generation is remembered once it is forgotten, so that a late assignment does not
/// bring an ended one back.
const FORGOTTEN_MAX: usize = 4096;
/// Time beyond its grace that a shim gets to stop its ranks, before it is taken to be frozen and is killed itself. Killed
/// ranks have ten seconds to be gone before a shim says that the kernel holds them.
const SHIM_SLACK: Millis = Millis::from_secs(15);

/// The state.
#[derive(Debug, Default)]
pub struct Core {
    parts: BTreeMap<GangId, Part>,
    lease: Lease,
    /// The newest generation that was forgotten, by job; `forgotten_order` says which goes first.
    forgotten: BTreeMap<JobId, Generation>,
    forgotten_order: VecDeque<JobId>,
    stopping: bool,
}

impl Core {
    /// Takes one input; what it does is carried out in order.
    pub fn step(&mut self, now: Millis, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Adopted(adopted) => self.adopted(*adopted),
            Input::Welcome(all) => {
                let unwanted: Vec<GangId> =
                    self.parts.keys().filter(|gang| all.iter().all(|a| a.gang != **gang)).cloned().collect();
                for gang in unwanted {
                    self.want(now, &gang, DesiredPhase::Forgotten, &mut effects);
                }
                for assignment in all {
                    self.assign(now, assignment, &mut effects);
                }
            }
            Input::Assign(assignment) => self.assign(now, *assignment, &mut effects),
            Input::Prepared(gang, port) => {
                self.observe(&gang, &mut effects, |part| {
                    part.phase = Some(ObservedPhase::Prepared);
                    part.master_port = port;
                });
            }
            Input::Surroundings(gang, surroundings) => {
                self.observe(&gang, &mut effects, |part| part.surroundings = Some(surroundings));
            }
            Input::Launched(gang) => {
                self.observe(&gang, &mut effects, |part| part.phase = Some(ObservedPhase::Running));
            }
            Input::Failed(gang, error) => {
                self.observe(&gang, &mut effects, |part| {
                    part.error.get_or_insert(error);
                    part.phase = Some(ObservedPhase::Stopped);
                });
                self.settle(now, &gang, &mut effects);
            }
            Input::Exited(gang, exit) => {
                self.observe(&gang, &mut effects, |part| {
                    if part.exits.iter().all(|known| known.rank != exit.rank) {
                        part.exits.push(exit);
                    }
                });
            }
            Input::Killed(gang) => {
                self.observe(&gang, &mut effects, |part| part.phase = Some(ObservedPhase::Killed));
                self.settle(now, &gang, &mut effects);
            }
            Input::Gone(gang) => {
                self.observe(&gang, &mut effects, |part| part.phase = Some(ObservedPhase::Stopped));
                self.settle(now, &gang, &mut effects);
            }
            Input::Fenced(gang) => self.observe(&gang, &mut effects, |part| {
                let why = "it could not renew its lease, and stopped its ranks so that none lives twice";
                part.error.get_or_insert_with(|| why.to_owned());
            }),
            Input::Quiet(gang, ranks) => self.observe(&gang, &mut effects, |part| part.quiet = ranks),
            Input::Processes(gang, pids) => self.processes(&gang, pids, &mut effects),
            Input::Rendezvous(gang, stuck) => {
                self.observe(&gang, &mut effects, |part| part.rendezvous = stuck);
            }
            Input::Renewed { sent, lease } => {
                self.lease.renewed(now, sent, lease);
                self.raise_fences(&mut effects);
            }
            Input::CoordinatorGone { at } => {
                if !planted(Bug::GoneCoordinatorIgnored) {
                    self.lease.coordinator_gone(at);
                }
                self.raise_fences(&mut effects);
            }
            Input::Shutdown => self.shutdown(now, &mut effects),
            Input::Tick => {}
        }
        self.watch_shims(now, &mut effects);
        effects
    }

    /// The whole observed state of one gang; none while it is still being prepared.
    pub fn report(&self, gang: &GangId) -> Option<GangReport> {
        self.parts.get(gang)?.report()
    }

    /// When `Tick` is due next, unless something else comes first.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.parts.values().filter(|part| part.runs()).filter_map(Part::deadline).min()
    }

    /// When ranks are asked to end, the first of them, unless the lease is renewed or no coordinator runs; none if that
    /// ends none.
    pub fn fenced_at(&self) -> Option<Millis> {
        let lives_on =
            |part: &&Part| part.runs() && part.assignment.spec.on_coordinator_loss == CoordinatorLoss::Run;
        self.parts.values().filter(lives_on).filter_map(|part| part.fence).map(|fence| fence.term).min()
    }

    /// What the gang was told last; none if nothing of it is held.
    pub fn assignment(&self, gang: &GangId) -> Option<&Assignment> {
        self.parts.get(gang).map(|part| &part.assignment)
    }

    /// Why the daemon is about to end, if it is.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    fn adopted(&mut self, adopted: Adopted) {
        if let Some(fence) = adopted.fence {
            self.lease.adopt(fence);
        }
        let phase = if adopted.launched { ObservedPhase::Running } else { ObservedPhase::Prepared };
        let part = Part {
            phase: Some(phase),
            master_port: adopted.master_port,
            exits: if planted(Bug::AdoptedExitsLost) { Vec::new() } else { adopted.exits },
            launch_sent: adopted.launched,
            fence: adopted.fence,
            surroundings: adopted.surroundings,
            ..Part::new(adopted.assignment)
        };
        self.parts.insert(part.assignment.gang.clone(), part);
    }

    /// Passes the lease on to the shims.
    fn raise_fences(&mut self, effects: &mut Vec<Effect>) {
        for (gang, part) in &mut self.parts {
            let fence = self.lease.fence(part.assignment.spec.on_coordinator_loss);
            if let Some(fence) =
                fence.filter(|_| part.launch_sent && part.runs() && !planted(Bug::FenceNotRaised))
                && part.fence.is_none_or(|before| before.kill < fence.kill)
            {
                part.fence = Some(fence);
                part.kill_at = part.stop_sent.and(part.kill_at);
                effects.push(Effect::Fence(gang.clone(), fence));
            }
        }
    }

    /// A shim that is frozen neither stops its ranks when it is told to nor when their lease runs out.
    fn watch_shims(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        for (gang, part) in self.parts.iter_mut().filter(|(_, part)| part.runs()) {
            if part.kill_at.is_some_and(|at| at <= now) {
                // Again after a while, should the first not have been enough.
                part.kill_at = Some(now.plus(SHIM_SLACK));
                effects.push(Effect::Kill(gang.clone()));
            } else if let Some(fence) = part.fence.take_if(|fence| fence.kill <= now) {
                // It may only just have been thawed together with this daemon: it gets a moment.
                let at = now.plus(fence.slack());
                part.kill_at = Some(part.kill_at.map_or(at, |before| before.min(at)));
            }
        }
    }

    /// The whole observed state.
    pub fn reports(&self) -> Vec<GangReport> {
        self.parts.keys().filter_map(|gang| self.report(gang)).collect()
    }

    /// Whether no process runs.
    pub fn is_idle(&self) -> bool {
        self.unsettled().next().is_none()
    }

    fn assign(&mut self, now: Millis, assignment: Assignment, effects: &mut Vec<Effect>) {
        let gang = assignment.gang.clone();
        if let Some(part) = self.parts.get_mut(&gang) {
            let phase = assignment.phase;
            // The port becomes known between PREPARED and RUNNING.
            if assignment.phase >= part.assignment.phase {
                part.assignment = Assignment { phase: part.assignment.phase, ..assignment };
            }
            self.want(now, &gang, phase, effects);
            return;
        }
        let stale = self.newest(&gang.job).is_some_and(|newest| newest > gang.generation)
            || self.forgotten.get(&gang.job).is_some_and(|newest| *newest >= gang.generation);
        let stale = stale && !planted(Bug::OldGenerationLaunches);
        let ends = assignment.phase == DesiredPhase::Stopped;
        if stale || assignment.phase == DesiredPhase::Forgotten || self.parts.len() >= HELD_MAX {
            return;
        }
        // What a node says of a gang that it prepares is taken for the job's own fault, for good. The goodbye that
        // follows says better why this one does not start here.
        if self.stopping && !ends {
            return;
        }
        let full = self.unsettled().count() >= GANGS_MAX;
        let error = full.then(|| format!("this node runs {GANGS_MAX} gangs already, the most it takes"));
        // A gang to be stopped that is not held has nothing that runs: that is all there is to say.
        let settled = ends || error.is_some();
        let waiting = !settled && self.older_runs(&gang);
        let part = Part {
            phase: settled.then_some(ObservedPhase::Stopped),
            error,
            waiting,
            ..Part::new(assignment)
        };
        self.parts.insert(gang.clone(), part);
        if settled {
            effects.push(Effect::Report(gang));
        } else if waiting {
            self.stop_older(now, &gang, effects);
        } else {
            self.start(now, &gang, effects);
        }
    }

    fn start(&mut self, now: Millis, gang: &GangId, effects: &mut Vec<Effect>) {
        if let Some(part) = self.parts.get_mut(gang) {
            part.waiting = false;
            effects.push(Effect::Start(Box::new(part.assignment.clone())));
            let phase = part.assignment.phase;
            self.want(now, gang, phase, effects);
        }
    }

    /// Raises what is wanted; it never falls.
    fn want(&mut self, now: Millis, gang: &GangId, phase: DesiredPhase, effects: &mut Vec<Effect>) {
        let Some(part) = self.parts.get_mut(gang) else { return };
        part.assignment.phase = part.assignment.phase.max(phase);
        if part.waiting {
            if part.assignment.phase >= DesiredPhase::Stopped {
                part.waiting = false;
                part.phase = Some(ObservedPhase::Stopped);
                effects.push(Effect::Report(gang.clone()));
                self.settle(now, gang, effects);
            }
            return;
        }
        match part.assignment.phase {
            DesiredPhase::Prepared => {}
            DesiredPhase::Running => {
                if !part.launch_sent && part.stop_sent.is_none() && part.runs() {
                    part.launch_sent = true;
                    part.fence = self.lease.fence(part.assignment.spec.on_coordinator_loss);
                    effects.push(Effect::Launch(Box::new(part.assignment.clone()), part.fence));
                }
            }
            DesiredPhase::Stopped | DesiredPhase::Forgotten if !part.runs() => {
                self.settle(now, gang, effects);
            }
            DesiredPhase::Stopped | DesiredPhase::Forgotten => {
                // Told again if there is less time than before: a drain has a deadline.
                let stop = part.assignment.stop;
                if part.stop_sent.is_none_or(|before| stop.grace < before.grace) {
                    part.stop_sent = Some(stop);
                    part.kill_at = Some(now.plus(stop.grace).plus(SHIM_SLACK));
                    effects.push(Effect::Stop(gang.clone(), stop));
                }
            }
        }
    }

    fn observe(&mut self, gang: &GangId, effects: &mut Vec<Effect>, change: impl FnOnce(&mut Part)) {
        if let Some(part) = self.parts.get_mut(gang)
            && part.phase != Some(ObservedPhase::Stopped)
        {
            change(part);
            effects.push(Effect::Report(gang.clone()));
        }
    }

    /// They go with the report that the ranks were launched, unless that was before: an adoption says so at once.
    fn processes(&mut self, gang: &GangId, pids: Vec<u32>, effects: &mut Vec<Effect>) {
        if let Some(part) = self.parts.get_mut(gang) {
            part.processes = pids;
            if part.phase == Some(ObservedPhase::Running) {
                effects.push(Effect::Report(gang.clone()));
            }
        }
    }

    /// After a gang has stopped: forgets it if that is wanted, and lets a newer generation begin.
    fn settle(&mut self, now: Millis, gang: &GangId, effects: &mut Vec<Effect>) {
        let is_over = |part: &Part| {
            part.phase == Some(ObservedPhase::Stopped) && part.assignment.phase == DesiredPhase::Forgotten
        };
        if self.parts.get(gang).is_some_and(is_over) {
            self.parts.remove(gang);
            self.remember(gang);
            effects.push(Effect::Release(gang.clone()));
        }
        let next = self.parts.iter().find(|(other, part)| other.job == gang.job && part.waiting);
        if let Some(next) = next.map(|(other, _)| other.clone())
            && !self.older_runs(&next)
        {
            self.start(now, &next, effects);
        }
    }

    /// A gang that was forgotten must not come back.
    fn remember(&mut self, gang: &GangId) {
        if let Some(newest) = self.forgotten.get_mut(&gang.job) {
            *newest = gang.generation.max(*newest);
            return;
        }
        if self.forgotten_order.len() >= FORGOTTEN_MAX
            && let Some(oldest) = self.forgotten_order.pop_front()
        {
            self.forgotten.remove(&oldest);
        }
        self.forgotten.insert(gang.job.clone(), gang.generation);
        self.forgotten_order.push_back(gang.job.clone());
    }

    /// Gangs of which something runs, or may.
    fn unsettled(&self) -> impl Iterator<Item = (&GangId, &Part)> {
        self.parts.iter().filter(|(_, part)| part.runs())
    }

    fn newest(&self, job: &JobId) -> Option<Generation> {
        self.parts.keys().filter(|gang| gang.job == *job).map(|gang| gang.generation).max()
    }

    fn older(&self, gang: &GangId) -> impl Iterator<Item = (&GangId, &Part)> {
        self.unsettled().filter(move |(other, _)| other.job == gang.job && other.generation < gang.generation)
    }

    fn older_runs(&self, gang: &GangId) -> bool {
        self.older(gang).next().is_some()
    }

    fn stop_older(&mut self, now: Millis, gang: &GangId, effects: &mut Vec<Effect>) {
        let older: Vec<GangId> = self.older(gang).map(|(gang, _)| gang.clone()).collect();
        for gang in older {
            self.want(now, &gang, DesiredPhase::Stopped, effects);
        }
    }

    fn shutdown(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        self.stopping = true;
        // Said first, so that the coordinator sees the cause and not its consequences, the ends of the ranks.
        effects.push(Effect::Leaving("its daemon is being stopped".to_owned()));
        let running: Vec<GangId> = self.unsettled().map(|(gang, _)| gang.clone()).collect();
        for gang in running {
            self.want(now, &gang, DesiredPhase::Stopped, effects);
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
