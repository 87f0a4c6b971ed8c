//! What is wrong with a machine, from what is read of it now and then. Pure: readings go in with the time, findings come
//! out. What lasts for one look only is no finding, and counters count by what they have grown.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use muster_core::health::{FINDINGS_MAX, Finding, Severity};
use muster_core::types::Millis;
use muster_core::{Device, FabricPort, Inventory};
use serde::Deserialize;

use crate::surroundings::awaited_ports;

/// A state counts once it was seen in so many looks, one after the other.
const LOOKS: u32 = 2;
/// Counters are looked at over this time.
const WINDOW: Millis = Millis::from_secs(10 * 60);
/// Times that a link may go down in it: a cable that is moved does so once or twice.
const FLAPS_DEGRADED: u64 = 3;
const FLAPS_QUARANTINED: u64 = 6;
/// Errors on a link in it: one a second. InfiniBand allows for one in half a minute.
const ERRORS_DEGRADED: u64 = 600;
/// Free space of the data directory: below it logs and points are about to be dropped.
const DISK_LOW_PERCENT: u64 = 5;
/// So much is enough, however small a part of a large file system it is.
const DISK_AMPLE_BYTES: u64 = 10 << 30;
/// A job that starts would not get far.
const DISK_QUARANTINED_BYTES: u64 = 64 << 20;
/// A file system this small is somebody's choice, and is not judged.
const DISK_JUDGED_BYTES: u64 = 4 << 30;
/// Memory that is available: below it the kernel is about to kill.
const MEMORY_DEGRADED_PERCENT: u64 = 2;
/// Longest words of a check that are shown.
const CHECK_WORDS_MAX: usize = 300;

/// What a fabric port has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Times that its link went down.
    pub link_downed: u64,
    /// Errors on it.
    pub errors: u64,
}

/// How much there is of something, and how much of it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes left.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

impl Space {
    /// Of the data directory: too little is left for logs to last.
    pub(crate) fn is_low_for_logs(self) -> bool {
        self.is_below(1)
    }

    /// Below so many times what is low.
    fn is_below(self, times: u64) -> bool {
        let part = u128::from(self.total_bytes) * u128::from(DISK_LOW_PERCENT) / 100;
        u128::from(self.free_bytes) < part.min(u128::from(DISK_AMPLE_BYTES)) * u128::from(times)
    }
}

/// Everything that was read at one look.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// What the machine has.
    pub inventory: Inventory,
    /// By the name of the port, `mlx5_0:1`.
    pub counters: BTreeMap<String, PortCounters>,
    /// Of the daemon's data directory.
    pub disk: Option<Space>,
    /// Memory.
    pub memory: Option<Space>,
    /// What the user's checks have found.
    pub checks: Vec<Finding>,
}

/// How a user's check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckEnd {
    /// With this exit code; none if a signal ended it.
    Exited(Option<i32>),
    /// It had to be ended: it took too long.
    TimedOut,
    /// It could not be started.
    NotStarted,
}

/// What a check may say of itself, in one line of JSON.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CheckLine {
    reason: String,
}

/// What follows from a check: exit code 0 is well, 1 degraded, 2 quarantined, as for Nagios. Anything else says that the
/// check is broken, which is no reason to take the machine out. `line` is the first that it wrote: JSON with a reason, or
/// plain words.
pub fn judge_check(name: &str, end: CheckEnd, line: &str) -> Option<Finding> {
    let said: CheckLine =
        serde_json::from_str(line).unwrap_or_else(|_| CheckLine { reason: line.to_owned() });
    let words: String = said.reason.chars().filter(|c| !c.is_control()).take(CHECK_WORDS_MAX).collect();
    let or = |default: &str| if words.is_empty() { default.to_owned() } else { words.clone() };
    let (severity, reason) = match end {
        CheckEnd::Exited(Some(0)) => return None,
        CheckEnd::Exited(Some(1)) => (Severity::Degraded, or("the check ended with exit code 1")),
        CheckEnd::Exited(Some(2)) => (Severity::Quarantined, or("the check ended with exit code 2")),
        CheckEnd::Exited(Some(code)) => {
            let broken = format!("the check is broken: it ended with exit code {code}");
            (Severity::Degraded, format!("{broken}{}{words}", if words.is_empty() { "" } else { ": " }))
        }
        CheckEnd::Exited(None) => (Severity::Degraded, "the check is broken: a signal ended it".to_owned()),
        CheckEnd::TimedOut => (Severity::Degraded, "the check does not end, and was killed".to_owned()),
        CheckEnd::NotStarted => (Severity::Degraded, format!("the check cannot be started: {words}")),
    };
    Some(Finding { subject: format!("check {name}"), severity, reason })
}

