//! The schedule's entries, carried out, and their ends.

use muster_core::types::{GangId, Millis};
use muster_core::{Caller, Input};
use rand::RngExt;

use crate::coordinator::{Asked, LEASE};
use crate::machine::Machine;
use crate::schedule::{Fault, MACHINES};
use crate::world::{Event, Submission, World};

impl World {
    pub fn trouble(&mut self, machine: usize) {
        let this = &mut self.machines[machine];
        this.troubled = self.now;
        // What comes of it may come late, if the coordinator is away.
        for shim in this.shims.values() {
            self.truth.taint(&shim.assignment.gang);
        }
    }

    pub fn inject(&mut self, index: usize) {
        let Some(entry) = self.schedule.get(index).cloned() else { return };
        self.faults += 1;
        match entry.fault {
            Fault::Submit(wanted) => {
                let request = format!("r{index}");
                self.submissions.push(Submission { request, wanted, job: None });
                self.submit(self.submissions.len() - 1);
            }
            Fault::Resubmit(job) => {
                if let Some(index) = job.checked_rem(self.submissions.len()) {
                    self.ask_to_submit(index);
                }
            }
            Fault::Cancel(job) => {
                if let Some(id) = self.job(job) {
                    let input = Input::Cancel {
                        by: Caller::trusted(),
                        job: id.to_string(),
                        reason: String::new(),
                        signal: None,
                    };
                    self.ask(Asked::User { caller: u64::MAX, input });
                }
            }
            Fault::Drain { node, timeout } => {
                let (node, reason) = (self.machines[node].name.clone(), String::new());
                let input = Input::Drain { by: None, node, reason, timeout: timeout.map(Millis) };
                self.ask(Asked::User { caller: u64::MAX, input });
            }
            Fault::Uncordon(node) => {
                let node = self.machines[node].name.clone();
                self.ask(Asked::User {
                    caller: u64::MAX,
                    input: Input::SetCordon { by: None, node, cordon: None },
                });
            }
            Fault::KillRank { job, rank, code } => {
                if let Some((machine, pid, index)) = self.rank(job, rank) {
                    let shim = &self.machines[machine].shims[&pid];
                    let gang = shim.assignment.gang.clone();
                    let rank =
                        muster_core::types::Rank(shim.assignment.placement.first_rank.0 + index as u32);
                    self.truth.taint(&gang);
                    let signal = if code.is_none() { Some(9) } else { None };
                    self.after(0, Event::RankEnds { machine, gang, rank, code, signal });
                }
            }
            Fault::Hang(job) => self.hang(job),
            Fault::Quiet { job } => {
                // Some ranks print nothing; others do. On a single node that would be the whole job.
                let parts = self.parts(job);
                if parts.len() > 1
                    // Always the first: two at once could be all.
                    && let Some((machine, pid)) = parts.first().copied()
                {
                    let shim = &self.machines[machine].shims[&pid];
                    let gang = shim.assignment.gang.clone();
                    if shim.assignment.spec.progress_timeout > Millis(0)
                        && !shim.ranks.iter().any(|r| r.hangs)
                    {
                        self.after(0, Event::Quiet { machine, gang: gang.clone(), quiet: true });
                        self.after(3_000, Event::Quiet { machine, gang, quiet: false });
                    }
                }
            }
            Fault::Stuck { job, rank } => {
                if let Some((machine, pid, index)) = self.rank(job, rank)
                    && let Some(shim) = self.machines[machine].shims.get_mut(&pid)
                {
                    shim.ranks[index].unkillable = true;
                }
            }
            Fault::KillShim { job, part } => {
                if let Some((machine, pid)) = self.part(job, part) {
                    let gang = self.machines[machine].shims[&pid].assignment.gang.clone();
                    self.truth.taint(&gang);
                    self.kill_shim(machine, pid);
                }
            }
            Fault::FreezeShim { job, part, ms } => {
                if let Some((machine, pid)) = self.part(job, part)
                    && self.machines[machine].daemon.as_ref().is_some_and(|daemon| !daemon.frozen)
                    && let Some(shim) = self.machines[machine].shims.get_mut(&pid)
                {
                    shim.frozen = true;
                    let gang = shim.assignment.gang.clone();
                    self.truth.taint(&gang);
                    self.after(ms, Event::Ends(index));
                }
            }
            Fault::KillDaemon { node, ms } => self.kill_daemon(node, ms),
            Fault::StopDaemon { node, ms } => {
                self.trouble(node);
                if let Some(daemon) =
                    self.machines[node].daemon.as_mut().filter(|d| d.leaves_for.is_none() && !d.frozen)
                {
                    daemon.leaves_for = Some(ms);
                    self.daemon_input(node, muster_worker_core::Input::Shutdown);
                }
            }
            Fault::FreezeDaemon { node, ms } if self.machines[node].frozen == 0 => {
                self.trouble(node);
                self.thaw_shims(node);
                if let Some(daemon) = &mut self.machines[node].daemon {
                    daemon.frozen = true;
                    self.after(ms, Event::Ends(index));
                }
            }
            Fault::FreezeDaemon { .. } => {}
            Fault::Reboot { node, ms } => {
                if self.machines[node].up {
                    self.power_off(node);
                    self.after(ms, Event::Ends(index));
                }
            }
            Fault::FreezeMachine { node, ms } => {
                self.trouble(node);
                self.freeze_machine(node);
                self.after(ms, Event::Ends(index));
            }
            Fault::Cut { node, up, down, ms } => {
                self.cut(node, up, down);
                self.after(ms, Event::Ends(index));
            }
            Fault::CutAll { ms } => {
                for machine in 0..self.machines.len() {
                    self.cut(machine, true, true);
                }
                self.after(ms, Event::Ends(index));
            }
            Fault::BreakSession(node) => {
                let conn = self.machines[node].daemon.as_ref().map_or(0, |daemon| daemon.conn);
                self.daemon_hears(node, conn, crate::messages::Down::Closed);
            }
            Fault::SlowNetwork { ms } => {
                self.slowed = self.now;
                self.slow_network += 1;
                self.after(ms, Event::Ends(index));
            }
            Fault::KillCoordinator { ms } => {
                self.coordinator.troubled = self.now;
                if self.coordinator.process.is_some() {
                    let reached = self.rng.random_bool(0.5);
                    self.coordinator.kill(reached);
                    // Its kernel ends what it had open.
                    let open = self.machines.iter().filter_map(|machine| Some(machine.daemon.as_ref()?.conn));
                    for conn in open.filter(|conn| *conn > 0).collect::<Vec<_>>() {
                        self.down(conn, &crate::messages::Down::Closed);
                    }
                    self.after(ms, Event::Ends(index));
                }
            }
            Fault::PauseCoordinator { ms } => {
                self.coordinator.troubled = self.now;
                if self.coordinator.paused == 0 {
                    self.coordinator.paused_since = self.now;
                }
                self.coordinator.paused += 1;
                self.after(ms, Event::Ends(index));
            }
            Fault::SetClock { by } => self.coordinator.wall += by,
            Fault::SlowDisk { ms } => {
                self.coordinator.slow_disk += 1;
                self.after(ms, Event::Ends(index));
            }
            Fault::Stranger { node, job } => self.report_as_stranger(node, job),
            Fault::Clone { node, ms } => {
                let (name, rate) = (self.machines[node].name.clone(), self.rng.random_range(-20_000..20_000));
                let machine = self.machines.len();
                if machine < 64 {
                    let clone = Machine::new(name, 100 + node as u8, format!("clone{machine}"), rate, 5_000);
                    self.machines.push(clone);
                    self.machines[node].cloned += 1;
                    self.start_daemon(machine);
                    self.after(ms, Event::Ends(index));
                }
            }
        }
    }

