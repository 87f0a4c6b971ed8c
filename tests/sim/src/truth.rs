//! What really happens, as nobody in the cluster can see it, and what must hold of it.

use std::collections::{BTreeMap, BTreeSet};

use muster_core::types::{GangId, Generation, JobId, Rank, RankExit};
use muster_core::{Core, Job, JobState};

/// What was last seen of a job.
#[derive(Clone, Debug)]
struct Seen {
    state: JobState,
    generation: Generation,
    restarts_used: u32,
    finished: Option<muster_core::types::Millis>,
}

/// One start of a gang, as it really went.
#[derive(Clone, Debug, Default)]
struct Gang {
    /// Machines on which it was prepared, and launched.
    prepared: BTreeSet<usize>,
    launched: BTreeSet<usize>,
    nodes: u32,
    ranks: BTreeMap<Rank, Option<RankExit>>,
    /// Ranks that execute.
    running: u32,
    /// Something went wrong that may end it.
    tainted: bool,
}

/// The record.
#[derive(Debug, Default)]
pub struct Truth {
    gangs: BTreeMap<GangId, Gang>,
    /// The generations of each job of which ranks execute.
    running: BTreeMap<JobId, BTreeSet<Generation>>,
    /// GPUs held by processes that exist, whether they execute or not.
    devices: BTreeMap<(usize, u32), GangId>,
    seen: BTreeMap<JobId, Seen>,
    /// Submissions that were acknowledged, by request.
    acknowledged: BTreeMap<String, JobId>,
    /// The first thing that went wrong.
    pub violation: Option<String>,
}

impl Truth {
    pub fn violate(&mut self, what: impl Into<String>) {
        if self.violation.is_none() {
            self.violation = Some(what.into());
        }
    }

    /// A submission was answered.
    pub fn acknowledge(&mut self, request: &str, job: &JobId) {
        let before = self.acknowledged.insert(request.to_owned(), job.clone());
        if let Some(before) = before.filter(|before| before != job) {
            self.violate(format!("request {request} made two jobs, {before} and {job}"));
        }
    }

    /// Something was done to a gang that may end it.
    pub fn taint(&mut self, gang: &GangId) {
        self.gangs.entry(gang.clone()).or_default().tainted = true;
    }

    pub fn is_tainted(&self, gang: &GangId) -> bool {
        self.gangs.get(gang).is_some_and(|gang| gang.tainted)
    }

    pub fn prepared(&mut self, gang: &GangId, machine: usize) {
        self.gangs.entry(gang.clone()).or_default().prepared.insert(machine);
    }

    /// A shim launches its ranks.
    pub fn launch(&mut self, id: &GangId, machine: usize, nodes: u32, ranks: &[Rank], gpus: &[u32]) {
        let newer = self.gangs.range(id.clone()..).skip(1).take_while(|(other, _)| other.job == id.job);
        let newer: Option<GangId> =
            newer.filter(|(_, gang)| !gang.launched.is_empty()).map(|(other, _)| other.clone()).next();
        if let Some(newer) = newer {
            self.violate(format!("{id} is launched on machine {machine} after {newer}"));
        }
        if let Some(other) =
            self.running.get(&id.job).and_then(|all| all.iter().find(|g| **g != id.generation))
        {
            self.violate(format!("{id} is launched on machine {machine} while generation {other} runs"));
        }
        for gpu in gpus {
            let holder = self.devices.insert((machine, *gpu), id.clone());
            if let Some(holder) = holder.filter(|holder| holder != id) {
                self.violate(format!(
                    "GPU {gpu} of machine {machine} is given to {id} while {holder} has it"
                ));
            }
        }
        let gang = self.gangs.entry(id.clone()).or_default();
        gang.nodes = nodes;
        let (prepared, again) = (gang.prepared.len(), !gang.launched.insert(machine));
        let twice = ranks.iter().find(|rank| gang.ranks.contains_key(rank)).copied();
        gang.ranks.extend(ranks.iter().map(|rank| (*rank, None)));
        gang.running += ranks.len() as u32;
        self.running.entry(id.job.clone()).or_default().insert(id.generation);
        if prepared < nodes as usize {
            self.violate(format!("{id} is launched with {prepared} of {nodes} nodes prepared"));
        }
        if again {
            self.violate(format!("{id} is launched twice on machine {machine}"));
        }
        if let Some(rank) = twice {
            self.violate(format!("rank {rank} of {id} lives twice"));
        }
    }