/// What is remembered of a port.
#[derive(Debug, Default)]
struct Port {
    /// It has been active since this daemon began.
    was_active: bool,
    down_looks: u32,
    last: Option<PortCounters>,
    /// By how much it grew, and when.
    growth: VecDeque<(Millis, PortCounters)>,
}

/// Looks at one machine again and again.
#[derive(Debug, Default)]
pub struct Monitor {
    ports: BTreeMap<String, Port>,
    /// Those of the first look, with their places on the bus.
    gpus: Option<BTreeMap<String, String>>,
    short_of_memory_looks: u32,
    disk_is_low: bool,
}

impl Monitor {
    /// What is wrong, the worst first.
    pub fn look(&mut self, now: Millis, readings: &Readings) -> Vec<Finding> {
        let mut all = Vec::new();
        self.look_at_gpus(&readings.inventory, &mut all);
        self.look_at_ports(now, readings, &mut all);
        self.look_at_space(readings, &mut all);
        all.extend(readings.checks.iter().cloned());
        // Stable: what is of the same severity stays in its order.
        all.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        all.truncate(FINDINGS_MAX);
        all
    }

    fn look_at_gpus(&mut self, inventory: &Inventory, all: &mut Vec<Finding>) {
        let id = |gpu: &Device| (gpu.uuid.clone(), gpu.pci_address.clone());
        let ids: BTreeMap<String, String> = inventory.gpus.iter().map(id).collect();
        if !inventory.gpu_fault.is_empty() {
            let (severity, reason) = (Severity::Quarantined, inventory.gpu_fault.clone());
            // What is gone is not known then.
            return all.push(Finding { subject: "GPUs".into(), severity, reason });
        }
        let known = self.gpus.get_or_insert_with(|| ids.clone());
        // Those that are faulty may no longer say who they are.
        let faulty = inventory.gpus.iter().filter(|gpu| gpu.fault.is_some()).count();
        // One that is divided (MIG) meanwhile, or otherwise than before, has other names in its
        // place on the bus.
        let places: BTreeSet<&String> = ids.values().filter(|place| !place.is_empty()).collect();
        let gone = known.iter().filter(|(uuid, place)| !ids.contains_key(*uuid) && !places.contains(place));
        let gone: Vec<&str> = gone.map(|(uuid, _)| uuid.as_str()).collect();
        if gone.len() > faulty {
            let reason =
                format!("{} is gone, and the others have new numbers; reboot the machine", gone.join(", "));
            all.push(Finding { subject: "GPUs".into(), severity: Severity::Quarantined, reason });
        }
        for gpu in &inventory.gpus {
            if let Some(fault) = &gpu.fault {
                let severity =
                    if faulty == inventory.gpus.len() { Severity::Quarantined } else { Severity::Degraded };
                all.push(Finding { subject: format!("GPU {}", gpu.index), severity, reason: fault.clone() });
            }
        }
    }

