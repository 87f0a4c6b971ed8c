//! The cluster before the faults and after them, and its users.

use muster_core::types::{CoordinatorLoss, JobSpec, Millis, Owner, RequestId, Resources};
use muster_core::{Caller, Input, Job, Refusal, Reply, Rights};
use rand::RngExt;

use crate::coordinator::{Asked, LEASE};
use crate::machine::Machine;
use crate::schedule::{MACHINES, Wanted};
use crate::world::{Event, Submission, World};

/// Users whose the jobs are.
const OWNERS: usize = 3;
/// A user who has no answer asks again.
const RETRY: u64 = 2_000;
/// A machine that was in trouble may be the cause of what happens this long after: leases end, timeouts pass.
const AFTERMATH: u64 = 4 * LEASE;

impl World {
    /// The cluster as it is before anything goes wrong.
    pub fn set_up(&mut self) {
        for index in 0..MACHINES {
            let rate = self.rng.random_range(-20_000..20_000);
            let offset = self.rng.random_range(1_000..1_000_000_000);
            let octet = index as u8 + 1;
            self.machines.push(Machine::new(format!("n{index}"), octet, format!("d{index}"), rate, offset));
            self.after(index as u64, Event::StartDaemon { machine: index });
        }
        self.coordinator.start(0);
        self.flush_coordinator();
        for (index, entry) in self.schedule.clone().into_iter().enumerate() {
            self.at(entry.at, Event::Inject(index));
        }
    }

    /// Ends every fault, and lets what can run end well.
    pub fn heal(&mut self) {
        self.healing = true;
        self.coordinator.slow_disk = 0;
        self.slow_network = 0;
        if self.coordinator.process.is_none() {
            self.coordinator.start(self.now);
            self.flush_coordinator();
        }
        self.resume_coordinator(true);
        for machine in 0..self.machines.len() {
            if machine >= MACHINES {
                self.power_off(machine);
                continue;
            }
            let this = &mut self.machines[machine];
            (this.cut_up, this.cut_down, this.cloned) = (0, 0, 0);
            if !this.up {
                self.power_on(machine);
            }
            self.thaw_machine(machine, true);
            self.start_daemon(machine);
            let pids: Vec<i32> = self.machines[machine].shims.keys().copied().collect();
            for pid in pids {
                self.shim_thaws(machine, pid);
            }
            self.daemon_thaws(machine);
            self.end_what_hangs(machine);
            let node = self.machines[machine].name.clone();
            self.ask(Asked::User {
                caller: u64::MAX,
                input: Input::SetCordon { by: None, node, cordon: None },
            });
        }
    }

    fn end_what_hangs(&mut self, machine: usize) {
        let mut ends = Vec::new();
        for shim in self.machines[machine].shims.values_mut() {
            let first = shim.assignment.placement.first_rank.0;
            for (rank, state) in (first..).zip(&mut shim.ranks) {
                (state.hangs, state.unkillable) = (false, false);
                ends.push((shim.assignment.gang.clone(), muster_core::types::Rank(rank)));
            }
        }
        // Nobody would take back a drain that begins later because the kernel still holds a rank.
        let holding = self.machines[machine].shims.values().filter(|shim| shim.holds());
        let held: Vec<_> = holding.map(|shim| shim.assignment.gang.clone()).collect();
        for gang in held {
            self.lets_go(machine, &gang);
        }
        for (gang, rank) in ends {
            let after = 20_000 + self.up_to(20_000);
            self.after(after, Event::RankEnds { machine, gang, rank, code: Some(0), signal: None });
        }
    }

