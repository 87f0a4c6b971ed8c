//! A job and its gang, as stored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bugs::{Bug, planted};
use crate::types::text::REDACTED;
use crate::types::{
    Assignment, DesiredPhase, GangId, Generation, JobId, JobSpec, Millis, NodeName, NodePlacement, Owner,
    RankExit, RankProgress, RendezvousReport, RequestId, StopSignal, Surroundings,
};

/// Past generations kept with a job, so that their logs can still be found: a bound on the record's size.
pub const PAST_GENERATIONS_MAX: usize = 8;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JobState {
    /// Waiting for nodes.
    Queued,
    /// Placed; being prepared and launched.
    Starting,
    /// Every rank was launched.
    Running,
    /// Stopping after a fault, or waiting to be placed again.
    Restarting,
    /// Stopping for good.
    Stopping,
    /// Every rank ended with exit code 0.
    Succeeded,
    /// Ended by a fault.
    Failed,
    /// Ended by a cancel.
    Cancelled,
}

impl JobState {
    /// Whether the state never changes again.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Queued | Self::Starting | Self::Running | Self::Restarting | Self::Stopping => false,
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
        }
    }
}

/// A submitted job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Identity.
    pub id: JobId,
    /// Position among all submissions; the queue's order among equal priorities.
    pub order: u64,
    /// Who submitted it, where that was known.
    #[serde(default)]
    pub owner: Option<Owner>,
    /// Who cancelled it last, where that was known.
    #[serde(default)]
    pub cancelled_by: Option<Owner>,
    /// The owner's id for the submission.
    pub request_id: Option<RequestId>,
    /// What was asked for.
    pub spec: JobSpec,
    /// Where it is in its life.
    pub state: JobState,
    /// Current or last start; 0 before the first.
    pub generation: Generation,
    /// Restarts spent.
    pub restarts_used: u32,
    /// Why it is where it is.
    pub reason: String,
    /// The part of the reason that a rank or its node wrote, if it is there still.
    #[serde(default)]
    pub quoted: Option<String>,
    /// The gang while the job holds nodes.
    pub gang: Option<Gang>,
    /// The failure that ended the current or last generation.
    pub exit: Option<RootCause>,
    /// Generations that have ended, oldest first, the last one included once the gang is gone.
    pub past: Vec<PastGeneration>,
    /// When it was stored.
    pub created: Millis,
    /// When every rank of the first generation ran.
    pub started: Option<Millis>,
    /// When it reached its last state.
    pub finished: Option<Millis>,
    /// Not to be placed again before this.
    pub not_before: Millis,
    /// When it starts with the nodes that are there, once the fewest are. Not stored: whoever loads it waits anew.
    #[serde(skip)]
    pub last_call_ends: Option<Millis>,
    /// Generations that ended because another program took the master port.
    #[serde(default)]
    pub port_retries: u32,
}

/// The rank whose exit ended a generation: the first failure observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootCause {
    /// Generation it belonged to.
    pub generation: Generation,
    /// Node it ran on.
    pub node: NodeName,
    /// How it ended.
    pub exit: RankExit,
}

/// A generation that has ended, and where its logs are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PastGeneration {
    /// Which start.
    pub generation: Generation,
    /// Its nodes in rank order.
    pub placements: Vec<NodePlacement>,
    /// What ended it, in words.
    #[serde(default)]
    pub reason: String,
    /// Part of the reason that a rank or its node wrote, which may quote the command, its variables or its output.
    #[serde(default)]
    pub quoted: Option<String>,
    /// When it was placed.
    #[serde(default)]
    pub placed: Millis,
    /// When nothing of it ran any more.
    #[serde(default)]
    pub ended: Millis,
}

/// How a gang that is being stopped ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Fail,
    Restart,
    /// As Restart, by somebody's will: the budget is not spent.
    Move,
    Cancel,
}

