//! How much waits, in all and of each owner: counted as jobs begin and cease to wait, and bounded
//! where a job is submitted. A job that waits to be started again counts, and is never refused.

use std::collections::BTreeMap;

use crate::core::Core;
use crate::effects::Refusal;
use crate::job::Job;
use crate::types::{JobId, JobSpec, Owner};

/// Most that waits. A waiting job is held in memory twice, for the core and for readers, and stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueMax {
    /// Jobs: a listing of them is still read within seconds.
    pub jobs: usize,
    /// Bytes of their specifications: a coordinator that starts reads them all, within seconds.
    pub bytes: usize,
    /// Jobs of one owner: three others find room whatever one does.
    pub owner_jobs: usize,
    /// Bytes of the specifications of one owner, for the same reason.
    pub owner_bytes: usize,
}

impl Default for QueueMax {
    fn default() -> Self {
        let (jobs, bytes) = (100_000, 256 << 20);
        Self { jobs, bytes, owner_jobs: jobs / 4, owner_bytes: bytes / 4 }
    }
}

/// A bound on what waits that is reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueFull {
    /// Too many jobs.
    #[error(
        "{waiting} jobs{} are waiting already, and at most {most} may{}; try again when some have run, or \
         cancel some",
        of(.owner.as_ref()), each(.owner.as_ref())
    )]
    Jobs {
        /// Whose, if it is the bound of one owner.
        owner: Option<Owner>,
        /// How many wait.
        waiting: usize,
        /// The bound.
        most: usize,
    },
    /// Too many bytes.
    #[error(
        "the specifications of the waiting jobs{} have {waiting} bytes, this one has {asked}, and at most \
         {most} are kept{}; try again when some have run, or cancel some",
        of(.owner.as_ref()), each(.owner.as_ref())
    )]
    Bytes {
        /// Whose, if it is the bound of one owner.
        owner: Option<Owner>,
        /// Bytes that wait.
        waiting: usize,
        /// Bytes of the job that was refused.
        asked: usize,
        /// The bound.
        most: usize,
    },
}

fn of(owner: Option<&Owner>) -> String {
    owner.map(|owner| format!(" of {owner}")).unwrap_or_default()
}

fn each(owner: Option<&Owner>) -> &'static str {
    owner.map_or("", |_| " of one owner")
}

/// Jobs and bytes that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    jobs: usize,
    bytes: usize,
}

impl Load {
    fn add(&mut self, bytes: usize) {
        self.jobs += 1;
        self.bytes += bytes;
    }

    fn remove(&mut self, bytes: usize) {
        self.jobs -= 1;
        self.bytes -= bytes;
    }
}

/// What waits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    all: Load,
    /// Of each owner of whom anything waits. Jobs without a known owner are not somebody's.
    by_owner: BTreeMap<Owner, Load>,
    /// Each job that is counted, with whose it is and its bytes.
    counted: BTreeMap<JobId, (Option<Owner>, usize)>,
}

impl Backlog {
    /// Takes note of a job's record, which may have begun or ceased to wait.
    pub fn note(&mut self, job: &Job) {
        if !job.waits() {
            self.forget(&job.id);
        } else if !self.counted.contains_key(&job.id) {
            let bytes = job.spec.bytes();
            self.all.add(bytes);
            if let Some(owner) = &job.owner {
                self.by_owner.entry(owner.clone()).or_default().add(bytes);
            }
            self.counted.insert(job.id.clone(), (job.owner.clone(), bytes));
        }
    }

    /// The job is gone, or waits no more.
    pub fn forget(&mut self, id: &JobId) {
        let Some((owner, bytes)) = self.counted.remove(id) else { return };
        self.all.remove(bytes);
        if let Some(owner) = owner
            && let Some(load) = self.by_owner.get_mut(&owner)
        {
            load.remove(bytes);
            if load.jobs == 0 {
                self.by_owner.remove(&owner);
            }
        }
    }

    /// Returns whether one more job may wait.
    pub fn admit(&self, owner: Option<&Owner>, spec: &JobSpec, most: &QueueMax) -> Result<(), Refusal> {
        let own = owner.and_then(|owner| self.by_owner.get(owner)).copied().unwrap_or_default();
        let asked = spec.bytes();
        let check = |load: Load, owner: Option<&Owner>, jobs: usize, bytes: usize| {
            if load.jobs >= jobs {
                return Err(QueueFull::Jobs { owner: owner.cloned(), waiting: load.jobs, most: jobs });
            }
            if load.bytes.saturating_add(asked) > bytes {
                let waiting = load.bytes;
                return Err(QueueFull::Bytes { owner: owner.cloned(), waiting, asked, most: bytes });
            }
            Ok(())
        };
        if owner.is_some() {
            check(own, owner, most.owner_jobs, most.owner_bytes)?;
        }
        Ok(check(self.all, None, most.jobs, most.bytes)?)
    }
}

impl Core {
    /// Returns whether what is counted is what waits.
    pub(crate) fn check_backlog(&self) -> Result<(), String> {
        let mut counted = Backlog::default();
        self.jobs.values().for_each(|job| counted.note(job));
        if counted == self.backlog {
            return Ok(());
        }
        Err(format!("{:?} is counted, and {:?} waits", self.backlog.all, counted.all))
    }
}