    /// Whether trouble of a machine, or the coordinator's for jobs that asked for it, explains the end of a gang.
    pub fn is_excused(&self, job: &Job) -> bool {
        let recent = |at: u64| at > 0 && at + AFTERMATH >= self.now;
        let strict = job.spec.on_coordinator_loss == CoordinatorLoss::Stop;
        let coordinator = self.coordinator.paused > 0 || recent(self.coordinator.troubled);
        let last = job.past.last().map(|past| past.placements.as_slice()).unwrap_or_default();
        let troubled = job.placements().iter().chain(last).any(|placement| {
            let of_name = self.machines.iter().filter(|machine| machine.name == placement.node.as_str());
            // A daemon that begins while no coordinator answers may learn too late that there is none.
            let late = |machine: &Machine| coordinator && recent(machine.restarted);
            of_name
                .into_iter()
                .any(|machine| machine.is_troubled() || recent(machine.troubled) || late(machine))
        });
        // A network whose delays are a good part of the lease, while the coordinator is away as well.
        let slow = self.slow_network > 0 || recent(self.slowed);
        troubled || (coordinator && (strict || slow))
    }

    /// A pause of the coordinator is over, or all are.
    pub fn resume_coordinator(&mut self, all: bool) {
        self.coordinator.troubled = self.now;
        let paused = self.coordinator.paused;
        self.coordinator.paused = if all { 0 } else { paused.saturating_sub(1) };
        if self.coordinator.paused == 0 && paused > 0 {
            let (now, since) = (self.now, self.coordinator.paused_since);
            if let Some(process) = &mut self.coordinator.process {
                process.away = now - since.max(process.started);
            }
            self.ask(Asked::Tick);
            for asked in std::mem::take(&mut self.coordinator.inbox) {
                self.ask(asked);
            }
            self.ask(Asked::Tick);
        }
    }

    /// Whether everything has ended that was submitted, and nothing of it is left.
    pub fn is_at_rest(&self) -> bool {
        let Some(process) = &self.coordinator.process else { return false };
        let ended = |submission: &Submission| {
            let job = submission.job.as_ref().and_then(|id| process.core.job(id.as_str()).ok());
            job.is_some_and(|job| job.state.is_terminal())
        };
        self.submissions.iter().all(ended) && self.machines.iter().all(|machine| machine.shims.is_empty())
    }

    /// Asks for a submission until there is an answer.
    pub fn submit(&mut self, index: usize) {
        if self.submissions[index].job.is_none() {
            self.ask_to_submit(index);
            self.after(RETRY, Event::Retry(index));
        }
    }

    pub fn ask_to_submit(&mut self, index: usize) {
        let Submission { request, wanted, .. } = &self.submissions[index];
        let (Ok(request_id), Some(spec)) = (RequestId::new(request.clone()), spec(wanted)) else { return };
        let name = Owner::new(format!("user{}", index % OWNERS)).ok();
        let by = Caller { name, rights: Rights::Own };
        let input = Input::Submit { by, request_id: Some(request_id), spec: Box::new(spec) };
        self.ask(Asked::User { caller: index as u64, input });
    }

    /// An answer reaches its user.
    pub fn answered(&mut self, caller: u64, reply: Result<Reply, Refusal>) {
        let Some(submission) = self.submissions.get_mut(caller as usize) else { return };
        match reply {
            Ok(Reply::Job(job)) => {
                submission.job.get_or_insert_with(|| job.id.clone());
                let request = submission.request.clone();
                self.truth.acknowledge(&request, &job.id);
            }
            Ok(_) => {}
            Err(refusal) => self.truth.violate(format!("a submission is refused: {refusal}")),
        }
    }
}

/// What a user would write.
fn spec(wanted: &Wanted) -> Option<JobSpec> {
    let spec = JobSpec {
        min_nodes: wanted.nodes,
        max_nodes: wanted.max_nodes,
        procs_per_node: wanted.procs,
        per_proc: Resources { gpus: wanted.gpus, ..Resources::default() },
        max_restarts: wanted.restarts,
        stop_grace: Millis(5_000),
        start_timeout: Millis(120_000),
        progress_timeout: Millis(if wanted.progress { 20_000 } else { 0 }),
        last_call: Millis(if wanted.progress { 5_000 } else { 0 }),
        on_coordinator_loss: if wanted.strict { CoordinatorLoss::Stop } else { CoordinatorLoss::Run },
        ..JobSpec::new(vec!["train".to_owned()])
    };
    spec.check().ok()
}
