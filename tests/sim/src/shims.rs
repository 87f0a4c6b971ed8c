//! Shims and ranks: processes that the daemon commands and that outlive it.

use muster_core::bugs::{Bug, planted};
use muster_core::types::{Assignment, GangId, Millis, Rank, RankExit, RankProgress};
use muster_worker_core::{Fence, Input, ShimRecord};
use rand::RngExt;

use crate::machine::{self, Record, Shim, Told};
use crate::world::{Event, World};

/// Time that the kernel has to let go of killed ranks before a shim says that it does not.
const HELD_AFTER: u64 = 10_000;

impl World {
    pub fn start_shim(&mut self, machine: usize, assignment: Assignment) {
        let gang = assignment.gang.clone();
        let this = &mut self.machines[machine];
        let (pid, start_time) = (this.new_pid(), self.now);
        let shim = ShimRecord { boot_id: this.boot_id(), pid, start_time };
        let record = Record { shim, assignment: assignment.clone(), launched: false, last: None };
        this.disk.insert(gang.clone(), record);
        let ranks = vec![machine::Rank::default(); assignment.placement.procs as usize];
        this.shims.insert(
            pid,
            Shim {
                assignment,
                start_time,
                launched: false,
                ranks,
                frozen: false,
                fence: None,
                fenced: false,
                kill_at: None,
                told: std::collections::VecDeque::new(),
            },
        );
        let takes = 1 + self.up_to(50);
        self.after(takes, Event::Prepared { machine, gang });
    }

    pub fn shim_prepared(&mut self, machine: usize, gang: &GangId) {
        let Some(pid) = self.machines[machine].pid_of(gang) else { return };
        let shim = &self.machines[machine].shims[&pid];
        if shim.launched || shim.frozen {
            return;
        }
        let port = (shim.assignment.placement.group_rank == 0).then_some(29500);
        self.truth.prepared(gang, machine);
        self.daemon_input(machine, Input::Prepared(gang.clone(), port));
    }

    /// The daemon tells a shim; a frozen one hears it when it goes on.
    pub fn tell_shim(&mut self, machine: usize, gang: &GangId, told: Told) {
        let Some(pid) = self.machines[machine].pid_of(gang) else {
            // The daemon finds that its shim is dead.
            return self.daemon_later(machine, gang);
        };
        let Some(shim) = self.machines[machine].shims.get_mut(&pid) else { return };
        if shim.frozen {
            return shim.told.push_back(told);
        }
        match told {
            Told::Launch(assignment, fence) => self.launch(machine, pid, &assignment, fence),
            Told::Stop(grace) => self.stop(machine, pid, grace),
            Told::Fence(fence) => {
                if let Some(shim) = self.machines[machine].shims.get_mut(&pid).filter(|shim| !shim.fenced) {
                    shim.fence = Some(fence);
                }
            }
        }
        self.arm_shim(machine, pid);
    }

    fn daemon_later(&mut self, machine: usize, gang: &GangId) {
        let known = self.machines[machine].disk.contains_key(gang);
        if known {
            self.daemon_input(machine, Input::Failed(gang.clone(), "its shim was killed".to_owned()));
        }
    }

    fn launch(&mut self, machine: usize, pid: i32, assignment: &Assignment, fence: Option<Fence>) {
        let gang = assignment.gang.clone();
        let now = self.local(machine);
        let this = &mut self.machines[machine];
        let fresh = this.markers.insert(gang.clone()) || planted(Bug::OldGenerationLaunches);
        let Some(shim) = this.shims.get_mut(&pid).filter(|shim| !shim.launched && shim.kill_at.is_none())
        else {
            return;
        };
        if !fresh || fence.is_some_and(|fence| fence.term <= now) {
            // Too late, or not for the first time: nothing of it may run.
            self.end_shim(machine, pid);
            return self.daemon_input(machine, Input::Failed(gang, "it was not launched in time".to_owned()));
        }
        (shim.launched, shim.fence, shim.assignment) = (true, fence, assignment.clone());
        for rank in &mut shim.ranks {
            rank.executes = true;
        }
        if let Some(record) = this.disk.get_mut(&gang) {
            (record.launched, record.assignment) = (true, assignment.clone());
        }
        let first = assignment.placement.first_rank.0;
        let ranks: Vec<Rank> = (first..first + assignment.placement.procs).map(Rank).collect();
        self.truth.launch(&gang, machine, assignment.group_world_size, &ranks, &assignment.placement.gpus);
        self.daemon_input(machine, Input::Launched(gang.clone()));
        self.schedule_work(machine, &gang, &ranks);
    }

