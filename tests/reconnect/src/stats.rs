//! What the nodes of the load see, added up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use muster_core::types::Millis;
use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::Context;

/// Counts since the last [`Stats::begin`].
#[derive(Debug, Default)]
pub struct Stats {
    /// Nodes whose session is open.
    pub open: AtomicUsize,
    /// Gangs' parts that run.
    pub running: AtomicUsize,
    /// Sessions that have ended, for whatever reason.
    pub closed: AtomicUsize,
    /// Parts that the coordinator stopped. Nobody dies and nobody cancels here: each is a false loss.
    pub stopped: AtomicUsize,
    /// Parts that their node had to stop because it could not renew its lease.
    pub fenced: AtomicUsize,
    spans: Mutex<Spans>,
}

/// Why attempts and sessions ended, as the node daemon's log says, and how often each since the last [`Stats::begin`].
static ENDINGS: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());
/// Reasons that are told apart.
const ENDINGS_MAX: usize = 64;

fn endings() -> std::sync::MutexGuard<'static, BTreeMap<String, usize>> {
    ENDINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts what the log says instead of writing it.
#[derive(Debug)]
pub struct Endings;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Endings {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        event.record(&mut Self);
    }
}

impl Visit for Endings {
    fn record_str(&mut self, field: &Field, why: &str) {
        let mut endings = endings();
        if field.name() == "error" && (endings.len() < ENDINGS_MAX || endings.contains_key(why)) {
            *endings.entry(why.to_owned()).or_default() += 1;
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[derive(Debug, Default)]
struct Spans {
    /// When it began.
    since: Millis,
    /// From then to each node's first welcome.
    welcomes: BTreeMap<usize, u64>,
    /// From the sending of a heartbeat to its acknowledgement.
    acks: Vec<u32>,
    /// Longest time that a node was without a renewed lease.
    silence_max: u64,
}

impl Stats {
    /// Forgets what was, except what is now.
    pub fn begin(&self, now: Millis) {
        self.closed.store(0, Ordering::Relaxed);
        endings().clear();
        *self.spans() = Spans { since: now, ..Spans::default() };
    }

    fn spans(&self) -> std::sync::MutexGuard<'_, Spans> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node is welcomed.
    pub fn welcomed(&self, node: usize, now: Millis) {
        let mut spans = self.spans();
        let since = now.since(spans.since).0;
        spans.welcomes.entry(node).or_insert(since);
    }

    /// A lease is renewed by what was sent then; the one before it was by what was sent at `last`.
    pub fn renewed(&self, now: Millis, sent: Millis, last: Option<Millis>) {
        let mut spans = self.spans();
        spans.acks.push(u32::try_from(now.since(sent).0).unwrap_or(u32::MAX));
        if let Some(last) = last {
            spans.silence_max = spans.silence_max.max(now.since(last).0);
        }
    }

    /// How many nodes have been welcomed.
    pub fn welcomes(&self) -> usize {
        self.spans().welcomes.len()
    }

    /// As the result has it.
    pub fn summary(&self) -> Value {
        let spans = self.spans();
        let welcomes: Vec<u64> = spans.welcomes.values().copied().collect();
        let acks: Vec<u64> = spans.acks.iter().map(|ack| u64::from(*ack)).collect();
        json!({
            "welcome_ms": quantiles(welcomes), "ack_ms": quantiles(acks), "acks": spans.acks.len(),
            "silence_ms_max": spans.silence_max, "sessions_closed": self.closed.load(Ordering::Relaxed),
            "endings": *endings(),
        })
    }
}

fn quantiles(mut all: Vec<u64>) -> Value {
    all.sort_unstable();
    let at = |part: f64| all.get(((all.len().max(1) - 1) as f64 * part) as usize).copied();
    json!({"p50": at(0.5), "p99": at(0.99), "max": at(1.0)})
}
