//! What this daemon shows of itself, its machine and its ranks to Prometheus.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use muster_core::health::{Finding, Severity};
use muster_core::types::{GangId, GangReport, Millis, ObservedPhase, RankExit};
use muster_core::{Inventory, PortState};
use muster_monitor::{Catalogue, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Page};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::{Config, Error};

/// All of it, shared. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Monitor(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    catalogue: Catalogue,
    connected: AtomicBool,
    /// Ranks that run, of each gang that is held.
    held: Mutex<BTreeMap<GangId, u32>>,
    session_connected: IntGauge,
    sessions: IntCounter,
    renewals: IntCounter,
    renewal_seconds: Histogram,
    gangs: IntGauge,
    ranks: IntGauge,
    generations: IntCounter,
    exits: IntCounterVec,
    fenced: IntCounter,
    points: IntCounter,
    given_up: IntCounter,
    log_bytes: IntCounter,
    gpus: IntGaugeVec,
    ports: IntGaugeVec,
    findings: IntGaugeVec,
}

/// Up to the usual lease.
const RENEWAL_SECONDS: [f64; 9] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const EXITS: [&str; 4] = ["ok", "code", "signal", "out_of_memory"];

impl Monitor {
    pub fn new() -> Self {
        let all = Catalogue::new("worker", env!("CARGO_PKG_VERSION"));
        let counts = Counts {
            connected: AtomicBool::new(false),
            held: Mutex::default(),
            session_connected: all.gauge(
                "muster_worker_session_connected",
                "Whether the coordinator has welcomed this daemon's open session.",
            ),
            sessions: all.counter("muster_worker_sessions_total", "Sessions in which the coordinator has welcomed it."),
            renewals: all.counter(
                "muster_worker_lease_renewals_total",
                "Heartbeats that the coordinator has acknowledged, the opening of a session included.",
            ),
            renewal_seconds: all.histogram(
                "muster_worker_lease_renewal_seconds",
                "Time from sending a heartbeat until this daemon has taken note of its acknowledgement.",
                &RENEWAL_SECONDS,
            ),
            gangs: all.gauge("muster_worker_gangs", "Gangs of which something is held, ended ones until all is told."),
            ranks: all.gauge("muster_worker_ranks_running", "Ranks that run on this node."),
            generations: all.counter(
                "muster_worker_generations_total",
                "Gangs that were prepared here, each start of one anew.",
            ),
            exits: all.counters("muster_worker_rank_exits_total", "Ranks that have ended, by how.", &["how"]),
            fenced: all.counter(
                "muster_worker_fenced_total",
                "Gangs that were stopped because the lease ran out without a word from the coordinator.",
            ),
            points: all.counter("muster_worker_points_sent_total", "Points that were sent, repetitions included."),
            given_up: all.counter(
                "muster_worker_ranks_given_up_total",
                "Ended ranks whose last points were given up because too many waited.",
            ),
            log_bytes: all.counter(
                "muster_worker_log_bytes_sent_total",
                "Bytes of the ranks' output that were sent to whoever asked; what nobody asks for stays on the disk.",
            ),
            gpus: all.gauges("muster_worker_gpus", "GPUs of this machine.", &["state"]),
            ports: all.gauges(
                "muster_worker_fabric_ports",
                "InfiniBand and RoCE ports of this machine, by whether they are ACTIVE.",
                &["state"],
            ),
            findings: all.gauges(
                "muster_worker_findings",
                "What is wrong with this machine, by how bad it is; `muster node` has it in words.",
                &["severity"],
            ),
            catalogue: all,
        };
        for how in EXITS {
            counts.exits.with_label_values(&[how]);
        }
        let monitor = Self(Arc::new(counts));
        monitor.machine(&Inventory::default(), &[]);
        monitor
    }

    /// Serves it where the settings say so, for as long as what is returned is kept.
    ///
    /// Prints `{"http_listening":"address:port"}` as the first line on standard error.
    pub async fn serve(&self, config: &Config) -> Result<Option<AbortOnDropHandle<()>>, Error> {
        let bound = muster_monitor::bind(config.http).await?;
        let Some(listener) = bound else { return Ok(None) };
        if let Ok(address) = listener.local_addr() {
            let says = serde_json::json!({ "http_listening": address.to_string() });
            muster_monitor::announce(&says.to_string());
        }
        let counts = self.0.clone();
        let ready = move || {
            let connected = counts.connected.load(Ordering::Relaxed);
            let why = "no coordinator has welcomed this daemon; its ranks, if any, run on";
            connected.then_some(()).ok_or_else(|| why.to_owned())
        };
        let page =
            Page { catalogue: self.0.catalogue.clone(), ready: Box::new(ready), refresh: Box::new(|| ()) };
        let serving = muster_monitor::serve(listener, page, CancellationToken::new());
        Ok(Some(AbortOnDropHandle::new(tokio::spawn(serving))))
    }

    pub fn welcomed(&self) {
        self.0.sessions.inc();
        self.set_connected(true);
    }

    pub fn set_connected(&self, connected: bool) {
        self.0.connected.store(connected, Ordering::Relaxed);
        self.0.session_connected.set(i64::from(connected));
    }

