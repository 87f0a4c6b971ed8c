//! Nodes, their leases, and what jobs hold of them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bugs::{Bug, planted};
use crate::health::Health;
use crate::inventory::{Device, Inventory};
use crate::topology::Location;
use crate::types::{
    GangId, Incarnation, JobId, JobSpec, Millis, NodeName, NodePlacement, Owner, RUN_RANK_LABEL, Resources,
    Session,
};

/// A daemon's registration.
#[derive(Clone, Debug)]
pub struct Join {
    /// Name of the node.
    pub name: NodeName,
    /// Address at which others reach it.
    pub address: IpAddr,
    /// This start of the daemon.
    pub incarnation: Incarnation,
    /// This boot of the machine.
    pub boot_id: String,
    /// What the machine has.
    pub inventory: Inventory,
    /// Identity of the daemon's data directory; empty if the daemon does not know it.
    pub data_id: String,
}

/// Whether a node can be given work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeState {
    /// Its session is open and its lease held.
    Ready,
    /// Its session broke, or the coordinator has just started; the lease has not ended.
    #[default]
    Disconnected,
    /// Its lease ended without a word.
    Lost,
    /// It said goodbye.
    Left,
}

/// What jobs hold of a node. Derived from placements, never stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Sum over the jobs.
    pub amount: Resources,
    /// GPU indices held, each with how many hold it: more than one only where a machine has come back under a name that
    /// another had meanwhile, and what is left of it overlaps with what it has been given since.
    pub gpus: BTreeMap<u32, u32>,
    /// Jobs with a gang here, each with the node's group rank in it.
    pub jobs: BTreeMap<JobId, usize>,
    /// The job that has the node for itself, if one has.
    pub exclusive: Option<JobId>,
    /// What gangs still hold that have ended for their jobs, while processes of theirs are left on the node.
    pub leftovers: BTreeMap<GangId, Held>,
}

/// Resources held on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The amount.
    pub amount: Resources,
    /// The GPU indices.
    pub gpus: Vec<u32>,
}

/// A node that is being emptied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Why, in words.
    pub reason: String,
    /// Who asked for it, where that is known.
    #[serde(default)]
    pub by: Option<Owner>,
    /// When ranks that are still being stopped are killed.
    pub deadline: Option<Millis>,
}

/// A machine that runs ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Name.
    pub name: NodeName,
    /// Address at which others reach it.
    pub address: IpAddr,
    /// The daemon that joined last.
    pub incarnation: Incarnation,
    /// Boot of the machine it joined from.
    pub boot_id: String,
    /// What the machine has. Shared, because a node's record is copied whenever something about it is written or shown.
    pub inventory: Arc<Inventory>,
    /// Identity of the data directory of the daemon that joined last.
    #[serde(default)]
    pub data_id: String,
    /// Why it is cordoned, if it is.
    pub cordon: Option<String>,
    /// Who cordoned it, where that is known.
    #[serde(default)]
    pub cordoned_by: Option<Owner>,
    /// Who gave it back last, unless it was cordoned or drained since.
    #[serde(default)]
    pub uncordoned_by: Option<Owner>,
    /// Set while it is being emptied, and once it is empty.
    #[serde(default)]
    pub drain: Option<Drain>,
    /// When it first joined.
    pub joined: Millis,
    /// When its state last changed.
    pub changed: Millis,
    /// Whether it can be given work.
    #[serde(skip)]
    pub state: NodeState,
    /// Why its daemon is about to end, if it is.
    #[serde(skip)]
    pub leaving: Option<String>,
    /// Number of the last hello of its daemon.
    #[serde(skip)]
    pub hello: u64,
    /// The open session.
    #[serde(skip)]
    pub session: Option<Session>,
    /// When the lease ends unless renewed.
    #[serde(skip)]
    pub lease_expires: Millis,
    /// What jobs hold.
    #[serde(skip)]
    pub reserved: Reserved,
    /// Whether it is fit for work.
    #[serde(default)]
    pub health: Health,
    /// Where it is in the network, as its labels say.
    #[serde(skip)]
    pub location: Location,
}