    fn look_at_ports(&mut self, now: Millis, readings: &Readings, all: &mut Vec<Finding>) {
        let awaited: BTreeSet<String> =
            awaited_ports(&readings.inventory).into_iter().map(FabricPort::name).collect();
        for port in &readings.inventory.fabric_ports {
            let name = port.name();
            let seen = self.ports.entry(name.clone()).or_default();
            let mut flaps = 0;
            if port.is_active() {
                (seen.was_active, seen.down_looks) = (true, 0);
            } else {
                // Not every device counts; what is seen counts as well.
                flaps = u64::from(seen.was_active && seen.down_looks == 0);
                seen.down_looks = seen.down_looks.saturating_add(1);
            }
            let mut grown = PortCounters::default();
            if let Some(counters) = readings.counters.get(&name) {
                // A counter that is lower than before was reset.
                let last = seen.last.unwrap_or(*counters);
                let since = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
                grown.link_downed = since(counters.link_downed, last.link_downed);
                grown.errors = since(counters.errors, last.errors);
                seen.last = Some(*counters);
            }
            grown.link_downed = grown.link_downed.max(flaps);
            if grown != PortCounters::default() {
                seen.growth.push_back((now, grown));
            }
            while seen.growth.front().is_some_and(|(at, _)| now.since(*at) > WINDOW) {
                seen.growth.pop_front();
            }
            let sum = |what: fn(&PortCounters) -> u64| {
                seen.growth.iter().map(|(_, grown)| what(grown)).sum::<u64>()
            };
            let (downs, errors) = (sum(|grown| grown.link_downed), sum(|grown| grown.errors));
            let mut add = |severity, reason| all.push(Finding { subject: name.clone(), severity, reason });
            if downs >= FLAPS_DEGRADED {
                let severity =
                    if downs >= FLAPS_QUARANTINED { Severity::Quarantined } else { Severity::Degraded };
                add(
                    severity,
                    format!("its link went down {downs} times within 10 minutes; look at its cable"),
                );
            } else if seen.was_active && seen.down_looks >= LOOKS {
                add(Severity::Degraded, format!("is {}, and was ACTIVE", port.state.name()));
            } else if seen.down_looks >= LOOKS && awaited.contains(&name) {
                // Nobody need compare it with others: it has a link, and is for training.
                let state = port.state.name();
                add(
                    Severity::Degraded,
                    format!("is {state}: no subnet manager configures it, and ranks do without"),
                );
            }
            if errors >= ERRORS_DEGRADED {
                let reason = format!("{errors} errors on its link within 10 minutes; look at its cable");
                add(Severity::Degraded, reason);
            }
        }
        let here: BTreeSet<String> = readings.inventory.fabric_ports.iter().map(FabricPort::name).collect();
        for (name, _) in self.ports.iter().filter(|(name, port)| port.was_active && !here.contains(*name)) {
            let reason = "is gone, and was ACTIVE; look for its device on the bus".to_owned();
            all.push(Finding { subject: name.clone(), severity: Severity::Degraded, reason });
        }
    }

    fn look_at_space(&mut self, readings: &Readings, all: &mut Vec<Finding>) {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let percent = |space: &Space| space.free_bytes.saturating_mul(100) / space.total_bytes.max(1);
        let words = |space: &Space| {
            format!("{:.1} of {:.1} GiB are free", gib(space.free_bytes), gib(space.total_bytes))
        };
        if let Some(disk) = readings.disk.filter(|disk| disk.total_bytes >= DISK_JUDGED_BYTES) {
            // Once it is low it has to be well above before it is not.
            self.disk_is_low = disk.is_below(if self.disk_is_low { 2 } else { 1 });
            if self.disk_is_low {
                let full = disk.free_bytes < DISK_QUARANTINED_BYTES;
                let severity = if full { Severity::Quarantined } else { Severity::Degraded };
                let reason = format!("{} where the daemon keeps logs; remove old ones", words(&disk));
                all.push(Finding { subject: "disk".into(), severity, reason });
            }
        }
        let short = readings.memory.filter(|memory| percent(memory) < MEMORY_DEGRADED_PERCENT);
        self.short_of_memory_looks =
            if short.is_some() { self.short_of_memory_looks.saturating_add(1) } else { 0 };
        if let Some(memory) = short.filter(|_| self.short_of_memory_looks >= LOOKS) {
            let (severity, reason) = (Severity::Degraded, words(&memory));
            all.push(Finding { subject: "memory".into(), severity, reason });
        }
    }
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;