    /// A rank executes no more.
    pub fn stops(&mut self, id: &GangId) {
        let Some(gang) = self.gangs.get_mut(id) else { return };
        gang.running -= 1;
        if gang.running == 0
            && let Some(all) = self.running.get_mut(&id.job)
        {
            all.remove(&id.generation);
        }
    }

    /// A rank that was frozen executes again. If its shim is about to kill it, as the first thing that it does,
    /// what the rank does in between is not counted: nothing can be done about it.
    pub fn goes_on(&mut self, id: &GangId, about_to_die: bool) {
        let Some(gang) = self.gangs.get_mut(id) else { return };
        gang.running += 1;
        let all = self.running.entry(id.job.clone()).or_default();
        let other = all.iter().find(|other| **other != id.generation).copied();
        all.insert(id.generation);
        if let Some(other) = other.filter(|_| !about_to_die) {
            self.violate(format!("{id} goes on while generation {other} runs"));
        }
    }

    /// A rank's exit is known on its node.
    pub fn exits(&mut self, id: &GangId, exit: &RankExit) {
        if let Some(gang) = self.gangs.get_mut(id) {
            gang.ranks.insert(exit.rank, Some(exit.clone()));
        }
    }

    /// No process of the gang is left on the machine.
    pub fn gone(&mut self, id: &GangId, machine: usize) {
        self.devices.retain(|(at, _), holder| *at != machine || holder != id);
    }

    /// The job has changed in the coordinator's eyes. `excused` says whether a fault of a machine explains the end of
    /// its current generation.
    pub fn observe(&mut self, job: &Job, excused: bool) {
        let now = Seen {
            state: job.state,
            generation: job.generation,
            restarts_used: job.restarts_used,
            finished: job.finished,
        };
        let before = self.seen.insert(job.id.clone(), now);
        let gang = job.gang_id();
        // Some ranks were quiet for a while, as they may be, when all others had ended.
        let ended = |gang: &Gang| gang.ranks.values().any(Option::is_some);
        if job.reason.contains("shown progress") && self.gangs.get(&gang).is_some_and(ended) {
            self.taint(&gang);
        }
        if let Some(before) = before {
            if job.generation < before.generation {
                self.violate(format!("{gang}: the generation was {} before", before.generation));
            }
            if before.state.is_terminal() && (job.state != before.state || job.finished != before.finished) {
                self.violate(format!("{gang}: {:?} became {:?}", before.state, job.state));
            }
            if before.state.is_terminal() {
                return;
            }
            let last = GangId { job: job.id.clone(), generation: before.generation };
            let because = excused || self.is_tainted(&last);
            if job.restarts_used > before.restarts_used && !because {
                self.violate(format!("{last}: a restart is spent without a fault: {}", job.reason));
            }
            if job.state == JobState::Failed && !because && !self.is_tainted(&gang) {
                self.violate(format!("{gang} fails without a fault: {}", job.reason));
            }
        }
        if job.state == JobState::Succeeded {
            let real = self.gangs.get(&gang);
            let all = real.is_some_and(|gang| {
                gang.ranks.len() as u32 == job.world_size()
                    && gang.ranks.values().all(|exit| exit.as_ref().is_some_and(RankExit::is_success))
            });
            if !all {
                self.violate(format!("{gang} succeeds, but its ranks did not: {real:?}"));
            }
        }
        if let Some(cause) = &job.exit {
            let id = GangId { job: job.id.clone(), generation: cause.generation };
            let real = self.gangs.get(&id).and_then(|gang| gang.ranks.get(&cause.exit.rank)?.as_ref());
            if real.is_none_or(|real| (real.code, real.signal) != (cause.exit.code, cause.exit.signal)) {
                self.violate(format!("{id}: the cause {:?} is not what happened: {real:?}", cause.exit));
            }
        }
    }

    /// After everything has healed.
    pub fn check_end(&mut self, core: &Core) {
        for (request, id) in self.acknowledged.clone() {
            match core.job(id.as_str()) {
                Err(_) => self.violate(format!("{id} was acknowledged (request {request}) and is lost")),
                Ok(job) if !job.state.is_terminal() => {
                    let (state, reason) = (job.state, job.reason.clone());
                    self.violate(format!(
                        "{id} is still {state:?} long after everything has healed: {reason}"
                    ));
                }
                Ok(_) => {}
            }
        }
        if let Some((job, generations)) = self.running.iter().find(|(_, all)| !all.is_empty()) {
            self.violate(format!("ranks of {job} run although it has ended: {generations:?}"));
        }
        if let Some(((machine, gpu), holder)) = self.devices.first_key_value() {
            self.violate(format!("GPU {gpu} of machine {machine} is still held by {holder}"));
        }
    }
}