    pub fn fault_ends(&mut self, index: usize) {
        let Some(entry) = self.schedule.get(index).cloned() else { return };
        if self.healing {
            return;
        }
        match entry.fault {
            Fault::FreezeShim { .. } => {
                for machine in 0..self.machines.len() {
                    if self.machines[machine].frozen == 0 {
                        self.thaw_shims(machine);
                    }
                }
            }
            Fault::FreezeDaemon { node, .. } if self.machines[node].frozen == 0 => {
                self.trouble(node);
                self.daemon_thaws(node);
            }
            Fault::Reboot { node, .. } => self.power_on(node),
            Fault::FreezeMachine { node, .. } => {
                self.trouble(node);
                self.thaw_machine(node, false);
            }
            Fault::Cut { node, up, down, .. } => self.mend(node, up, down),
            Fault::CutAll { .. } => {
                for machine in 0..self.machines.len() {
                    self.mend(machine, true, true);
                }
            }
            Fault::SlowNetwork { .. } => {
                self.slowed = self.now;
                self.slow_network -= 1;
            }
            Fault::KillCoordinator { .. } if self.coordinator.process.is_none() => {
                self.coordinator.troubled = self.now;
                let now = self.now;
                self.coordinator.start(now);
                self.flush_coordinator();
            }
            Fault::PauseCoordinator { .. } => self.resume_coordinator(false),
            Fault::SlowDisk { .. } => self.coordinator.slow_disk -= 1,
            Fault::Clone { node, .. } => {
                self.trouble(node);
                self.machines[node].cloned -= 1;
                let name = self.machines[node].name.clone();
                for machine in MACHINES..self.machines.len() {
                    if self.machines[machine].name == name && self.machines[machine].up {
                        self.power_off(machine);
                        break;
                    }
                }
            }
            _ => {}
        }
    }