    /// What the program does: it ends after its work, well or not.
    fn schedule_work(&mut self, machine: usize, gang: &GangId, ranks: &[Rank]) {
        let wanted =
            self.submissions.iter().find(|s| s.job.as_ref() == Some(&gang.job)).map(|s| s.wanted.clone());
        let (work, failures) = wanted.map_or((1_000, 0), |wanted| (wanted.work, wanted.failures));
        let work = if self.healing { work.min(20_000) } else { work };
        for rank in ranks {
            let fails = !self.healing && gang.generation.0 <= failures && rank.0 == 0;
            let (code, after) = if fails { (1, work / 4) } else { (0, work + self.up_to(200)) };
            if fails {
                self.truth.taint(gang);
            }
            let (gang, rank) = (gang.clone(), *rank);
            self.after(after, Event::RankEnds { machine, gang, rank, code: Some(code), signal: None });
        }
    }

    /// A rank ends, by itself or by a signal.
    pub fn rank_ends(
        &mut self,
        machine: usize,
        gang: &GangId,
        rank: Rank,
        code: Option<i32>,
        signal: Option<i32>,
    ) {
        let this = &mut self.machines[machine];
        let Some(pid) = this.pid_of(gang) else { return };
        if this.frozen > 0 {
            let (gang, later) = (gang.clone(), 500 + self.up_to(500));
            return self.after(later, Event::RankEnds { machine, gang, rank, code, signal });
        }
        let Some(shim) = this.shims.get_mut(&pid) else { return };
        let index = (rank.0 - shim.assignment.placement.first_rank.0) as usize;
        let Some(state) = shim.ranks.get_mut(index).filter(|state| state.executes) else { return };
        if signal.is_none() && state.hangs && !self.healing {
            return;
        }
        state.executes = false;
        let exit = exit_of(rank, code, signal, Millis(self.now));
        state.exit = Some(exit.clone());
        self.truth.stops(gang);
        self.truth.exits(gang, &exit);
        if !self.machines[machine].shims[&pid].frozen {
            self.shim_says(machine, pid, vec![exit]);
        }
    }

    /// Tells the daemon, and ends if nothing is left to tell.
    fn shim_says(&mut self, machine: usize, pid: i32, exits: Vec<RankExit>) {
        let Some(shim) = self.machines[machine].shims.get(&pid) else { return };
        let (gang, over) = (shim.assignment.gang.clone(), shim.is_over());
        for exit in exits {
            self.daemon_input(machine, Input::Exited(gang.clone(), exit));
        }
        if over {
            self.shim_over(machine, pid);
        }
    }

    /// Every rank has ended. With a daemon it is told; without one the shim writes it down.
    fn shim_over(&mut self, machine: usize, pid: i32) {
        let this = &mut self.machines[machine];
        let Some(shim) = this.shims.get(&pid) else { return };
        let gang = shim.assignment.gang.clone();
        let exits = shim.ranks.iter().filter_map(|rank| rank.exit.clone()).collect();
        if let Some(record) = this.disk.get_mut(&gang) {
            record.last = Some(exits);
        }
        self.end_shim(machine, pid);
        self.daemon_input(machine, Input::Gone(gang));
    }

    /// The shim's process ends; its id may soon be another's.
    fn end_shim(&mut self, machine: usize, pid: i32) {
        let reused = self.rng.random_bool(0.5);
        let now = self.now;
        let this = &mut self.machines[machine];
        let Some(shim) = this.shims.remove(&pid) else { return };
        if reused {
            this.foreign.insert(pid, now + 1);
        }
        self.truth.gone(&shim.assignment.gang, machine);
    }

