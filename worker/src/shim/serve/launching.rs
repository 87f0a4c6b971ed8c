//! From preparation to running ranks, and what is looked at while they run and when they hang.

use std::fs::File;
use std::path::PathBuf;

use muster_core::types::{Assignment, Millis, Rank, StopMode, StopSignal};
use muster_worker_core::Fence;
use tracing::{info, warn};

use super::super::protocol::Phase;
use super::super::record::Order;
use super::super::rendezvous::Rendezvous;
use super::{Progress, Shim};
use crate::clock::{boot_now, unix_now};
use crate::launch::cgroup::{Cgroups, GangCgroup};
use crate::launch::prepare::{Prepared, mark_launched};
use crate::launch::stacks;
use crate::launch::store::RankStore;
use crate::launch::way;

impl Shim {
    pub(super) fn prepared(&mut self, prepared: Result<Prepared, String>) {
        if self.phase() != Phase::Preparing {
            return;
        }
        match prepared {
            Ok(prepared) => {
                let port = prepared.store.as_ref().map(RankStore::port);
                self.record.master_port = port;
                self.prepared = Some(prepared);
                self.state.send_modify(|state| (state.phase, state.master_port) = (Phase::Prepared, port));
                self.launch_if_prepared();
            }
            Err(why) => self.fail(why),
        }
    }

    pub(super) fn launch_if_prepared(&mut self) {
        if self.phase() == Phase::Prepared
            && let Some((assignment, fence)) = self.launch.take()
            && let Err(why) = self.launch(*assignment, fence)
        {
            self.fail(why);
        }
    }

    fn launch(&mut self, assignment: Assignment, fence: Option<Fence>) -> Result<(), String> {
        self.set_fence(fence);
        let prepared = self.prepared.as_ref().ok_or("nothing is prepared")?;
        if fence.is_some_and(|fence| boot_now() >= fence.term) {
            return Err("the node's lease ended before the ranks were launched".to_owned());
        }
        let port = self.record.master_port.or(assignment.master_port).ok_or("no master port was assigned")?;
        // Ranks of a run are told a name, and reach what it stands for.
        if self.record.order.attached.as_ref().is_none_or(|attached| attached.master.is_none()) {
            way::check(&assignment, port)?;
        }
        mark_launched(&self.record.order.data_dir, &assignment.gang)?;
        // Said before it is so: whoever finds the record looks for ranks.
        self.record.launched = true;
        self.record.order.assignment = match &self.record.order.attached {
            Some(attached) => attached.own(assignment),
            None => assignment,
        };
        self.record.cgroup = self.control_groups();
        let written = self.dir.write_record(&self.record);
        written.map_err(|error| format!("failed to write to {}: {error}", self.dir.path().display()))?;
        let cgroup = self.record.cgroup.clone();
        self.ranks.start(&self.record.order, prepared, &self.sockets, port, cgroup)?;
        let log_dirs = self.ranks.all.iter().copied().zip(prepared.log_dirs.iter().cloned());
        let timeout = self.record.order.assignment.spec.progress_timeout;
        self.progress = Progress::new(timeout, boot_now(), log_dirs);
        info!(gang = %self.record.order.assignment.gang, "ranks launched");
        let processes = self.ranks.processes();
        if prepared.store.is_some() {
            let rendezvous = Rendezvous::new(&self.record.order.assignment, processes.clone(), boot_now());
            self.rendezvous = Some(rendezvous);
        }
        self.state.send_modify(|state| (state.phase, state.processes) = (Phase::Running, processes));
        Ok(())
    }

    /// Looks at the ranks' store now and then, while they are to run.
    pub(super) fn look_at_store(&mut self, now: Millis) {
        let store = self.prepared.as_ref().and_then(|prepared| prepared.store.as_ref());
        let (Some(rendezvous), Some(store)) = (&mut self.rendezvous, store) else { return };
        if self.kill_at.is_none()
            && now >= rendezvous.deadline()
            && let Some(stuck) = rendezvous.look(now, unix_now(), &store.observe())
        {
            self.state.send_modify(|state| state.rendezvous = stuck);
        }
    }

    /// Groups for the ranks, if the machine lets us have any: from them nothing escapes, and in them memory is limited.
    fn control_groups(&self) -> Option<GangCgroup> {
        let Order { assignment, data_id, .. } = &self.record.order;
        let memory = assignment.spec.per_proc.memory_bytes;
        let name = format!("{}.{}-{data_id}", assignment.gang.job, assignment.gang.generation);
        let groups = Cgroups::find();
        if let Some(lacks) = groups.lacks() {
            info!(%lacks, "without some of the control groups");
        }
        let made = groups.create(&name, assignment.placement.procs, (memory > 0).then_some(memory));
        made.unwrap_or_else(|error| {
            warn!(%error, "without control groups");
            None
        })
    }

    /// Nothing runs, or what was started ends at once.
    fn fail(&mut self, why: String) {
        warn!(error = %why, "the gang cannot be launched");
        self.state.send_modify(|state| state.error = Some(why));
        self.failed = true;
        self.stop(StopMode { signal: StopSignal::default(), grace: Millis(0), dump_stacks: false });
    }
}

/// Writes to each rank's standard error what the rank is doing, as far as can be seen from outside.
pub(super) fn dump(hung: &[(Rank, i32, PathBuf)]) {
    std::thread::scope(|scope| {
        for (rank, pid, stderr) in hung {
            scope.spawn(move || {
                let log = File::options().create(true).append(true).open(stderr);
                let header = format!("rank {rank} shows no progress; what it does:");
                if let Err(error) = log.and_then(|mut log| stacks::write(&mut log, *pid, &header)) {
                    warn!(rank = rank.0, %error, "its stacks could not be written");
                }
            });
        }
    });
}
