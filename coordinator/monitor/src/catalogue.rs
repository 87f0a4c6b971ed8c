//! The metrics of one daemon: each is made once, under a name that no other has.

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Bounds of histograms of seconds, from what memory takes to what a person waits for.
pub const SECONDS: [f64; 14] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The metrics of one daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Catalogue(Registry);

impl Catalogue {
    /// Holds what every daemon has: its version, and the process as Prometheus's own libraries describe it.
    pub fn new(role: &str, version: &str) -> Self {
        let all = Self(Registry::new());
        all.keep(ProcessCollector::for_self());
        let build = all.gauges("muster_build_info", "Version and kind of this daemon.", &["role", "version"]);
        build.with_label_values(&[role, version]).set(1);
        all
    }

    /// A value that goes up and down.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(expect(IntGauge::new(name, help)))
    }

    /// The same for each value of some labels.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(expect(IntGaugeVec::new(Opts::new(name, help), labels)))
    }

    /// A number that only grows.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(expect(IntCounter::new(name, help)))
    }

    /// The same for each value of some labels.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(expect(IntCounterVec::new(Opts::new(name, help), labels)))
    }

    /// How often a value was below each bound.
    pub fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        let opts = HistogramOpts::new(name, help).buckets(bounds.to_vec());
        self.register(expect(Histogram::with_opts(opts)))
    }

    /// The same for each value of some labels.
    pub fn histograms(&self, name: &str, help: &str, labels: &[&str], bounds: &[f64]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(bounds.to_vec());
        self.register(expect(HistogramVec::new(opts, labels)))
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: C) -> C {
        self.keep(metric.clone());
        metric
    }

    fn keep(&self, metric: impl Collector + 'static) {
        expect(self.0.register(Box::new(metric)));
    }

    /// Everything in Prometheus's text format, and the media type of that.
    pub fn text(&self) -> (Vec<u8>, &'static str) {
        let mut text = Vec::new();
        // Writing to memory does not fail, and a family without a value is left out beforehand.
        TextEncoder::new().encode(&self.0.gather(), &mut text).ok();
        (text, prometheus::TEXT_FORMAT)
    }
}

/// A name that no metric can have, or that another one has: whichever daemon has it does not even start in a test.
#[expect(clippy::expect_used, reason = "see above")]
fn expect<T>(made: prometheus::Result<T>) -> T {
    made.expect("the names of metrics are valid and each is used once")
}