    /// A lease was granted or renewed, so long after that was asked for.
    pub fn renewed(&self, after: Millis) {
        self.0.renewals.inc();
        self.0.renewal_seconds.observe(after.0 as f64 / 1000.0);
    }

    /// A gang is to be prepared.
    pub fn started(&self) {
        self.0.generations.inc();
    }

    /// A gang's lease ran out.
    pub fn fenced(&self) {
        self.0.fenced.inc();
    }

    pub fn exited(&self, exit: &RankExit) {
        let [ok, code, signal, out_of_memory] = EXITS;
        let how = match exit {
            _ if exit.out_of_memory => out_of_memory,
            _ if exit.is_success() => ok,
            _ if exit.signal.is_some() => signal,
            _ => code,
        };
        self.0.exits.with_label_values(&[how]).inc();
    }

    /// What a gang is now, of which so many ranks were to run here; none if it is given up.
    pub fn gang(&self, gang: &GangId, report: Option<&GangReport>, procs: u32) {
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        match report {
            None => held.remove(gang),
            Some(report) => {
                let ended = report.exits.len() as u32;
                let running = report.phase == ObservedPhase::Running;
                held.insert(gang.clone(), if running { procs.saturating_sub(ended) } else { 0 })
            }
        };
        self.0.gangs.set(held.len() as i64);
        self.0.ranks.set(held.values().copied().map(i64::from).sum());
    }

    pub fn points_sent(&self, count: usize) {
        self.0.points.inc_by(count as u64);
    }

    /// The last points of so many ended ranks were given up.
    pub fn given_up(&self, ranks: usize) {
        self.0.given_up.inc_by(ranks as u64);
    }

    /// Counts bytes of output on their way up.
    pub fn log_bytes(&self) -> IntCounter {
        self.0.log_bytes.clone()
    }

    /// What the machine has, and what is wrong with it.
    pub fn machine(&self, inventory: &Inventory, findings: &[Finding]) {
        let faulty = inventory.gpus.iter().filter(|gpu| gpu.fault.is_some()).count();
        let ports = &inventory.fabric_ports;
        let active = ports.iter().filter(|port| port.state == PortState::Active).count();
        let of = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
        for (gauges, label, count) in [
            (&self.0.gpus, "well", inventory.gpus.len() - faulty),
            (&self.0.gpus, "faulty", faulty),
            (&self.0.ports, "active", active),
            (&self.0.ports, "other", ports.len() - active),
            (&self.0.findings, "degraded", of(Severity::Degraded)),
            (&self.0.findings, "quarantined", of(Severity::Quarantined)),
        ] {
            gauges.with_label_values(&[label]).set(count as i64);
        }
    }
}

#[cfg(test)]
mod tests {
    use muster_core::types::{Generation, JobId, Rank};
    use muster_core::{Device, FabricPort};

    use super::*;

    #[test]
    fn what_is_counted() {
        let monitor = Monitor::new();
        let gang = GangId { job: JobId::new("j").unwrap(), generation: Generation(1) };
        let exit = |rank, code, signal, out_of_memory| RankExit {
            rank: Rank(rank),
            code,
            signal,
            time: Millis(0),
            stderr_tail: String::new(),
            out_of_memory,
            error: None,
        };
        let exits =
            [exit(0, Some(0), None, false), exit(1, None, Some(9), true), exit(2, None, Some(15), false)];
        for exit in &exits {
            monitor.exited(exit);
        }
        let report = |phase, exits: &[RankExit]| GangReport {
            gang: gang.clone(),
            phase,
            master_port: None,
            exits: exits.to_vec(),
            error: None,
            quiet: Vec::new(),
            processes: Vec::new(),
            rendezvous: None,
            surroundings: None,
        };
        let held = || (monitor.0.gangs.get(), monitor.0.ranks.get());
        let table = [
            (Some(report(ObservedPhase::Prepared, &[])), (1, 0)),
            (Some(report(ObservedPhase::Running, &[])), (1, 4)),
            (Some(report(ObservedPhase::Running, &exits)), (1, 1)),
            (Some(report(ObservedPhase::Stopped, &exits)), (1, 0)),
            (None, (0, 0)),
        ];
        for (report, expected) in table {
            monitor.gang(&gang, report.as_ref(), 4);
            assert_eq!(held(), expected, "{report:?}");
        }
        let fault = Some("lost".to_owned());
        let gpus = vec![Device::default(), Device { fault, ..Device::default() }];
        let fabric_ports = vec![FabricPort::default()];
        monitor.machine(&Inventory { gpus, fabric_ports, ..Inventory::default() }, &[]);
        let text = String::from_utf8(monitor.0.catalogue.text().0).unwrap();
        for line in [
            "muster_worker_rank_exits_total{how=\"ok\"} 1\n",
            "muster_worker_rank_exits_total{how=\"out_of_memory\"} 1\n",
            "muster_worker_rank_exits_total{how=\"signal\"} 1\n",
            "muster_worker_gpus{state=\"faulty\"} 1\n",
            "muster_worker_fabric_ports{state=\"active\"} 0\n",
            "muster_worker_findings{severity=\"quarantined\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
