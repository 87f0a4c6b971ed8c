//! Assignments, reports and what they are made of.

use std::net::IpAddr;

use muster_core::types::{
    Assignment, DesiredPhase, GangId, GangReport, Generation, JobId, Millis, NodeName, NodePlacement,
    ObservedPhase, Rank, RankExit, RankProgress, StopMode, limits,
};

use super::job::optional_stop_signal;
use super::job::{spec_from_wire, spec_to_wire};
use super::rendezvous::{rendezvous_from_wire, rendezvous_to_wire};
use super::surroundings::{surroundings_from_wire, surroundings_to_wire};
use super::time::{duration_to_wire, millis_from_timestamp, span_from_wire, timestamp_to_wire};
use super::{FieldError, field_error, required};
use crate::v1;

/// Longest tail of standard error, and longest error of a program, that an exit carries.
const STDERR_TAIL_BYTES_MAX: usize = 2048;
/// Longest error of a node, in characters.
const ERROR_CHARS_MAX: usize = 1024;

fn gang_id(job_id: String, generation: u32) -> Result<GangId, FieldError> {
    let job = JobId::new(job_id).map_err(|why| field_error("job_id", why))?;
    if generation == 0 {
        return Err(field_error("generation", "is 0; generations count from 1"));
    }
    Ok(GangId { job, generation: Generation(generation) })
}

pub(super) fn address(field: &str, text: &str) -> Result<IpAddr, FieldError> {
    text.parse().map_err(|_| field_error(field, format!("{text:?} is not an IP address")))
}

fn port(field: &str, port: u32) -> Result<Option<u16>, FieldError> {
    match u16::try_from(port) {
        Ok(0) => Ok(None),
        Ok(port) => Ok(Some(port)),
        Err(_) => Err(field_error(field, format!("{port} is not a port"))),
    }
}

/// Checks a placement.
pub fn placement_from_wire(wire: v1::NodePlacement) -> Result<NodePlacement, FieldError> {
    let first_rank = wire.first_rank.unwrap_or(0);
    if !(1..=limits::PROCS_PER_NODE_MAX).contains(&wire.procs)
        || first_rank > limits::WORLD_SIZE_MAX - wire.procs
    {
        return Err(field_error("placement.procs", "or first_rank is out of range"));
    }
    Ok(NodePlacement {
        node: NodeName::new(wire.node_name).map_err(|why| field_error("placement.node_name", why))?,
        address: address("placement.address", &wire.address)?,
        group_rank: wire.group_rank.unwrap_or(0),
        first_rank: Rank(first_rank),
        procs: wire.procs,
        gpus: wire.gpus,
    })
}

/// A placement as it is.
pub fn placement_to_wire(placement: &NodePlacement) -> v1::NodePlacement {
    v1::NodePlacement {
        node_name: placement.node.to_string(),
        address: placement.address.to_string(),
        group_rank: Some(placement.group_rank),
        first_rank: Some(placement.first_rank.0),
        procs: placement.procs,
        gpus: placement.gpus.clone(),
    }
}

/// Checks an assignment.
pub fn assignment_from_wire(wire: v1::Assignment) -> Result<Assignment, FieldError> {
    let phase = match wire.phase() {
        v1::DesiredPhase::Unspecified => return Err(field_error("phase", "is not known to this version")),
        v1::DesiredPhase::Prepared => DesiredPhase::Prepared,
        v1::DesiredPhase::Running => DesiredPhase::Running,
        v1::DesiredPhase::Stopped => DesiredPhase::Stopped,
        v1::DesiredPhase::Forgotten => DesiredPhase::Forgotten,
    };
    let spec = spec_from_wire(required("spec", wire.spec)?).map_err(|mut errors| errors.remove(0))?;
    let placement = placement_from_wire(required("placement", wire.placement)?)?;
    if placement.gpus.len() as u64 != u64::from(spec.per_proc.gpus) * u64::from(placement.procs) {
        return Err(field_error("placement.gpus", "does not hold per_proc.gpus for each process"));
    }
    let grace = span_from_wire("stop_grace", wire.stop_grace.as_ref(), spec.stop_grace)?;
    let signal = optional_stop_signal("stop_signal", &wire.stop_signal)?.unwrap_or(spec.stop_signal);
    Ok(Assignment {
        gang: gang_id(wire.job_id, wire.generation)?,
        phase,
        spec,
        placement,
        world_size: wire.world_size,
        group_world_size: wire.group_world_size,
        master_addr: address("master_addr", &wire.master_addr)?,
        master_port: port("master_port", wire.master_port)?,
        restart_count: wire.restart_count,
        stop: StopMode { signal, grace: grace.min(limits::SPAN_MAX), dump_stacks: wire.dump_stacks },
    })
}

/// An assignment as it is.
pub fn assignment_to_wire(assignment: &Assignment) -> v1::Assignment {
    let phase = match assignment.phase {
        DesiredPhase::Prepared => v1::DesiredPhase::Prepared,
        DesiredPhase::Running => v1::DesiredPhase::Running,
        DesiredPhase::Stopped => v1::DesiredPhase::Stopped,
        DesiredPhase::Forgotten => v1::DesiredPhase::Forgotten,
    };
    v1::Assignment {
        job_id: assignment.gang.job.to_string(),
        generation: assignment.gang.generation.0,
        phase: phase.into(),
        spec: Some(spec_to_wire(&assignment.spec)),
        placement: Some(placement_to_wire(&assignment.placement)),
        world_size: assignment.world_size,
        group_world_size: assignment.group_world_size,
        master_addr: assignment.master_addr.to_string(),
        master_port: assignment.master_port.map_or(0, u32::from),
        restart_count: assignment.restart_count,
        dump_stacks: assignment.stop.dump_stacks,
        stop_grace: Some(duration_to_wire(assignment.stop.grace)),
        stop_signal: assignment.stop.signal.name().to_owned(),
    }
}

