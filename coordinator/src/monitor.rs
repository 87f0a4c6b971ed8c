//! What this coordinator shows of itself to Prometheus. Kept as things change; only a leader has jobs and nodes to show.
//!
//! No job, node or user is a label: their loss curves and logs are asked for by id (`muster metrics`), not scraped.

pub(crate) mod calls;
mod tally;

use std::sync::Arc;

use muster_monitor::{
    Catalogue, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Page, SECONDS,
};

use muster_store::Error as StoreError;

use crate::driver::INBOX_MAX;
use crate::edge::files::{ACCEPTS_FAILED, CONNECTIONS_REFUSED, Trouble};
use crate::office::Office;
pub(crate) use tally::Tally;

/// Bounds of waits in the queue: from at once to a day.
const WAIT_SECONDS: [f64; 12] =
    [0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0, 21_600.0, 43_200.0, 86_400.0];

/// All of it, shared. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Monitor(Arc<Counts>);

impl std::ops::Deref for Monitor {
    type Target = Counts;

    fn deref(&self) -> &Counts {
        &self.0
    }
}

/// Streams that are ended because their reader does not keep up.
pub(crate) const SLOW_STREAMS: [&str; 4] = ["session", "watch_job", "watch_nodes", "logs"];

/// What is refused of what nodes say: of a gang that they do not hold, or with a number far beyond the last.
const REFUSED: [&str; 3] = ["points", "gang_report", "point_number"];

/// How a commit can fail.
const STORE_ERRORS: [&str; 3] = ["retryable", "fenced", "terminal"];

#[derive(Debug)]
pub(crate) struct Counts {
    pub catalogue: Catalogue,
    pub jobs: IntGaugeVec,
    pub jobs_submitted: IntCounter,
    pub jobs_ended: IntCounterVec,
    pub job_restarts: IntCounter,
    pub placements: IntCounter,
    pub queue_oldest: IntGauge,
    pub queue_wait: Histogram,
    pub job_start: Histogram,
    pub nodes: IntGaugeVec,
    pub verdicts: IntGaugeVec,
    pub nodes_cordoned: IntGauge,
    pub nodes_draining: IntGauge,
    pub nodes_lost: IntCounter,
    pub gpus: IntGaugeVec,
    sessions: IntGauge,
    pub sessions_opened: IntCounter,
    pub slow_streams: IntCounterVec,
    pub points: IntCounter,
    pub points_put_off: IntCounter,
    refused: IntCounterVec,
    accepts_failed: IntCounter,
    connections_refused: IntCounter,
    pub commit_seconds: Histogram,
    pub store_errors: IntCounterVec,
    store_writable: IntGauge,
    inbox_depth: IntGauge,
    pub pauses: IntCounter,
    leader: IntGauge,
    leader_term: IntGauge,
    pub calls: IntCounterVec,
    pub call_seconds: HistogramVec,
}

