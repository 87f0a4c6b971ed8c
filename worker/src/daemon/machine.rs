//! What the daemon knows of its machine: what follows from that for the ranks that it starts, and what the coordinator is
//! told of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use muster_core::Inventory;
use muster_core::health::Finding;
use muster_core::types::{Assignment, Surroundings};
use muster_proto::convert::{finding_to_wire, inventory_to_wire};
use muster_proto::v1;
use muster_worker_core::{Facts, WARNING, derive};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use super::Daemon;
use crate::devices::{Machine, allowed_cpus, fabric, location, network};
use crate::health::{self, Seen};
use crate::monitor::Monitor;
use crate::{Config, Error};

/// What is wrong is said again after this time: the coordinator compares the node with others when it hears of it.
const SAID_AGAIN: Duration = Duration::from_mins(1);
/// Looks that may wait for the daemon; they wait for each other beyond it.
const LOOKS_MAX: usize = 2;

/// The machine as it was seen last, and what the coordinator knows of that.
pub(super) struct Watched {
    current: watch::Sender<Arc<Inventory>>,
    findings: Vec<Finding>,
    /// What this session has said that the machine has.
    said: Option<Arc<Inventory>>,
    /// When it has said what is wrong.
    said_at: Option<Instant>,
    /// Something is to be said.
    due: bool,
    pub seen: mpsc::Receiver<Seen>,
    monitor: Monitor,
    _watching: Option<AbortOnDropHandle<()>>,
}

impl Watched {
    /// Looks at the machine for the first time, and goes on looking.
    pub async fn start(config: &Config, data_dir: PathBuf, monitor: Monitor) -> Result<Self, Error> {
        let mut labels = config.labels.clone();
        let machine = Arc::new(if config.attached.is_some() {
            Machine::at_a_glance(labels)
        } else {
            let file = config.topology_conf.as_deref();
            let more = location::labels(file, config.name.as_str(), &labels).map_err(Error::Inventory)?;
            labels.extend(more);
            Machine::new(config.sysfs_root.clone(), config.given.clone(), labels)
        });
        let looking = tokio::task::spawn_blocking({
            let machine = machine.clone();
            move || machine.inventory()
        });
        let found = looking.await.unwrap_or_else(|error| Err(error.to_string())).map_err(Error::Inventory)?;
        let (gpus, ports, total) = (found.gpus.len(), found.fabric_ports.len(), found.total);
        info!(node = %config.name, gpus, ports, total.cpu_millis, total.memory_bytes, "inventory");
        monitor.machine(&found, &[]);
        let (sender, seen) = mpsc::channel(LOOKS_MAX);
        let watch = config.watch.clone();
        Ok(Self {
            current: watch::Sender::new(Arc::new(found)),
            findings: Vec::new(),
            said: None,
            said_at: None,
            due: false,
            seen,
            monitor,
            _watching: watch.map(|watch| health::watch(machine, data_dir, watch, sender)),
        })
    }

    /// For whoever joins: what the machine has, the last that is known.
    pub fn inventory(&self) -> watch::Receiver<Arc<Inventory>> {
        self.current.subscribe()
    }

    /// A look has shown something.
    pub fn take(&mut self, seen: Seen) {
        if let Some(inventory) = seen.inventory.filter(|inventory| **self.current.borrow() != **inventory) {
            self.current.send_replace(inventory);
            self.due = true;
        }
        self.due |=
            self.findings != seen.findings || self.said_at.is_none_or(|at| at.elapsed() >= SAID_AGAIN);
        self.findings = seen.findings;
        self.monitor.machine(&self.current.borrow(), &self.findings);
    }

    /// A session has begun; it has said what the machine has.
    pub fn opened(&mut self, said: Arc<Inventory>) {
        // Before the first look nothing is known of the machine's health.
        self.due = self.said_at.is_some() || *said != **self.current.borrow();
        self.said = Some(said);
    }

    pub fn is_due(&self) -> bool {
        self.due
    }

    /// Everything that is known, if it is due.
    pub fn message(&mut self) -> Option<v1::NodeHealth> {
        if !std::mem::take(&mut self.due) {
            return None;
        }
        self.said_at = Some(Instant::now());
        let current = self.current.borrow().clone();
        let news = self.said.as_ref() != Some(&current);
        let inventory = news.then(|| inventory_to_wire(&current));
        self.said = Some(current);
        Some(v1::NodeHealth { findings: self.findings.iter().map(finding_to_wire).collect(), inventory })
    }
}

impl Daemon {
    /// What this machine adds to the environment of a gang's ranks. `muster run` adds nothing but what it was
    /// told: its ranks are to find what they find under torchrun.
    pub(super) fn surroundings(&self, assignment: &Assignment) -> Surroundings {
        if let Some(attached) = &self.identity.config.attached {
            return Surroundings { bindings: attached.bindings.clone(), ..Surroundings::default() };
        }
        let sys = self.identity.config.sysfs_root.as_deref().unwrap_or(Path::new("/sys"));
        let interface = network::interface_towards(assignment.master_addr);
        let inventory = self.watched.current.borrow().clone();
        let facts = Facts {
            inventory: &inventory,
            interface: interface.as_deref(),
            cpus: &allowed_cpus(),
            gid_fault: &|port, index| fabric::gid_fault(sys, port, index),
            inherited: &|name| std::env::var(name).ok(),
        };
        let derived = derive(assignment, &facts);
        for variable in derived.variables.iter().filter(|variable| variable.reason.starts_with(WARNING)) {
            warn!(gang = %assignment.gang, variable.name, variable.value, "{}", variable.reason);
        }
        derived
    }
}
