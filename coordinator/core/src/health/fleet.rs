//! What nodes of one kind have in common, so that one that has less is noticed: NCCL passes over a port that is down
//! without a word, and training is merely slow. Counts are kept as nodes come and change; nothing walks over them all.

use std::collections::BTreeMap;

use super::{Finding, Severity};
use crate::inventory::Inventory;

/// So many others must agree before a node that differs is the one that is wrong.
const AGREEING_MIN: usize = 3;
/// Ways in which the ports of one kind of node may differ and still be compared: beyond it there is no norm.
const WAYS_MAX: usize = 64;

/// Nodes that should be alike: the model and number of their GPUs, and the number of their ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    model: String,
    gpus: usize,
    ports: usize,
}

/// What can be used of the ports of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rails {
    active: u32,
    total_mbps: u64,
}

/// How many nodes of each kind have which rails.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    kinds: BTreeMap<Kind, BTreeMap<Rails, usize>>,
}

fn of(inventory: &Inventory) -> Option<(Kind, Rails)> {
    if inventory.fabric_ports.is_empty() {
        return None;
    }
    let model = inventory.gpus.first().map(|gpu| gpu.model.clone()).unwrap_or_default();
    let kind = Kind { model, gpus: inventory.gpus.len(), ports: inventory.fabric_ports.len() };
    let active = inventory.fabric_ports.iter().filter(|port| port.is_active());
    let total_mbps = active.clone().map(|port| u64::from(port.rate_mbps)).sum();
    Some((kind, Rails { active: active.count() as u32, total_mbps }))
}

impl Fleet {
    pub fn add(&mut self, inventory: &Inventory) {
        if let Some((kind, rails)) = of(inventory) {
            *self.kinds.entry(kind).or_default().entry(rails).or_default() += 1;
        }
    }

    pub fn remove(&mut self, inventory: &Inventory) {
        let Some((kind, rails)) = of(inventory) else { return };
        let Some(ways) = self.kinds.get_mut(&kind) else { return };
        match ways.get_mut(&rails) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) => _ = ways.remove(&rails),
            None => {}
        }
        if ways.is_empty() {
            self.kinds.remove(&kind);
        }
    }

    /// What a node has less of than most of those like it.
    pub fn compare(&self, inventory: &Inventory) -> Option<Finding> {
        let (kind, own) = of(inventory)?;
        let ways = self.kinds.get(&kind).filter(|ways| ways.len() <= WAYS_MAX)?;
        let others: usize = ways.values().sum::<usize>().saturating_sub(1);
        let (usual, count) = ways.iter().max_by_key(|(rails, count)| (**count, **rails))?;
        let lacks = own.active < usual.active || own.total_mbps < usual.total_mbps;
        if !lacks || *count < AGREEING_MIN || count * 2 <= others {
            return None;
        }
        let gbps = |mbps: u64| mbps as f64 / 1000.0;
        let reason = if own.active < usual.active {
            let down: Vec<String> = (inventory.fabric_ports.iter().filter(|port| !port.is_active()))
                .map(|port| format!("{} is {}", port.name(), port.state.name()))
                .take(4)
                .collect();
            format!(
                "{} of {} ports are active ({}); {count} of {others} nodes like it have {}",
                own.active,
                kind.ports,
                down.join(", "),
                usual.active
            )
        } else {
            let slowest =
                inventory.fabric_ports.iter().filter(|port| port.is_active()).min_by_key(|p| p.rate_mbps)?;
            format!(
                "its active ports have {} Gb/s together ({} has {}); {count} of {others} nodes like it have {}",
                gbps(own.total_mbps),
                slowest.name(),
                gbps(slowest.rate_mbps.into()),
                gbps(usual.total_mbps)
            )
        };
        // Without any port NCCL falls back on sockets, which holds up every other node of a gang.
        let severity = if own.active == 0 { Severity::Quarantined } else { Severity::Degraded };
        Some(Finding { subject: "fabric".to_owned(), severity, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{FabricPort, PortState};

    fn node(rates: &[u32]) -> Inventory {
        let port = |(index, rate): (usize, &u32)| FabricPort {
            device: format!("mlx5_{index}"),
            port: 1,
            state: if *rate > 0 { PortState::Active } else { PortState::Down },
            rate_mbps: *rate,
            ..FabricPort::default()
        };
        Inventory { fabric_ports: rates.iter().enumerate().map(port).collect(), ..Inventory::default() }
    }

    #[test]
    fn one_that_has_less_than_most_of_its_kind_is_named() {
        let well = node(&[400_000, 400_000]);
        let table: [(&[u32], usize, Option<&str>); 7] = [
            (&[400_000, 400_000], 4, None),
            (
                &[400_000, 0],
                4,
                Some("1 of 2 ports are active (mlx5_1:1 is DOWN); 4 of 4 nodes like it have 2"),
            ),
            (
                &[400_000, 200_000],
                4,
                Some(
                    "its active ports have 600 Gb/s together (mlx5_1:1 has 200); 4 of 4 nodes like it have 800",
                ),
            ),
            (
                &[0, 0],
                3,
                Some(
                    "0 of 2 ports are active (mlx5_0:1 is DOWN, mlx5_1:1 is DOWN); 3 of 3 nodes like it have 2",
                ),
            ),
            (&[400_000, 0], 2, None),
            (&[400_000], 4, None),
            (&[], 4, None),
        ];
        for (rates, others, expected) in table {
            let mut fleet = Fleet::default();
            (0..others).for_each(|_| fleet.add(&well));
            let one = node(rates);
            fleet.add(&one);
            let found = fleet.compare(&one);
            assert_eq!(found.as_ref().map(|finding| finding.reason.as_str()), expected, "{rates:?}");
            assert_eq!(fleet.compare(&well), None, "{rates:?}");
            fleet.remove(&one);
            (0..others).for_each(|_| fleet.remove(&well));
            assert!(fleet.kinds.is_empty());
        }
    }
}
