//! What must hold between any two steps; for tests and simulation.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::core::Core;
use crate::job::Observed;
use crate::types::{GangId, NodeName};

impl Core {
    /// Checks the state against itself. Returns what is violated.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut owners: BTreeMap<(&NodeName, u32), GangId> = BTreeMap::new();
        for (id, job) in &self.jobs {
            let queued = self.queue.contains(&(Reverse(job.spec.priority), job.order, id.clone()));
            if job.state.is_terminal() && (job.gang.is_some() || queued || job.finished.is_none()) {
                return Err(format!("{id} has ended but still holds a gang or a place in the queue"));
            }
            if job.restarts_used > job.spec.max_restarts {
                return Err(format!("{id} was restarted {} times", job.restarts_used));
            }
            let Some(gang) = &job.gang else { continue };
            let mut next = 0;
            for (index, placement) in gang.placements.iter().enumerate() {
                if placement.first_rank.0 != next || placement.group_rank as usize != index {
                    return Err(format!("{id}: ranks are not contiguous at node {}", placement.node));
                }
                next += placement.procs;
                let node = self.nodes.get(&placement.node);
                // A node that has stopped its part may have other work before the gang has ended everywhere.
                let holds = node.is_some_and(|node| node.reserved.jobs.contains_key(id))
                    && gang.observed[index] < Observed::Stopped;
                for gpu in placement.gpus.iter().filter(|_| holds) {
                    if let Some(other) = owners.insert((&placement.node, *gpu), job.gang_id()) {
                        return Err(format!("{} GPU {gpu} is owned by {other} and {id}", placement.node));
                    }
                }
            }
            let nodes = gang.placements.len() as u32;
            if !(job.spec.min_nodes..=job.spec.max_nodes).contains(&nodes) {
                return Err(format!("{id} runs on {nodes} nodes"));
            }
        }
        for node in self.nodes.values() {
            for (gang, held) in &node.reserved.leftovers {
                for gpu in &held.gpus {
                    // A gang that still stops elsewhere owns what is left of it here.
                    let other = owners.insert((&node.name, *gpu), gang.clone());
                    if let Some(other) = other.filter(|other| other != gang) {
                        return Err(format!(
                            "{} GPU {gpu} is held by {gang} and owned by {other}",
                            node.name
                        ));
                    }
                }
            }
        }
        self.check_backlog()?;
        self.check_room()?;
        self.check_growth()
    }
}
