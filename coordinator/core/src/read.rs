//! Looking at the state, without changing anything.

use crate::core::{Core, Meta};
use crate::effects::Refusal;
use crate::job::Job;
use crate::node::Node;
use crate::owners::Caller;
use crate::types::{JobId, NodeName};

impl Core {
    /// One job.
    pub fn job(&self, id: &str) -> Result<&Job, Refusal> {
        let job = JobId::new(id).ok().and_then(|id| self.jobs.get(&id));
        job.ok_or_else(|| Refusal::NoJob(id.chars().take(64).collect()))
    }

    /// One job, for somebody who wants to change it.
    pub(crate) fn changeable(&self, by: &Caller, id: &str) -> Result<&Job, Refusal> {
        let job = self.job(id)?;
        if by.may_change(job.owner.as_ref()) {
            return Ok(job);
        }
        Err(Refusal::NotOwner { job: job.id.clone(), owner: job.owner.clone() })
    }

    /// One node.
    pub fn node(&self, name: &str) -> Result<&Node, Refusal> {
        let node = NodeName::new(name).ok().and_then(|name| self.nodes.get(&name));
        node.ok_or_else(|| Refusal::NoNode(name.chars().take(253).collect()))
    }

    /// Jobs submitted before the one of order `before`, newest first.
    pub fn jobs_before(&self, before: u64) -> impl Iterator<Item = &Job> {
        self.by_order.range(..before).rev().filter_map(|(_, id)| self.jobs.get(id))
    }

    /// Nodes by name, after `after`.
    pub fn nodes_after(&self, after: Option<&NodeName>) -> impl Iterator<Item = &Node> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.nodes.range::<NodeName, _>((from, Bound::Unbounded)).map(|(_, node)| node)
    }

    /// How many jobs are known.
    pub fn jobs_total(&self) -> usize {
        self.jobs.len()
    }

    /// Counters and identity.
    pub fn meta(&self) -> Meta {
        self.meta
    }
}