impl Monitor {
    pub fn new() -> Self {
        let all = Catalogue::new("coordinator", env!("CARGO_PKG_VERSION"));
        let counts = Counts {
            jobs: all.gauges(
                "muster_jobs",
                "Jobs by state; of those that have ended, the ones that are still listed.",
                &["state"],
            ),
            jobs_submitted: all.counter("muster_jobs_submitted_total", "Jobs that were taken in."),
            jobs_ended: all.counters("muster_jobs_ended_total", "Jobs that have ended, by their last state.", &["state"]),
            job_restarts: all.counter("muster_job_restarts_total", "Restarts that faults have cost jobs."),
            placements: all.counter("muster_placements_total", "Gangs that were given nodes, restarts included."),
            queue_oldest: all.gauge(
                "muster_queue_oldest_timestamp_seconds",
                "When the job that has been waiting longest was submitted; 0 if none waits.",
            ),
            queue_wait: all.histogram(
                "muster_queue_wait_seconds",
                "Time from a job's submission to its first placement.",
                &WAIT_SECONDS,
            ),
            job_start: all.histogram(
                "muster_job_start_seconds",
                "Time from placement until all ranks of a job ran for the first time.",
                &WAIT_SECONDS,
            ),
            nodes: all.gauges("muster_nodes", "Nodes by state.", &["state"]),
            verdicts: all.gauges(
                "muster_nodes_by_verdict",
                "Nodes that are ready, by whether they are fit for work.",
                &["verdict"],
            ),
            nodes_cordoned: all.gauge("muster_nodes_cordoned", "Nodes that get nothing new because somebody said so."),
            nodes_draining: all.gauge("muster_nodes_draining", "Nodes that are being emptied, or are empty after that."),
            nodes_lost: all.counter("muster_nodes_lost_total", "Nodes whose lease has ended without a word."),
            gpus: all.gauges(
                "muster_gpus",
                "GPUs of nodes that are ready: held by a job, free, or faulty and held by none.",
                &["state"],
            ),
            sessions: all.gauge("muster_sessions", "Open sessions of nodes."),
            sessions_opened: all.counter("muster_sessions_opened_total", "Sessions that nodes have opened."),
            slow_streams: all.counters(
                "muster_streams_dropped_total",
                "Streams that were ended because their reader did not keep up.",
                &["stream"],
            ),
            points: all.counter("muster_points_received_total", "Points that nodes have sent, repetitions included."),
            points_put_off: all.counter(
                "muster_points_put_off_total",
                "Times that a node was asked to send points again, because too many waited to be written.",
            ),
            refused: all.counters(
                "muster_node_messages_refused_total",
                "Batches of points and reports of gangs that were refused: the node does not hold what they are of.",
                &["kind"],
            ),
            accepts_failed: all.counter(
                "muster_accepts_failed_total",
                "Connections that could not be taken, most often because open files ran out.",
            ),
            connections_refused: all.counter(
                "muster_connections_refused_total",
                "Connections that were ended at once, for their address or strangers had their share.",
            ),
            commit_seconds: all.histogram(
                "muster_store_commit_seconds",
                "Time that the store took to make a group of decisions durable.",
                &SECONDS,
            ),
            store_errors: all.counters(
                "muster_store_errors_total",
                "Commits that have failed: retryable are tried again, others end the time of leading.",
                &["kind"],
            ),
            store_writable: all.gauge("muster_store_writable", "Whether the store can be written, as far as is known."),
            inbox_depth: all.gauge(
                "muster_driver_inbox_depth",
                "Requests and messages that wait for the one task that decides.",
            ),
            pauses: all.counter(
                "muster_driver_pauses_total",
                "Times that this process did not run, or was slow to answer, and so extended every lease.",
            ),
            leader: all.gauge("muster_leader", "Whether this coordinator leads."),
            leader_term: all.gauge("muster_leader_term", "Number of the time of leading; 0 while another one leads."),
            calls: all.counters(
                "muster_grpc_requests_total",
                "Calls that have ended, by method and status code; a caller that went away counts as Cancelled.",
                &["method", "code"],
            ),
            call_seconds: all.histograms(
                "muster_grpc_request_seconds",
                "Time until a call was answered, or its stream began.",
                &["method"],
                &SECONDS,
            ),
            catalogue: all,
        };
        // So that a rate can be told from the first one on.
        for stream in SLOW_STREAMS {
            counts.slow_streams.with_label_values(&[stream]);
        }
        for kind in REFUSED {
            counts.refused.with_label_values(&[kind]);
        }
        for method in calls::methods() {
            counts.call_seconds.with_label_values(&[method]);
            counts.calls.with_label_values(&[method, "Ok"]);
        }
        for kind in STORE_ERRORS {
            counts.store_errors.with_label_values(&[kind]);
        }
        let limit = counts.catalogue.gauge(
            "muster_driver_inbox_depth_max",
            "Most that may wait; whoever comes beyond it waits in front.",
        );
        limit.set(INBOX_MAX as i64);
        let monitor = Self(Arc::new(counts));
        tally::clear(&monitor);
        monitor
    }

    /// A commit has failed.
    pub fn store_failed(&self, error: &StoreError) {
        let kind = match error {
            StoreError::Retryable(_) => "retryable",
            StoreError::Fenced => "fenced",
            StoreError::Terminal(_) => "terminal",
        };
        self.store_errors.with_label_values(&[kind]).inc();
    }

    /// Counts a refusal. Returns whether to log it: the first, and then ever fewer, so that a node cannot fill the log.
    pub fn refused(&self, kind: &str) -> bool {
        let refused = self.refused.with_label_values(&[kind]);
        refused.inc();
        refused.get().is_power_of_two()
    }

    /// A stream was ended because its reader did not keep up.
    pub fn too_slow(&self, stream: &str) {
        self.slow_streams.with_label_values(&[stream]).inc();
    }

    /// The page that shows it.
    pub fn page(&self, office: Office) -> Page {
        let (monitor, ready) = (self.clone(), office.clone());
        Page {
            catalogue: self.catalogue.clone(),
            ready: Box::new(move || ready.ready()),
            refresh: Box::new(move || {
                let reign = office.reign().ok().filter(|_| office.leads());
                monitor.leader.set(i64::from(reign.is_some()));
                monitor.leader_term.set(reign.as_ref().map_or(0, |reign| reign.term as i64));
                let writable = reign.as_ref().is_some_and(|reign| reign.driver.trouble().is_none());
                follow(&monitor.accepts_failed, &ACCEPTS_FAILED);
                follow(&monitor.connections_refused, &CONNECTIONS_REFUSED);
                monitor.store_writable.set(i64::from(writable));
                let sessions = reign.as_ref().map_or(0, |reign| reign.driver.links().count());
                monitor.sessions.set(sessions as i64);
                monitor.inbox_depth.set(reign.map_or(0, |reign| reign.driver.inbox_depth() as i64));
            }),
        }
    }
}

/// Brings a counter up to what is counted where connections are taken, which knows no metrics.
fn follow(counter: &IntCounter, trouble: &Trouble) {
    counter.inc_by(trouble.count().saturating_sub(counter.get()));
}