/// All ranks of a job, placed as one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Gang {
    /// The nodes in rank order: rank 0's node first, ranks contiguous on each.
    pub placements: Vec<NodePlacement>,
    /// What every node shall do.
    pub desired: DesiredPhase,
    /// Port that rank 0's node chose.
    pub master_port: Option<u16>,
    pub(crate) outcome: Option<Outcome>,
    /// When this generation was placed.
    pub placed: Millis,
    /// Time to stop in, if it is not the spec's.
    #[serde(default)]
    pub(crate) stop_grace: Option<Millis>,
    /// Asks them to end, if it is not what the spec says: whoever cancelled the job said so.
    #[serde(default)]
    pub(crate) stop_signal: Option<StopSignal>,
    /// It hangs: stacks are written before it is stopped.
    #[serde(default)]
    pub(crate) dump_stacks: bool,
    /// What each node reported, by group rank. Not stored: nodes report everything when they reconnect, so
    /// a gang of n nodes costs a handful of writes rather than n.
    #[serde(skip)]
    pub(crate) observed: Vec<Observed>,
    #[serde(skip)]
    pub(crate) counts: Counts,
    /// Nodes, by group rank, none of whose ranks shows progress.
    #[serde(skip)]
    pub(crate) quiet: BTreeMap<usize, Vec<RankProgress>>,
    /// The processes of each node's ranks, by group rank.
    #[serde(skip)]
    pub(crate) processes: BTreeMap<usize, Vec<u32>>,
    /// What each node adds to the environment of its ranks, by group rank.
    #[serde(skip)]
    pub(crate) surroundings: BTreeMap<usize, Box<Surroundings>>,
    /// What the ranks' store shows while some do not get on there. Nothing is decided by it.
    #[serde(skip)]
    pub(crate) rendezvous: Option<Box<RendezvousReport>>,
}

/// Where a node's part of a gang is, as far as the coordinator knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Observed {
    #[default]
    Unknown,
    Prepared,
    Running,
    /// Every rank was killed, and the kernel holds some.
    Killed,
    /// No rank runs and none will: reported, or the node is gone.
    Stopped,
}

/// How many nodes have come at least this far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub prepared: usize,
    pub running: usize,
    pub killed: usize,
    pub stopped: usize,
}

impl Gang {
    pub(crate) fn new(placements: Vec<NodePlacement>, now: Millis) -> Self {
        let observed = vec![Observed::Unknown; placements.len()];
        Self {
            placements,
            desired: DesiredPhase::Prepared,
            master_port: None,
            outcome: None,
            placed: now,
            stop_grace: None,
            stop_signal: None,
            dump_stacks: false,
            observed,
            counts: Counts::default(),
            quiet: BTreeMap::new(),
            processes: BTreeMap::new(),
            surroundings: BTreeMap::new(),
            rendezvous: None,
        }
    }

    /// After loading: nothing has been observed yet.
    pub(crate) fn reset_observed(&mut self) {
        self.observed = vec![Observed::Unknown; self.placements.len()];
        self.counts = Counts::default();
        self.quiet.clear();
        self.processes.clear();
        self.surroundings.clear();
        self.rendezvous = None;
    }

    /// A node begins a session: what it says now is all there is to know.
    pub(crate) fn forget_observed(&mut self, group_rank: usize) {
        let before = std::mem::take(&mut self.observed[group_rank]);
        let reached = |at: Observed| usize::from(at <= before);
        self.counts.prepared -= reached(Observed::Prepared);
        self.counts.running -= reached(Observed::Running);
        self.counts.killed -= reached(Observed::Killed);
        self.counts.stopped -= reached(Observed::Stopped);
    }

    /// Moves a node forward; a report that is behind what is known changes nothing.
    pub(crate) fn observe(&mut self, group_rank: usize, seen: Observed) -> bool {
        let before = self.observed[group_rank];
        if seen <= before {
            return false;
        }
        self.observed[group_rank] = seen;
        let reached = |at: Observed| usize::from(before < at && at <= seen);
        self.counts.prepared += reached(Observed::Prepared);
        self.counts.running += reached(Observed::Running);
        self.counts.killed += reached(Observed::Killed);
        self.counts.stopped += reached(Observed::Stopped);
        true
    }

    pub(crate) fn all_prepared(&self) -> bool {
        self.counts.prepared == self.placements.len()
    }

    pub(crate) fn all_running(&self) -> bool {
        self.counts.running == self.placements.len()
    }

    /// Whether no rank executes anything any more.
    pub(crate) fn all_ended(&self) -> bool {
        let ended = self.counts.killed;
        ended == self.placements.len() || (planted(Bug::OneStoppedIsAll) && ended > 0)
    }

    pub(crate) fn set_quiet(&mut self, group_rank: usize, ranks: &[RankProgress]) {
        if ranks.is_empty() {
            self.quiet.remove(&group_rank);
        } else {
            self.quiet.insert(group_rank, ranks.to_vec());
        }
    }
}

