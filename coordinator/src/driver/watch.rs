//! Who watches which job and the nodes.

use std::collections::HashMap;
use std::sync::Arc;

use muster_core::types::JobId;
use muster_core::{Job, Node};
use tokio::sync::broadcast;

/// States of one job that may wait for a watcher; jobs change a few times in their life.
const JOB_EVENTS_MAX: usize = 64;
/// Node changes that may wait for a watcher; a slower one is told so.
const NODE_EVENTS_MAX: usize = 4096;

/// The open watches. A job's entry goes when it ends, or changes and nobody listens any more.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    jobs: HashMap<JobId, broadcast::Sender<Arc<Job>>>,
    nodes: Option<broadcast::Sender<Arc<Node>>>,
}

impl Watchers {
    /// The changes after `job`; an ended job has none, and costs nothing to watch.
    pub fn job(&mut self, job: &Job) -> broadcast::Receiver<Arc<Job>> {
        if job.state.is_terminal() {
            return broadcast::channel(1).1;
        }
        self.jobs.entry(job.id.clone()).or_insert_with(|| broadcast::channel(JOB_EVENTS_MAX).0).subscribe()
    }

    pub fn nodes(&mut self) -> broadcast::Receiver<Arc<Node>> {
        self.nodes.get_or_insert_with(|| broadcast::channel(NODE_EVENTS_MAX).0).subscribe()
    }

    pub fn job_changed(&mut self, job: &Arc<Job>) {
        let Some(sender) = self.jobs.get(&job.id) else { return };
        if sender.send(job.clone()).is_err() || job.state.is_terminal() {
            self.jobs.remove(&job.id);
        }
    }

    pub fn node_changed(&mut self, node: &Arc<Node>) {
        if let Some(sender) = &self.nodes {
            // Nobody listening is no error.
            sender.send(node.clone()).ok();
        }
    }
}
