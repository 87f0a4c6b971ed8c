//! The core's records as the API shows them.

use muster_core::health::{Health, Verdict};
use muster_core::types::text::REDACTED;
use muster_core::types::{NodeName, Rank, Surroundings};
use muster_core::{Awaited, Job, JobState, Node, NodeState, PastGeneration, Rendezvous, RootCause};
use muster_proto::convert::{
    finding_to_wire, inventory_to_wire, placement_to_wire, rank_exit_to_wire, resources_to_wire,
    spec_to_wire, spec_to_wire_redacted, surroundings_to_wire, timestamp_to_wire,
};
use muster_proto::v1;

use crate::metrics::{Latest, Point};

/// How much of a job is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// All of it.
    Whole,
    /// Nothing of its command, of the values of its variables, and of what its ranks wrote.
    Redacted,
}

pub(crate) fn job(job: &Job, latest: Latest, sight: Sight) -> v1::Job {
    let (spec, reason, exit) = match sight {
        Sight::Whole => (spec_to_wire(&job.spec), job.reason.clone(), job.exit.as_ref().map(exit)),
        Sight::Redacted => (
            spec_to_wire_redacted(&job.spec),
            job.reason_redacted(),
            job.exit.as_ref().map(|cause| redacted(exit(cause))),
        ),
    };
    v1::Job {
        id: job.id.to_string(),
        name: job.spec.name.clone(),
        state: job_state(job.state).into(),
        generation: Some(job.generation.0),
        world_size: Some(job.world_size()),
        restarts_used: Some(job.restarts_used),
        reason,
        owner: job.owner.as_ref().map(ToString::to_string).unwrap_or_default(),
        cancelled_by: job.cancelled_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        redacted: sight == Sight::Redacted,
        placement: job.placements().iter().map(placement_to_wire).collect(),
        created: Some(timestamp_to_wire(job.created)),
        started: job.started.map(timestamp_to_wire),
        finished: job.finished.map(timestamp_to_wire),
        latest_step: latest.step,
        latest_loss: latest.loss,
        exit,
        spec: Some(spec),
        master: job
            .master()
            .map(|(addr, port)| std::net::SocketAddr::new(addr, port).to_string())
            .unwrap_or_default(),
        past: job.past.iter().map(|one| past(one, sight)).collect(),
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

fn exit(cause: &RootCause) -> v1::RankExit {
    rank_exit_to_wire(&cause.exit, cause.generation, cause.node.as_str())
}

fn redacted(mut exit: v1::RankExit) -> v1::RankExit {
    for text in [&mut exit.stderr_tail, &mut exit.error] {
        if !text.is_empty() {
            REDACTED.clone_into(text);
        }
    }
    exit
}

fn past(past: &PastGeneration, sight: Sight) -> v1::PastGeneration {
    v1::PastGeneration {
        generation: past.generation.0,
        nodes: past.placements.len() as u32,
        placed: Some(timestamp_to_wire(past.placed)),
        ended: Some(timestamp_to_wire(past.ended)),
        reason: match sight {
            Sight::Whole => past.reason.clone(),
            Sight::Redacted => past.reason_redacted(),
        },
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
        cordoned_by: node.cordoned_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        uncordoned_by: node.uncordoned_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        inventory: Some(inventory_to_wire(&node.inventory)),
        reserved: Some(resources_to_wire(node.reserved.amount)),
        job_ids: node.reserved.jobs.keys().map(ToString::to_string).collect(),
        joined: Some(timestamp_to_wire(node.joined)),
        changed: Some(timestamp_to_wire(node.changed)),
        drain: node.drain.as_ref().map(|drain| v1::Drain {
            reason: drain.reason.clone(),
            drained_by: drain.by.as_ref().map(ToString::to_string).unwrap_or_default(),
            deadline: drain.deadline.map(timestamp_to_wire),
        }),
        leftover_gangs: node.reserved.leftovers.keys().map(ToString::to_string).collect(),
        health: Some(health(&node.health)),
        location: node.location.parts().map(ToOwned::to_owned).collect(),
    }
}

/// Groups of nodes that are listed with what they add; they differ in a few ways at most, or each in its own.
const ENVIRONMENTS_MAX: usize = 256;

pub(crate) fn environments(job: &Job, sight: Sight) -> v1::GetJobEnvironmentResponse {
    let all = job.environments();
    let group = |(surroundings, nodes): &(&Surroundings, Vec<&NodeName>)| v1::NodeEnvironment {
        node_names: nodes.iter().map(ToString::to_string).collect(),
        surroundings: Some(match sight {
            Sight::Whole => surroundings_to_wire(surroundings),
            Sight::Redacted => redacted_surroundings(surroundings_to_wire(surroundings)),
        }),
    };
    v1::GetJobEnvironmentResponse {
        environments: all.iter().take(ENVIRONMENTS_MAX).map(group).collect(),
        environments_more: all.len().saturating_sub(ENVIRONMENTS_MAX) as u32,
    }
}

/// What the job itself sets is a part of its environment.
fn redacted_surroundings(mut surroundings: v1::Surroundings) -> v1::Surroundings {
    for variable in &mut surroundings.variables {
        if variable.source() == v1::VariableSource::Job {
            REDACTED.clone_into(&mut variable.value);
            variable.reason.clear();
        }
    }
    surroundings
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