impl PastGeneration {
    /// Returns the reason without what a rank or its node wrote.
    pub fn reason_redacted(&self) -> String {
        without(&self.reason, self.quoted.as_deref())
    }
}

fn without(reason: &str, quoted: Option<&str>) -> String {
    let quoted = quoted.filter(|quoted| !quoted.is_empty());
    let cut = |quoted| reason.replace(&format!(": {quoted}"), &format!(": {REDACTED}"));
    quoted.map_or_else(|| reason.to_owned(), cut)
}

impl Job {
    /// Notes the first start. Not before it was made: a coordinator may come back on a clock that was set back.
    pub(crate) fn begin(&mut self, now: Millis) {
        self.started = self.started.or(Some(now.max(self.created)));
    }

    /// Notes the end, for the same reason not before the start, and gives it.
    pub(crate) fn finish(&mut self, now: Millis) -> Millis {
        let finished = now.max(self.started.unwrap_or(self.created));
        self.finished = Some(finished);
        finished
    }

    /// Returns the reason without what a rank or its node wrote.
    pub fn reason_redacted(&self) -> String {
        without(&self.reason, self.quoted.as_deref())
    }

    /// Whether it waits for nodes, or for the time at which it may have some.
    pub fn waits(&self) -> bool {
        self.gang.is_none() && !self.state.is_terminal()
    }

    /// The current gang's id.
    pub fn gang_id(&self) -> GangId {
        GangId { job: self.id.clone(), generation: self.generation }
    }

    /// Nodes of the current or last generation, in rank order.
    pub fn placements(&self) -> &[NodePlacement] {
        match (&self.gang, self.past.last()) {
            (Some(gang), _) => &gang.placements,
            (None, Some(past)) => &past.placements,
            (None, None) => &[],
        }
    }

    /// Returns the part that a node has or had in a generation, while that one is still known.
    pub fn part_of(&self, node: &NodeName, generation: Generation) -> Option<&NodePlacement> {
        self.placements_of(generation)?.iter().find(|placement| placement.node == *node)
    }

    /// Nodes of one generation, if it is still known.
    pub fn placements_of(&self, generation: Generation) -> Option<&[NodePlacement]> {
        if self.gang.is_some() && generation == self.generation {
            return Some(self.placements());
        }
        let past = self.past.iter().find(|past| past.generation == generation)?;
        Some(&past.placements)
    }

    /// Ranks of the current or last generation.
    pub fn world_size(&self) -> u32 {
        self.placements().iter().map(|p| p.procs).sum()
    }

    /// What nodes of the current gang add to the environment of their ranks, as far as they have said: those that add the
    /// same together, in the order of their first ranks.
    pub fn environments(&self) -> Vec<(&Surroundings, Vec<&NodeName>)> {
        let Some(gang) = &self.gang else { return Vec::new() };
        let mut groups: BTreeMap<&Surroundings, Vec<usize>> = BTreeMap::new();
        for (group_rank, surroundings) in &gang.surroundings {
            groups.entry(surroundings).or_default().push(*group_rank);
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort_by_key(|(_, nodes)| nodes.first().copied());
        let name = |group_rank: usize| gang.placements.get(group_rank).map(|placement| &placement.node);
        groups.into_iter().map(|(what, nodes)| (what, nodes.into_iter().filter_map(name).collect())).collect()
    }

    /// MASTER_ADDR and MASTER_PORT of the current gang, once known.
    pub fn master(&self) -> Option<(std::net::IpAddr, u16)> {
        let gang = self.gang.as_ref()?;
        Some((gang.placements.first()?.address, gang.master_port?))
    }

    /// What the node of `group_rank` shall do, if the job has a gang.
    pub fn assignment(&self, group_rank: usize) -> Option<Assignment> {
        let gang = self.gang.as_ref()?;
        Some(self.assignment_as(gang.placements.get(group_rank)?, gang.desired))
    }

    pub(crate) fn assignment_as(&self, placement: &NodePlacement, phase: DesiredPhase) -> Assignment {
        let stop = self.stop_mode(self.gang.as_ref());
        let first = self.placements().first().unwrap_or(placement);
        Assignment {
            gang: self.gang_id(),
            phase,
            spec: self.spec.clone(),
            placement: placement.clone(),
            world_size: self.world_size(),
            group_world_size: self.placements().len() as u32,
            master_addr: first.address,
            master_port: self.gang.as_ref().and_then(|gang| gang.master_port),
            restart_count: self.restarts_used,
            stop,
        }
    }
}