    fn cut(&mut self, machine: usize, up: bool, down: bool) {
        self.trouble(machine);
        self.machines[machine].cut_up += u32::from(up);
        self.machines[machine].cut_down += u32::from(down);
    }

    fn mend(&mut self, machine: usize, up: bool, down: bool) {
        self.trouble(machine);
        let this = &mut self.machines[machine];
        this.cut_up = this.cut_up.saturating_sub(u32::from(up));
        this.cut_down = this.cut_down.saturating_sub(u32::from(down));
    }

    fn kill_daemon(&mut self, machine: usize, ms: u64) {
        self.machines[machine].restarted = self.now;
        // A daemon that is back soon has done no harm to any rank.
        if ms > LEASE / 5 {
            self.trouble(machine);
            self.machines[machine].away = true;
        }
        // Nobody watches a frozen shim while there is no daemon: two faults at once, against which nothing helps.
        self.thaw_shims(machine);
        if let Some(daemon) = self.machines[machine].daemon.take() {
            if daemon.conn > 0 {
                self.up(machine, daemon.conn, &crate::messages::Up::Closed);
            }
            self.after(ms, Event::StartDaemon { machine });
        }
    }

    pub fn power_off(&mut self, machine: usize) {
        self.trouble(machine);
        let this = &mut self.machines[machine];
        this.up = false;
        this.daemon = None;
        let pids: Vec<i32> = this.shims.keys().copied().collect();
        for pid in pids {
            self.kill_shim(machine, pid);
        }
    }

    pub fn power_on(&mut self, machine: usize) {
        self.trouble(machine);
        let now = self.now;
        let this = &mut self.machines[machine];
        this.up = true;
        this.boots += 1;
        this.frozen = 0;
        // The first processes of a boot have the same ids each time.
        this.next_pid = 0;
        this.foreign = (1..20).map(|pid| (pid, now)).collect();
        self.after(50, Event::StartDaemon { machine });
    }