impl Node {
    /// Its place among the nodes of its `muster run`, if it was given one.
    pub(crate) fn place_in_run(&self) -> Option<u32> {
        self.inventory.labels.get(RUN_RANK_LABEL)?.parse().ok()
    }

    pub(crate) fn new(join: Join, now: Millis) -> Self {
        Self {
            name: join.name,
            address: join.address,
            incarnation: join.incarnation,
            location: Location::of(&join.inventory.labels),
            boot_id: join.boot_id,
            inventory: Arc::new(join.inventory),
            data_id: join.data_id,
            cordon: None,
            cordoned_by: None,
            uncordoned_by: None,
            drain: None,
            joined: now,
            changed: now,
            state: NodeState::Disconnected,
            leaving: None,
            hello: 0,
            session: None,
            lease_expires: now,
            reserved: Reserved::default(),
            health: Health::default(),
        }
    }

    pub(crate) fn set_inventory(&mut self, inventory: Arc<Inventory>) {
        self.location = Location::of(&inventory.labels);
        self.inventory = inventory;
    }

    /// What no job holds.
    pub fn free(&self) -> Resources {
        self.inventory.total.minus(self.reserved.amount)
    }

    /// GPUs that no job holds and that are well, in the machine's order.
    pub fn free_gpus(&self) -> impl Iterator<Item = &Device> {
        let held = &self.reserved.gpus;
        self.inventory.gpus.iter().filter(|gpu| gpu.fault.is_none() && !held.contains_key(&gpu.index))
    }

    pub(crate) fn reserve(&mut self, job: &JobId, spec: &JobSpec, placement: &NodePlacement) {
        if self.reserved.jobs.insert(job.clone(), placement.group_rank as usize).is_some() {
            return;
        }
        self.reserved.amount = self.reserved.amount.plus(spec.per_proc.times(placement.procs));
        if !planted(Bug::DevicesNotReserved) {
            self.reserved.hold(&placement.gpus);
        }
        if spec.per_proc.is_zero() {
            self.reserved.exclusive = Some(job.clone());
        }
    }

    pub(crate) fn release(&mut self, job: &JobId, spec: &JobSpec, placement: &NodePlacement) {
        if self.reserved.jobs.remove(job).is_none() {
            return;
        }
        self.reserved.amount = self.reserved.amount.minus(spec.per_proc.times(placement.procs));
        self.reserved.let_go(&placement.gpus);
        if self.reserved.exclusive.as_ref() == Some(job) {
            self.reserved.exclusive = None;
        }
    }

    /// What is left of a gang that is over for its job holds what the gang held.
    pub(crate) fn hold_leftover(&mut self, gang: &GangId, spec: &JobSpec, placement: &NodePlacement) {
        if planted(Bug::StuckIsFree) || self.reserved.leftovers.contains_key(gang) {
            return;
        }
        let held = Held { amount: spec.per_proc.times(placement.procs), gpus: placement.gpus.clone() };
        self.reserved.amount = self.reserved.amount.plus(held.amount);
        self.reserved.hold(&held.gpus);
        self.reserved.leftovers.insert(gang.clone(), held);
    }

    /// Nothing of it is left. False if nothing was held.
    pub(crate) fn release_leftover(&mut self, gang: &GangId) -> bool {
        let Some(held) = self.reserved.leftovers.remove(gang) else { return false };
        self.reserved.amount = self.reserved.amount.minus(held.amount);
        self.reserved.let_go(&held.gpus);
        true
    }
}

impl Reserved {
    fn hold(&mut self, gpus: &[u32]) {
        for gpu in gpus {
            *self.gpus.entry(*gpu).or_default() += 1;
        }
    }

    fn let_go(&mut self, gpus: &[u32]) {
        for gpu in gpus {
            match self.gpus.get_mut(gpu) {
                Some(holders) if *holders > 1 => *holders -= 1,
                Some(_) => _ = self.gpus.remove(gpu),
                None => {}
            }
        }
    }
}