    fn stop(&mut self, machine: usize, pid: i32, grace: Millis) {
        let now = self.local(machine);
        let ignores = self.ignores_stop(machine, pid);
        let Some(shim) = self.machines[machine].shims.get_mut(&pid) else { return };
        let gang = shim.assignment.gang.clone();
        if !shim.launched {
            self.end_shim(machine, pid);
            return self.daemon_input(machine, Input::Gone(gang));
        }
        let at = now.plus(grace);
        shim.kill_at = Some(shim.kill_at.map_or(at, |before| before.min(at)));
        if !ignores {
            self.signal_ranks(machine, pid, 15, 2_000);
        }
    }

    fn ignores_stop(&self, machine: usize, pid: i32) -> bool {
        let Some(shim) = self.machines[machine].shims.get(&pid) else { return false };
        let job = &shim.assignment.gang.job;
        self.submissions.iter().any(|s| s.job.as_ref() == Some(job) && s.wanted.ignores_stop)
    }

    fn signal_ranks(&mut self, machine: usize, pid: i32, signal: i32, within: u64) {
        let Some(shim) = self.machines[machine].shims.get(&pid) else { return };
        let (gang, first) = (shim.assignment.gang.clone(), shim.assignment.placement.first_rank.0);
        for index in 0..shim.ranks.len() as u32 {
            let (gang, rank, after) = (gang.clone(), Rank(first + index), self.up_to(within));
            self.after(after, Event::RankEnds { machine, gang, rank, code: None, signal: Some(signal) });
        }
    }

    /// SIGKILL to everything: it executes nothing from here on, whether the kernel lets go of it or not.
    fn kill_ranks(&mut self, machine: usize, pid: i32) {
        let now = Millis(self.now);
        let Some(shim) = self.machines[machine].shims.get_mut(&pid) else { return };
        shim.kill_at = None;
        (shim.fence, shim.fenced) = (None, true);
        let (gang, first) = (shim.assignment.gang.clone(), shim.assignment.placement.first_rank.0);
        let (mut exits, mut stopped) = (Vec::new(), 0);
        for (rank, state) in (first..).zip(&mut shim.ranks).filter(|(_, state)| state.executes) {
            state.executes = false;
            stopped += 1;
            if state.unkillable {
                state.held = true;
                continue;
            }
            let exit = exit_of(Rank(rank), None, Some(9), now);
            state.exit = Some(exit.clone());
            exits.push(exit);
        }
        let (holds, frozen) = (shim.holds(), shim.frozen);
        for _ in 0..stopped {
            self.truth.stops(&gang);
        }
        for exit in &exits {
            self.truth.exits(&gang, exit);
        }
        if !frozen {
            self.shim_says(machine, pid, exits);
        }
        if holds {
            self.after(HELD_AFTER, Event::StillHeld { machine, gang: gang.clone() });
            let later = 1_000 + self.up_to(120_000);
            self.after(later, Event::LetsGo { machine, gang });
        }
    }

    pub fn still_held(&mut self, machine: usize, gang: &GangId) {
        let Some(pid) = self.machines[machine].pid_of(gang) else { return };
        let shim = &self.machines[machine].shims[&pid];
        if shim.holds() && !shim.frozen {
            self.daemon_input(machine, Input::Killed(gang.clone()));
        }
    }

    pub fn lets_go(&mut self, machine: usize, gang: &GangId) {
        let now = Millis(self.now);
        let Some(pid) = self.machines[machine].pid_of(gang) else { return };
        let Some(shim) = self.machines[machine].shims.get_mut(&pid) else { return };
        let first = shim.assignment.placement.first_rank.0;
        let mut exits = Vec::new();
        for (rank, state) in (first..).zip(&mut shim.ranks).filter(|(_, state)| state.held) {
            let exit = exit_of(Rank(rank), None, Some(9), now);
            (state.held, state.exit) = (false, Some(exit.clone()));
            exits.push(exit);
        }
        for exit in &exits {
            self.truth.exits(gang, exit);
        }
        self.shim_says(machine, pid, exits);
    }