    fn freeze_machine(&mut self, machine: usize) {
        let this = &mut self.machines[machine];
        this.frozen += 1;
        if let Some(daemon) = &mut this.daemon {
            daemon.frozen = true;
        }
        for shim in this.shims.values_mut() {
            shim.frozen = true;
            let gang = shim.assignment.gang.clone();
            self.truth.taint(&gang);
            for rank in shim.ranks.iter_mut().filter(|rank| rank.executes) {
                // It executes nothing while it is frozen.
                rank.executes = false;
                rank.hangs = true;
                self.truth.stops(&gang);
            }
        }
    }

    pub fn thaw_machine(&mut self, machine: usize, all: bool) {
        let this = &mut self.machines[machine];
        if this.frozen == 0 {
            return;
        }
        this.frozen = if all { 0 } else { this.frozen - 1 };
        if this.frozen > 0 {
            return;
        }
        // A shim looks at its deadlines first; what is then still to live goes on.
        self.thaw_ranks(machine);
        self.thaw_shims(machine);
        self.daemon_thaws(machine);
    }

    fn thaw_shims(&mut self, machine: usize) {
        let frozen = self.machines[machine].shims.iter().filter(|(_, shim)| shim.frozen);
        let frozen: Vec<i32> = frozen.map(|(pid, _)| *pid).collect();
        for pid in frozen {
            self.shim_thaws(machine, pid);
        }
    }

    fn hang(&mut self, job: usize) {
        for (machine, pid) in self.parts(job) {
            let Some(shim) = self.machines[machine].shims.get_mut(&pid) else { continue };
            let progress = shim.assignment.spec.progress_timeout;
            let gang = shim.assignment.gang.clone();
            if progress == Millis(0) {
                return;
            }
            shim.ranks.iter_mut().for_each(|rank| rank.hangs = true);
            self.truth.taint(&gang);
            self.after(progress.0, Event::Quiet { machine, gang, quiet: true });
        }
    }

    fn job(&self, index: usize) -> Option<muster_core::types::JobId> {
        self.submissions.get(index.checked_rem(self.submissions.len())?)?.job.clone()
    }

    /// Machines and shims where ranks of a job run, in order. `job` counts from the newest.
    pub fn parts(&self, job: usize) -> Vec<(usize, i32)> {
        let running = self.submissions.iter().rev().filter_map(|submission| {
            let id = submission.job.as_ref()?;
            let all = self.machines.iter().enumerate().flat_map(|(machine, this)| {
                let of_job = |shim: &crate::machine::Shim| {
                    shim.assignment.gang.job == *id && shim.ranks.iter().any(|rank| rank.executes)
                };
                let here = this.shims.iter().filter(move |(_, shim)| of_job(shim));
                here.map(move |(pid, _)| (machine, *pid)).collect::<Vec<_>>()
            });
            let all: Vec<_> = all.collect();
            (!all.is_empty()).then_some(all)
        });
        let all: Vec<_> = running.collect();
        job.checked_rem(all.len()).map(|index| all[index].clone()).unwrap_or_default()
    }

    fn part(&self, job: usize, part: usize) -> Option<(usize, i32)> {
        let parts = self.parts(job);
        parts.get(part.checked_rem(parts.len())?).copied()
    }

    fn rank(&self, job: usize, rank: usize) -> Option<(usize, i32, usize)> {
        let (machine, pid) = self.part(job, rank / 2)?;
        let ranks = self.machines[machine].shims[&pid].ranks.len();
        Some((machine, pid, rank % ranks))
    }

    fn thaw_ranks(&mut self, machine: usize) {
        let now = self.local(machine);
        let mut on: Vec<(GangId, u32)> = Vec::new();
        for shim in self.machines[machine].shims.values_mut() {
            let dead =
                shim.kill_at.is_some_and(|at| at <= now) || shim.fence.is_some_and(|fence| fence.kill <= now);
            for rank in shim.ranks.iter_mut().filter(|rank| rank.hangs && !rank.held && rank.exit.is_none()) {
                rank.hangs = false;
                rank.executes = true;
                on.push((shim.assignment.gang.clone(), u32::from(dead)));
            }
        }
        for (gang, dead) in on {
            self.truth.goes_on(&gang, dead > 0);
        }
    }
}
