//! The pure core of the node: desired assignments against what runs. No I/O, no clock.
//!
//! Level-triggered: an assignment and a report each say the whole of their half, so either may be lost or
//! repeated. The core never decides that a gang should stop because a rank ended; that is the coordinator's.

use std::collections::{BTreeMap, VecDeque};

use muster_core::types::{
    Assignment, DesiredPhase, GangId, GangReport, Generation, JobId, Millis, ObservedPhase, RankExit,
};

/// Gangs that may run at once: far above what one machine can.
pub(crate) const GANGS_MAX: usize = 256;
/// Gangs held at once, with those refused and those not forgotten yet: a Hello may name 1024. What comes beyond
/// it goes unanswered, and the coordinator's start timeout deals with it.
const HELD_MAX: usize = 2 * GANGS_MAX;
/// Jobs of which the newest generation is remembered once it is forgotten, so that a late assignment does not
/// bring an ended one back.
const FORGOTTEN_MAX: usize = 4096;

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// Everything the coordinator wants of this node.
    Welcome(Vec<Assignment>),
    /// What it wants of one gang.
    Assign(Box<Assignment>),
    /// The gang could be launched; on its first node with the master port.
    Prepared(GangId, Option<u16>),
    /// Every rank was launched.
    Launched(GangId),
    /// It could not be prepared or launched; nothing runs.
    Failed(GangId, String),
    /// One rank ended.
    Exited(GangId, RankExit),
    /// No process of the gang is left.
    Gone(GangId),
    /// The daemon is to end: stop everything.
    Shutdown,
}

/// Something to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Check and prepare, in a runner of its own.
    Start(Box<Assignment>),
    /// Tell the runner to launch.
    Launch(Box<Assignment>),
    /// Tell the runner to stop, with this grace.
    Stop(GangId, Millis),
    /// Give up what is kept for the gang beside its logs.
    Release(GangId),
    /// Send the gang's whole observed state.
    Report(GangId),
}

/// One gang's part on this node.
#[derive(Debug)]
struct Part {
    assignment: Assignment,
    /// None until it is prepared.
    phase: Option<ObservedPhase>,
    master_port: Option<u16>,
    exits: Vec<RankExit>,
    error: Option<String>,
    launch_sent: bool,
    stop_sent: bool,
    /// An older generation of the job still has processes here.
    waiting: bool,
}

/// The state.
#[derive(Debug, Default)]
pub(crate) struct Core {
    parts: BTreeMap<GangId, Part>,
    /// The newest generation that was forgotten, by job; `forgotten_order` says which goes first.
    forgotten: BTreeMap<JobId, Generation>,
    forgotten_order: VecDeque<JobId>,
    stopping: bool,
}

