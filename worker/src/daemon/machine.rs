//! What the daemon knows of its machine, and what follows from that for the ranks that it starts.

use std::sync::Arc;

use muster_core::Inventory;
use muster_core::types::{Assignment, Surroundings};
use muster_worker_core::{Facts, derive};

use super::Daemon;
use crate::devices::{Machine, allowed_cpus, network};
use crate::{Config, Error};

/// Looks at the machine for the first time.
pub(super) async fn find_out(config: &Config) -> Result<(Arc<Machine>, Inventory), Error> {
    let machine = Arc::new(match &config.attached {
        Some(_) => Machine::at_a_glance(config.labels.clone()),
        None => Machine::new(config.sysfs_root.clone(), config.given.clone(), config.labels.clone()),
    });
    let looking = tokio::task::spawn_blocking({
        let machine = machine.clone();
        move || machine.inventory()
    });
    let found = looking.await.unwrap_or_else(|error| Err(error.to_string()));
    Ok((machine, found.map_err(Error::Inventory)?))
}

impl Daemon {
    /// What this machine adds to the environment of a gang's ranks. `muster run` adds nothing: its ranks are to find
    /// what they find under torchrun.
    pub(super) fn surroundings(&self, assignment: &Assignment) -> Surroundings {
        if self.identity.config.attached.is_some() {
            return Surroundings::default();
        }
        let interface = network::interface_towards(assignment.master_addr);
        let facts = Facts {
            inventory: &self.identity.inventory,
            interface: interface.as_deref(),
            cpus: &allowed_cpus(),
            inherited: &|name| std::env::var(name).ok(),
        };
        derive(assignment, &facts)
    }
}
