//! A node that reports of what it does not hold, and what must come of it: nothing.

use muster_core::Input;
use muster_core::types::{GangId, GangReport, Millis, NodeName, ObservedPhase, Rank, RankExit, Session};
use rand::RngExt;

use crate::coordinator::Process;
use crate::messages::Up;
use crate::truth::Truth;
use crate::world::World;

impl World {
    /// Says that a job's gang has ended, over the session of a machine that holds no part of it.
    pub fn report_as_stranger(&mut self, machine: usize, job: usize) {
        let Some(conn) = self.machines[machine].daemon.as_ref().map(|d| d.conn).filter(|conn| *conn > 0)
        else {
            return;
        };
        let Some((runs_on, pid)) = self.parts(job).first().copied() else { return };
        let id = self.machines[runs_on].shims[&pid].assignment.gang.job.clone();
        let Some(process) = &self.coordinator.process else { return };
        let Ok(job) = process.core.job(id.as_str()) else { return };
        if job.placements().iter().any(|part| part.node.as_str() == self.machines[machine].name) {
            return;
        }
        let (gang, ranks) = (job.gang_id(), job.world_size());
        let code = i32::from(self.rng.random_bool(0.5));
        let exit = |rank| RankExit {
            rank: Rank(rank),
            code: Some(code),
            signal: None,
            time: Millis(0),
            stderr_tail: String::new(),
            out_of_memory: false,
            error: None,
        };
        let report = GangReport {
            gang,
            phase: ObservedPhase::Stopped,
            master_port: Some(1),
            exits: (0..ranks).map(exit).collect(),
            error: None,
            quiet: Vec::new(),
            processes: Vec::new(),
            rendezvous: None,
            surroundings: None,
        };
        self.up(machine, conn, &Up::Report(Box::new(report)));
    }
}

impl Process {
    /// Takes a report. Returns whether it has changed something that others see.
    pub fn hears(
        &mut self,
        now: u64,
        wall: i64,
        (node, session): (NodeName, Session),
        report: Box<GangReport>,
        truth: &mut Truth,
    ) -> bool {
        // A sign of life, too.
        self.beats(now, wall, session);
        let gang = report.gang.clone();
        let before = self.seen_by_stranger(&node, &gang);
        let stepped = self.step(now, wall, Input::Report { node: node.clone(), session, report }, None);
        if before != self.seen_by_stranger(&node, &gang) {
            truth.violate(format!("{node} does not hold {gang}, and has changed its job"));
        }
        stepped.acted
    }

    /// The gang's job as it is, if the node never held a part of the gang; else none.
    fn seen_by_stranger(&self, node: &NodeName, gang: &GangId) -> Option<String> {
        let job = self.core.job(gang.job.as_str()).ok()?;
        let leftover =
            self.core.node(node.as_str()).is_ok_and(|node| node.reserved.leftovers.contains_key(gang));
        let job = Some(job).filter(|job| !leftover && job.part_of(node, gang.generation).is_none())?;
        Some(format!("{job:?}"))
    }
}