    /// The shim is killed, and its ranks with it.
    pub fn kill_shim(&mut self, machine: usize, pid: i32) {
        let Some(shim) = self.machines[machine].shims.get(&pid) else { return };
        let gang = shim.assignment.gang.clone();
        let running = shim.ranks.iter().filter(|rank| rank.executes).count();
        self.end_shim(machine, pid);
        for _ in 0..running {
            self.truth.stops(&gang);
        }
        self.daemon_input(machine, Input::Failed(gang, "its shim was killed".to_owned()));
    }

    /// Sets the timer of a shim's next deadline.
    fn arm_shim(&mut self, machine: usize, pid: i32) {
        let this = &self.machines[machine];
        if let Some(at) = this.shims.get(&pid).and_then(Shim::deadline) {
            let at = this.when(self.now, at);
            self.at(at, Event::ShimDue { machine, pid });
        }
    }

    /// A deadline of a shim may have passed.
    pub fn shim_due(&mut self, machine: usize, pid: i32) {
        let now = self.local(machine);
        let Some(shim) = self.machines[machine].shims.get_mut(&pid).filter(|shim| !shim.frozen) else {
            return;
        };
        let fence = shim.fence.filter(|_| shim.launched);
        if shim.kill_at.is_some_and(|at| at <= now) || fence.is_some_and(|fence| fence.kill <= now) {
            let (gang, by_fence) =
                (shim.assignment.gang.clone(), fence.is_some_and(|fence| fence.kill <= now));
            if by_fence {
                self.daemon_input(machine, Input::Fenced(gang));
            }
            self.kill_ranks(machine, pid);
        } else if fence.is_some_and(|fence| fence.term <= now) && !shim.fenced {
            shim.fenced = true;
            let gang = shim.assignment.gang.clone();
            self.daemon_input(machine, Input::Fenced(gang));
            if !self.ignores_stop(machine, pid) {
                self.signal_ranks(machine, pid, 15, 2_000);
            }
        }
        self.arm_shim(machine, pid);
    }

    /// A frozen shim goes on: it looks at its deadlines before anything else.
    pub fn shim_thaws(&mut self, machine: usize, pid: i32) {
        let Some(shim) = self.machines[machine].shims.get_mut(&pid) else { return };
        shim.frozen = false;
        let told = std::mem::take(&mut shim.told);
        let gang = shim.assignment.gang.clone();
        self.shim_due(machine, pid);
        self.shim_prepared(machine, &gang);
        for told in told {
            self.tell_shim(machine, &gang, told);
        }
        // Exits that nobody has heard of.
        let Some(shim) = self.machines[machine].shims.get(&pid) else { return };
        let exits: Vec<RankExit> = shim.ranks.iter().filter_map(|rank| rank.exit.clone()).collect();
        self.shim_says(machine, pid, exits);
        self.arm_shim(machine, pid);
    }

    /// None of the gang's ranks on this machine shows progress, or one does again.
    pub fn quiet(&mut self, machine: usize, gang: &GangId, quiet: bool) {
        let Some(pid) = self.machines[machine].pid_of(gang) else { return };
        let shim = &self.machines[machine].shims[&pid];
        let first = shim.assignment.placement.first_rank.0;
        let silent = shim.assignment.spec.progress_timeout;
        let progress = |index| RankProgress { rank: Rank(first + index), step: None, silent, state: 'S' };
        let ranks = if quiet { (0..shim.ranks.len() as u32).map(progress).collect() } else { Vec::new() };
        if !shim.frozen && shim.launched {
            self.daemon_input(machine, Input::Quiet(gang.clone(), ranks));
        }
    }
}

fn exit_of(rank: Rank, code: Option<i32>, signal: Option<i32>, time: Millis) -> RankExit {
    RankExit { rank, code, signal, time, stderr_tail: String::new(), out_of_memory: false, error: None }
}