/// Checks a report.
pub fn gang_report_from_wire(wire: v1::GangReport) -> Result<GangReport, FieldError> {
    let phase = match wire.phase() {
        v1::ObservedPhase::Unspecified => return Err(field_error("phase", "is not known to this version")),
        v1::ObservedPhase::Prepared => ObservedPhase::Prepared,
        v1::ObservedPhase::Running => ObservedPhase::Running,
        v1::ObservedPhase::Killed => ObservedPhase::Killed,
        v1::ObservedPhase::Stopped => ObservedPhase::Stopped,
    };
    if wire.quiet.len() > limits::PROCS_PER_NODE_MAX as usize {
        return Err(field_error("quiet", "holds more ranks than a node has"));
    }
    if wire.exits.len() > limits::PROCS_PER_NODE_MAX as usize {
        return Err(field_error("exits", "holds more exits than a node has ranks"));
    }
    if wire.process_ids.len() > limits::PROCS_PER_NODE_MAX as usize {
        return Err(field_error("process_ids", "holds more processes than a node has ranks"));
    }
    let error: String = wire.error.chars().take(ERROR_CHARS_MAX).collect();
    Ok(GangReport {
        gang: gang_id(wire.job_id, wire.generation)?,
        phase,
        master_port: port("master_port", wire.master_port)?,
        exits: wire.exits.into_iter().map(rank_exit_from_wire).collect::<Result<_, _>>()?,
        error: (!error.is_empty()).then_some(error),
        quiet: wire.quiet.iter().map(progress_from_wire).collect::<Result<_, _>>()?,
        processes: wire.process_ids,
        rendezvous: wire.rendezvous.map(rendezvous_from_wire).transpose()?.map(Box::new),
        surroundings: wire.surroundings.map(surroundings_from_wire).transpose()?.map(Box::new),
    })
}

fn progress_from_wire(wire: &v1::RankProgress) -> Result<RankProgress, FieldError> {
    Ok(RankProgress {
        rank: Rank(wire.rank),
        step: wire.step,
        silent: span_from_wire("quiet.silent", wire.silent.as_ref(), Millis(0))?,
        state: wire.state.chars().next().filter(char::is_ascii_alphabetic).unwrap_or('?'),
    })
}

/// A report as it is.
pub fn gang_report_to_wire(report: &GangReport) -> v1::GangReport {
    let phase = match report.phase {
        ObservedPhase::Prepared => v1::ObservedPhase::Prepared,
        ObservedPhase::Running => v1::ObservedPhase::Running,
        ObservedPhase::Killed => v1::ObservedPhase::Killed,
        ObservedPhase::Stopped => v1::ObservedPhase::Stopped,
    };
    let quiet = report.quiet.iter().map(|progress| v1::RankProgress {
        rank: progress.rank.0,
        step: progress.step,
        silent: Some(duration_to_wire(progress.silent)),
        state: progress.state.to_string(),
    });
    let generation = report.gang.generation;
    v1::GangReport {
        job_id: report.gang.job.to_string(),
        generation: generation.0,
        phase: phase.into(),
        master_port: report.master_port.map_or(0, u32::from),
        exits: report.exits.iter().map(|exit| rank_exit_to_wire(exit, generation, "")).collect(),
        error: report.error.clone().unwrap_or_default(),
        quiet: quiet.collect(),
        process_ids: report.processes.clone(),
        rendezvous: report.rendezvous.as_deref().map(rendezvous_to_wire),
        surroundings: report.surroundings.as_deref().map(surroundings_to_wire),
    }
}

/// Checks an exit. A longer tail is cut at the front.
pub fn rank_exit_from_wire(wire: v1::RankExit) -> Result<RankExit, FieldError> {
    let rank = required("exits.rank", wire.rank)?;
    if wire.code.is_some() == wire.signal.is_some() {
        return Err(field_error("exits", "needs either a code or a signal"));
    }
    let mut tail = wire.stderr_tail;
    tail.drain(..tail.ceil_char_boundary(tail.len().saturating_sub(STDERR_TAIL_BYTES_MAX)));
    let mut error = wire.error;
    error.truncate(error.floor_char_boundary(STDERR_TAIL_BYTES_MAX));
    Ok(RankExit {
        rank: Rank(rank),
        code: wire.code,
        signal: wire.signal,
        time: wire.time.as_ref().map(millis_from_timestamp).unwrap_or_default(),
        stderr_tail: tail,
        out_of_memory: wire.out_of_memory,
        error: (!error.is_empty()).then_some(error),
    })
}

/// An exit, with the generation and node that its holder knows.
pub fn rank_exit_to_wire(exit: &RankExit, generation: Generation, node: &str) -> v1::RankExit {
    v1::RankExit {
        rank: Some(exit.rank.0),
        node_name: node.to_owned(),
        code: exit.code,
        signal: exit.signal,
        time: Some(timestamp_to_wire(exit.time)),
        stderr_tail: exit.stderr_tail.clone(),
        generation: generation.0,
        out_of_memory: exit.out_of_memory,
        error: exit.error.clone().unwrap_or_default(),
    }
}
