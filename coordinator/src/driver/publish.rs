//! What readers and watchers see of a step, once its writes are durable.

use std::collections::BTreeSet;
use std::sync::Arc;

use muster_core::types::Millis;
use muster_core::{Event, Job, Node, NodeState, Write};
use tracing::{info, warn};

use super::{Deferred, Driver};
#[cfg(debug_assertions)]
use crate::{metrics::Latest, view, view::Sight};

/// Time between two publications of what nodes add to the records of their gangs. A record is as large as its gang, and each
/// node of it reports: published with each report, it would cost the square of the gang's size.
const DETAIL_INTERVAL: Millis = Millis(250);

/// Records that are compared at each turn of a debug build, so that tests with thousands stay quick.
#[cfg(debug_assertions)]
const CHECKED_MAX: usize = 32;

impl Driver {
    /// Adds to the group being filled what a step has changed.
    pub(super) fn publish(&mut self, writes: &[Write], events: BTreeSet<Event>) {
        let deferred = &mut self.filling.deferred;
        for event in events {
            match event {
                Event::Job(id) => {
                    if let Ok(job) = self.core.job(id.as_str()) {
                        deferred.push(Deferred::JobChanged(Arc::new(job.clone())));
                    }
                    self.details.remove(&id);
                }
                Event::JobDetail(id) => drop(self.details.insert(id)),
                Event::Node(name) => {
                    if let Ok(node) = self.core.node(name.as_str()) {
                        deferred.push(Deferred::NodeChanged(Arc::new(node.clone())));
                    }
                }
                Event::JobDeleted(id) => {
                    self.details.remove(&id);
                    deferred.push(Deferred::JobDeleted(id));
                }
            }
        }
        for write in writes {
            match write {
                Write::DeleteNode(name) => deferred.push(Deferred::NodeForgotten(name.clone())),
                Write::Token(_) | Write::DeleteToken(_) | Write::Barred(_) | Write::DeleteBarred(_) => {
                    deferred.push(Deferred::TokensChanged(write.clone()));
                }
                Write::Meta(_) | Write::Job(_) | Write::DeleteJob(_) | Write::Node(_) => {}
            }
        }
    }

    /// Returns when details are published next; none if there are none.
    pub(super) fn details_due(&self) -> Option<Millis> {
        (!self.details.is_empty()).then_some(self.details_due)
    }

    /// Adds the details that are due to the group being filled.
    pub(super) fn publish_details(&mut self, now: Millis) {
        if self.details_due().is_none_or(|due| due > now) {
            return;
        }
        self.details_due = now.plus(DETAIL_INTERVAL);
        for id in std::mem::take(&mut self.details) {
            if let Ok(job) = self.core.job(id.as_str()) {
                self.filling.deferred.push(Deferred::JobDetail(Arc::new(job.clone())));
            }
        }
    }

    /// Panics where readers see something else than what the core knows: a change that the core has not told of.
    #[cfg(debug_assertions)]
    pub(super) fn check_published(&self) {
        let is_pending = self.writing.is_some() || !self.filling.deferred.is_empty();
        let state = self.published.read();
        if is_pending || state.jobs_total() + state.nodes_total() > CHECKED_MAX {
            return;
        }
        assert_eq!(state.jobs_total(), self.core.jobs_total(), "jobs are published");
        for node in self.core.nodes_after(None) {
            let seen = state.node(node.name.as_str()).map(|seen| view::node(seen));
            assert_eq!(seen, Ok(view::node(node)), "nodes are published as they are");
        }
        for job in self.core.jobs_before(u64::MAX).filter(|job| !self.details.contains(&job.id)) {
            let show = |job: &Job| {
                (view::job(job, Latest::default(), Sight::Whole), view::environments(job, Sight::Whole))
            };
            let seen = state.job(job.id.as_str()).map(|seen| show(seen));
            assert_eq!(seen, Ok(show(job)), "jobs are published as they are");
        }
    }

    pub(super) fn job_changed(&mut self, job: &Arc<Job>) {
        info!(job_id = %job.id, state = ?job.state, generation = job.generation.0, reason = %job.reason, "job");
        self.tally.job(job);
        self.published.write().job_changed(job);
    }

    pub(super) fn node_changed(&mut self, node: &Arc<Node>) {
        if node.state == NodeState::Lost {
            warn!(node = %node.name, "node lost: its lease ended");
        }
        self.tally.node(node);
        self.published.write().node_changed(node);
    }
}
