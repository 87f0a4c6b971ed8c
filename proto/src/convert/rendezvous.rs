//! What the store of a gang's ranks shows.

use muster_core::types::rendezvous::{
    CLIENTS_TOLD_MAX, HOSTS_TOLD_MAX, PROCESSES_TOLD_MAX, RendezvousClient, RendezvousHost, RendezvousWait,
    WAITS_TOLD_MAX,
};
use muster_core::types::{Millis, Rank, RendezvousReport};

use super::FieldError;
use super::gang::address;
use super::time::{millis_from_timestamp, timestamp_to_wire};
use crate::v1;

/// Longest key, in characters: 120 bytes with every one of them escaped, and what says that it was cut.
const KEY_CHARS_MAX: usize = 481;

fn time(time: Option<&prost_types::Timestamp>) -> Millis {
    time.map(millis_from_timestamp).unwrap_or_default()
}

/// Checks a report. Of lists that are too long the beginning is taken: they are for people.
pub(super) fn rendezvous_from_wire(wire: v1::RendezvousReport) -> Result<RendezvousReport, FieldError> {
    let mut room = PROCESSES_TOLD_MAX;
    let host = |wire: v1::RendezvousHost| {
        // Some of a host's processes without the others would say that those others have not come.
        let left = room.checked_sub(wire.ranks.len() + wire.process_ids.len());
        let (ranks, processes) =
            if left.is_some() { (wire.ranks, wire.process_ids) } else { Default::default() };
        room = left.unwrap_or(room);
        Ok(RendezvousHost {
            address: address("rendezvous.hosts.address", &wire.address)?,
            come: wire.come,
            ranks: ranks.into_iter().map(Rank).collect(),
            processes,
        })
    };
    let hosts = if wire.hosts.len() > HOSTS_TOLD_MAX { Vec::new() } else { wire.hosts };
    Ok(RendezvousReport {
        come: wire.come,
        last_came: time(wire.last_came.as_ref()),
        hosts: hosts.into_iter().map(host).collect::<Result<_, _>>()?,
        waits: wire.waits.into_iter().take(WAITS_TOLD_MAX).map(wait_from_wire).collect::<Result<_, _>>()?,
        waits_more: wire.waits_more,
    })
}

fn wait_from_wire(wire: v1::RendezvousWait) -> Result<RendezvousWait, FieldError> {
    let client = |wire: v1::RendezvousClient| {
        Ok(RendezvousClient {
            address: address("rendezvous.waits.clients.address", &wire.address)?,
            process: wire.process_id,
            rank: wire.rank.map(Rank),
        })
    };
    Ok(RendezvousWait {
        key: wire.key.chars().take(KEY_CHARS_MAX).collect(),
        setter: wire.setter.map(Rank),
        waiting: wire.waiting,
        clients: wire.clients.into_iter().take(CLIENTS_TOLD_MAX).map(client).collect::<Result<_, _>>()?,
        since: time(wire.since.as_ref()),
    })
}

/// A report as it is.
pub(super) fn rendezvous_to_wire(report: &RendezvousReport) -> v1::RendezvousReport {
    let host = |host: &RendezvousHost| v1::RendezvousHost {
        address: host.address.to_string(),
        come: host.come,
        ranks: host.ranks.iter().map(|rank| rank.0).collect(),
        process_ids: host.processes.clone(),
    };
    let client = |client: &RendezvousClient| v1::RendezvousClient {
        address: client.address.to_string(),
        process_id: client.process,
        rank: client.rank.map(|rank| rank.0),
    };
    let wait = |wait: &RendezvousWait| v1::RendezvousWait {
        key: wait.key.clone(),
        setter: wait.setter.map(|rank| rank.0),
        waiting: wait.waiting,
        clients: wait.clients.iter().map(client).collect(),
        since: Some(timestamp_to_wire(wait.since)),
    };
    v1::RendezvousReport {
        come: report.come,
        last_came: Some(timestamp_to_wire(report.last_came)),
        hosts: report.hosts.iter().map(host).collect(),
        waits: report.waits.iter().map(wait).collect(),
        waits_more: report.waits_more,
    }
}
