//! The core's records as the API shows them.

use muster_core::health::{Health, Verdict};
use muster_core::types::{NodeName, Rank, Surroundings};
use muster_core::{Awaited, Job, JobState, Node, NodeState, PastGeneration, Rendezvous};
use muster_proto::convert::{
    finding_to_wire, inventory_to_wire, placement_to_wire, rank_exit_to_wire, resources_to_wire,
    spec_to_wire, surroundings_to_wire, timestamp_to_wire,
};
use muster_proto::v1;

use crate::metrics::{Latest, Point};

pub(crate) fn job(job: &Job, latest: Latest) -> v1::Job {
    v1::Job {
        id: job.id.to_string(),
        name: job.spec.name.clone(),
        state: job_state(job.state).into(),
        generation: Some(job.generation.0),
        world_size: Some(job.world_size()),
        restarts_used: Some(job.restarts_used),
        reason: job.reason.clone(),
        placement: job.placements().iter().map(placement_to_wire).collect(),
        created: Some(timestamp_to_wire(job.created)),
        started: job.started.map(timestamp_to_wire),
        finished: job.finished.map(timestamp_to_wire),
        latest_step: latest.step,
        latest_loss: latest.loss,
        exit: job
            .exit
            .as_ref()
            .map(|cause| rank_exit_to_wire(&cause.exit, cause.generation, cause.node.as_str())),
        spec: Some(spec_to_wire(&job.spec)),
        master: job
            .master()
            .map(|(addr, port)| std::net::SocketAddr::new(addr, port).to_string())
            .unwrap_or_default(),
        past: job.past.iter().map(past).collect(),
        rendezvous: job.rendezvous().map(rendezvous),
    }
}

fn rendezvous(stuck: Rendezvous) -> v1::Rendezvous {
    let on_node =
        |(rank, node): (Rank, NodeName)| v1::RankOnNode { rank: Some(rank.0), node_name: node.to_string() };
    let awaited = |awaited: Awaited| v1::AwaitedKey {
        key: awaited.key,
        setter: awaited.setter.map(on_node),
        waiting: awaited.waiting.into_iter().map(on_node).collect(),
        waiting_total: awaited.waiting_total,
        since: Some(timestamp_to_wire(awaited.since)),
    };
    v1::Rendezvous {
        come: Some(stuck.come),
        missing: stuck.missing.into_iter().map(on_node).collect(),
        missing_total: Some(stuck.missing_total),
        last_came: Some(timestamp_to_wire(stuck.last_came)),
        awaited: stuck.awaited.into_iter().map(awaited).collect(),
        awaited_more: stuck.awaited_more,
    }
}

fn past(past: &PastGeneration) -> v1::PastGeneration {
    v1::PastGeneration {
        generation: past.generation.0,
        nodes: past.placements.len() as u32,
        placed: Some(timestamp_to_wire(past.placed)),
        ended: Some(timestamp_to_wire(past.ended)),
        reason: past.reason.clone(),
    }
}

pub(crate) fn job_state(state: JobState) -> v1::JobState {
    match state {
        JobState::Queued => v1::JobState::Queued,
        JobState::Starting => v1::JobState::Starting,
        JobState::Running => v1::JobState::Running,
        JobState::Restarting => v1::JobState::Restarting,
        JobState::Stopping => v1::JobState::Stopping,
        JobState::Succeeded => v1::JobState::Succeeded,
        JobState::Failed => v1::JobState::Failed,
        JobState::Cancelled => v1::JobState::Cancelled,
    }
}

pub(crate) fn node(node: &Node) -> v1::Node {
    let state = match node.state {
        NodeState::Ready => v1::NodeState::Ready,
        NodeState::Disconnected => v1::NodeState::Disconnected,
        NodeState::Lost => v1::NodeState::Lost,
        NodeState::Left => v1::NodeState::Left,
    };
    v1::Node {
        name: node.name.to_string(),
        address: node.address.to_string(),
        state: state.into(),
        cordoned: node.cordon.is_some(),
        cordon_reason: node.cordon.clone().unwrap_or_default(),
        inventory: Some(inventory_to_wire(&node.inventory)),
        reserved: Some(resources_to_wire(node.reserved.amount)),
        job_ids: node.reserved.jobs.keys().map(ToString::to_string).collect(),
        joined: Some(timestamp_to_wire(node.joined)),
        changed: Some(timestamp_to_wire(node.changed)),
        drain: node.drain.as_ref().map(|drain| v1::Drain {
            reason: drain.reason.clone(),
            deadline: drain.deadline.map(timestamp_to_wire),
        }),
        leftover_gangs: node.reserved.leftovers.keys().map(ToString::to_string).collect(),
        health: Some(health(&node.health)),
        location: node.location.parts().map(ToOwned::to_owned).collect(),
    }
}

/// Groups of nodes that are listed with what they add; they differ in a few ways at most, or each in its own.
const ENVIRONMENTS_MAX: usize = 256;

pub(crate) fn environments(job: &Job) -> v1::GetJobEnvironmentResponse {
    let all = job.environments();
    let group = |(surroundings, nodes): &(&Surroundings, Vec<&NodeName>)| v1::NodeEnvironment {
        node_names: nodes.iter().map(ToString::to_string).collect(),
        surroundings: Some(surroundings_to_wire(surroundings)),
    };
    v1::GetJobEnvironmentResponse {
        environments: all.iter().take(ENVIRONMENTS_MAX).map(group).collect(),
        environments_more: all.len().saturating_sub(ENVIRONMENTS_MAX) as u32,
    }
}

fn health(health: &Health) -> v1::Health {
    let verdict = match health.verdict() {
        Verdict::Healthy => v1::HealthVerdict::Healthy,
        Verdict::Degraded => v1::HealthVerdict::Degraded,
        Verdict::Quarantined => v1::HealthVerdict::Quarantined,
    };
    v1::Health {
        verdict: verdict.into(),
        reason: health.reason().to_owned(),
        changed: Some(timestamp_to_wire(health.changed())),
        findings: health.findings().map(finding_to_wire).collect(),
    }
}

pub(crate) fn point(point: &Point) -> v1::Point {
    v1::Point {
        generation: point.generation.0,
        rank: Some(point.rank.0),
        step: Some(point.step),
        time: Some(timestamp_to_wire(point.time)),
        values: point.values.clone(),
        seq: point.seq,
    }
}