impl Core {
    /// Takes one input; what it does is carried out in order.
    pub fn step(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Welcome(all) => {
                let unwanted: Vec<GangId> =
                    self.parts.keys().filter(|gang| all.iter().all(|a| a.gang != **gang)).cloned().collect();
                for gang in unwanted {
                    self.want(&gang, DesiredPhase::Forgotten, &mut effects);
                }
                for assignment in all {
                    self.assign(assignment, &mut effects);
                }
            }
            Input::Assign(assignment) => self.assign(*assignment, &mut effects),
            Input::Prepared(gang, port) => {
                self.observe(&gang, &mut effects, |part| {
                    part.phase = Some(ObservedPhase::Prepared);
                    part.master_port = port;
                });
            }
            Input::Launched(gang) => {
                self.observe(&gang, &mut effects, |part| part.phase = Some(ObservedPhase::Running));
            }
            Input::Failed(gang, error) => {
                self.observe(&gang, &mut effects, |part| {
                    part.error.get_or_insert(error);
                    part.phase = Some(ObservedPhase::Stopped);
                });
                self.settle(&gang, &mut effects);
            }
            Input::Exited(gang, exit) => {
                self.observe(&gang, &mut effects, |part| {
                    if part.exits.iter().all(|known| known.rank != exit.rank) {
                        part.exits.push(exit);
                    }
                });
            }
            Input::Gone(gang) => {
                self.observe(&gang, &mut effects, |part| part.phase = Some(ObservedPhase::Stopped));
                self.settle(&gang, &mut effects);
            }
            Input::Shutdown => self.shutdown(&mut effects),
        }
        effects
    }

    /// The whole observed state of one gang; none while it is still being prepared.
    pub fn report(&self, gang: &GangId) -> Option<GangReport> {
        let part = self.parts.get(gang)?;
        Some(GangReport {
            gang: gang.clone(),
            phase: part.phase?,
            master_port: part.master_port,
            exits: part.exits.clone(),
            error: part.error.clone(),
        })
    }

    /// The whole observed state.
    pub fn reports(&self) -> Vec<GangReport> {
        self.parts.keys().filter_map(|gang| self.report(gang)).collect()
    }

    /// Whether no process runs.
    pub fn is_idle(&self) -> bool {
        self.unsettled().next().is_none()
    }

    fn assign(&mut self, assignment: Assignment, effects: &mut Vec<Effect>) {
        let gang = assignment.gang.clone();
        if let Some(part) = self.parts.get_mut(&gang) {
            let phase = assignment.phase;
            // The port becomes known between PREPARED and RUNNING.
            if assignment.phase >= part.assignment.phase {
                part.assignment = Assignment { phase: part.assignment.phase, ..assignment };
            }
            self.want(&gang, phase, effects);
            return;
        }
        let stale = self.newest(&gang.job).is_some_and(|newest| newest > gang.generation)
            || self.forgotten.get(&gang.job).is_some_and(|newest| *newest >= gang.generation);
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
            master_port: None,
            exits: Vec::new(),
            error,
            launch_sent: false,
            stop_sent: settled,
            waiting,
            assignment: assignment.clone(),
        };
        self.parts.insert(gang.clone(), part);
        if settled {
            effects.push(Effect::Report(gang));
        } else if waiting {
            self.stop_older(&gang, effects);
        } else {
            self.start(&gang, effects);
        }
    }

    fn start(&mut self, gang: &GangId, effects: &mut Vec<Effect>) {
        if let Some(part) = self.parts.get_mut(gang) {
            part.waiting = false;
            effects.push(Effect::Start(Box::new(part.assignment.clone())));
            let phase = part.assignment.phase;
            self.want(gang, phase, effects);
        }
    }

    /// Raises what is wanted; it never falls.
    fn want(&mut self, gang: &GangId, phase: DesiredPhase, effects: &mut Vec<Effect>) {
        let Some(part) = self.parts.get_mut(gang) else { return };
        part.assignment.phase = part.assignment.phase.max(phase);
        if part.waiting {
            if part.assignment.phase >= DesiredPhase::Stopped {
                part.waiting = false;
                part.phase = Some(ObservedPhase::Stopped);
                effects.push(Effect::Report(gang.clone()));
                self.settle(gang, effects);
            }
            return;
        }
        match part.assignment.phase {
            DesiredPhase::Prepared => {}
            DesiredPhase::Running => {
                if !part.launch_sent && !part.stop_sent {
                    part.launch_sent = true;
                    effects.push(Effect::Launch(Box::new(part.assignment.clone())));
                }
            }
            DesiredPhase::Stopped | DesiredPhase::Forgotten => {
                if part.phase == Some(ObservedPhase::Stopped) {
                    self.settle(gang, effects);
                } else if !part.stop_sent {
                    part.stop_sent = true;
                    effects.push(Effect::Stop(gang.clone(), part.assignment.spec.stop_grace));
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

    /// After a gang has stopped: forgets it if that is wanted, and lets a newer generation begin.
    fn settle(&mut self, gang: &GangId, effects: &mut Vec<Effect>) {
        let wanted = self.parts.get(gang).map(|part| part.assignment.phase);
        if wanted == Some(DesiredPhase::Forgotten) {
            self.parts.remove(gang);
            self.remember(gang);
            effects.push(Effect::Release(gang.clone()));
        }
        let next = self.parts.iter().find(|(other, part)| other.job == gang.job && part.waiting);
        if let Some(next) = next.map(|(other, _)| other.clone())
            && !self.older_runs(&next)
        {
            self.start(&next, effects);
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
        self.parts.iter().filter(|(_, part)| part.phase != Some(ObservedPhase::Stopped))
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

    fn stop_older(&mut self, gang: &GangId, effects: &mut Vec<Effect>) {
        let older: Vec<GangId> = self.older(gang).map(|(gang, _)| gang.clone()).collect();
        for gang in older {
            self.want(&gang, DesiredPhase::Stopped, effects);
        }
    }

    fn shutdown(&mut self, effects: &mut Vec<Effect>) {
        self.stopping = true;
        let running: Vec<GangId> = self.unsettled().map(|(gang, _)| gang.clone()).collect();
        for gang in running {
            if let Some(part) = self.parts.get_mut(&gang)
                && part.launch_sent
            {
                // Said before the ranks end, so that the coordinator sees the cause and not its consequence. They may
                // run before it is known here that they do.
                part.error.get_or_insert_with(|| "its daemon was stopped".to_owned());
                effects.push(Effect::Report(gang.clone()));
            }
            self.want(&gang, DesiredPhase::Stopped, effects);
        }
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
