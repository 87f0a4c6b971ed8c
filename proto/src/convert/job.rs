//! The job specification.

use std::collections::BTreeMap;

use muster_core::types::text::REDACTED;
use muster_core::types::{
    CoordinatorLoss, JobSpec, Millis, Resources, SpecError, StopSignal, UserName, limits,
};

use super::time::{duration_to_wire, span_from_wire};
use super::{FieldError, field_error};
use crate::v1;

/// Checks a specification and fills in its defaults. Returns every violation, not just the first.
pub fn spec_from_wire(wire: v1::JobSpec) -> Result<JobSpec, Vec<SpecError>> {
    let non_empty = |text: String| (!text.is_empty()).then_some(text);
    let mut errors = Vec::new();
    let mut span = |field, value: Option<&_>, default| {
        span_from_wire(field, value, default).unwrap_or_else(|error| {
            errors.push(error);
            default
        })
    };
    let stop_grace = span("stop_grace", wire.stop_grace.as_ref(), limits::STOP_GRACE_DEFAULT);
    let start_timeout = span("start_timeout", wire.start_timeout.as_ref(), limits::START_TIMEOUT_DEFAULT);
    let progress_timeout = span("progress_timeout", wire.progress_timeout.as_ref(), Millis(0));
    let last_call = span("last_call", wire.last_call.as_ref(), Millis(0));
    let on_coordinator_loss = match v1::CoordinatorLossPolicy::try_from(wire.on_coordinator_loss) {
        Ok(v1::CoordinatorLossPolicy::Unspecified | v1::CoordinatorLossPolicy::Run) => CoordinatorLoss::Run,
        Ok(v1::CoordinatorLossPolicy::Stop) => CoordinatorLoss::Stop,
        // One who asks for another policy does not want to be given the default.
        Err(_) => {
            errors.push(field_error("on_coordinator_loss", "is not known to this version"));
            CoordinatorLoss::Run
        }
    };
    let stop_signal = optional_stop_signal("stop_signal", &wire.stop_signal).unwrap_or_else(|error| {
        errors.push(error);
        None
    });
    let stop_signal = stop_signal.unwrap_or_default();
    let run_as = non_empty(wire.run_as).map(UserName::new).transpose().unwrap_or_else(|why| {
        errors.push(field_error("run_as", why));
        None
    });
    let checked = JobSpec {
        name: wire.name,
        command: wire.command,
        env: wire.env,
        env_files: wire.env_files,
        working_dir: non_empty(wire.working_dir),
        min_nodes: wire.min_nodes.unwrap_or(1),
        max_nodes: wire.max_nodes,
        procs_per_node: wire.procs_per_node.unwrap_or(1),
        per_proc: wire.per_proc.map(resources_from_wire).unwrap_or_default(),
        max_restarts: wire.max_restarts.unwrap_or(0),
        priority: wire.priority,
        node_selector: wire.node_selector,
        checkpoint_dir: non_empty(wire.checkpoint_dir),
        stop_grace,
        start_timeout,
        progress_timeout,
        last_call,
        stop_signal,
        on_coordinator_loss,
        tensorboard_dir: non_empty(wire.tensorboard_dir),
        metric_pattern: non_empty(wire.metric_pattern),
        run_as,
    }
    .check();
    match checked {
        Ok(spec) if errors.is_empty() => Ok(spec),
        Ok(_) => Err(errors),
        Err(more) => Err(errors.into_iter().chain(more).collect()),
    }
}

/// A specification with its defaults filled in.
pub fn spec_to_wire(spec: &JobSpec) -> v1::JobSpec {
    v1::JobSpec {
        command: spec.command.clone(),
        env: spec.env.clone(),
        env_files: spec.env_files.clone(),
        ..others_to_wire(spec)
    }
}

/// The same for those who may not see what it runs, and with which values.
pub fn spec_to_wire_redacted(spec: &JobSpec) -> v1::JobSpec {
    let hidden = |map: &BTreeMap<String, String>| {
        map.keys().map(|key| (key.clone(), REDACTED.to_owned())).collect::<BTreeMap<_, _>>()
    };
    v1::JobSpec {
        command: vec![REDACTED.to_owned()],
        env: hidden(&spec.env),
        env_files: hidden(&spec.env_files),
        ..others_to_wire(spec)
    }
}

/// What everybody sees who sees the job.
fn others_to_wire(spec: &JobSpec) -> v1::JobSpec {
    v1::JobSpec {
        name: spec.name.clone(),
        command: Vec::new(),
        env: BTreeMap::new(),
        env_files: BTreeMap::new(),
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        min_nodes: Some(spec.min_nodes),
        max_nodes: spec.max_nodes,
        procs_per_node: Some(spec.procs_per_node),
        per_proc: Some(resources_to_wire(spec.per_proc)),
        max_restarts: Some(spec.max_restarts),
        priority: spec.priority,
        node_selector: spec.node_selector.clone(),
        checkpoint_dir: spec.checkpoint_dir.clone().unwrap_or_default(),
        stop_grace: Some(duration_to_wire(spec.stop_grace)),
        start_timeout: Some(duration_to_wire(spec.start_timeout)),
        progress_timeout: Some(duration_to_wire(spec.progress_timeout)),
        last_call: Some(duration_to_wire(spec.last_call)),
        stop_signal: spec.stop_signal.name().to_owned(),
        on_coordinator_loss: match spec.on_coordinator_loss {
            CoordinatorLoss::Run => v1::CoordinatorLossPolicy::Run,
            CoordinatorLoss::Stop => v1::CoordinatorLossPolicy::Stop,
        }
        .into(),
        tensorboard_dir: spec.tensorboard_dir.clone().unwrap_or_default(),
        metric_pattern: spec.metric_pattern.clone().unwrap_or_default(),
        run_as: spec.run_as.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

/// A signal by its name; none if it is empty.
pub fn optional_stop_signal(field: &str, name: &str) -> Result<Option<StopSignal>, FieldError> {
    if name.is_empty() {
        return Ok(None);
    }
    let found = StopSignal::ALL.into_iter().find(|signal| signal.name() == name);
    found.map(Some).ok_or_else(|| {
        let all = StopSignal::ALL.map(StopSignal::name).join(", ");
        let name: String = name.chars().take(32).collect();
        field_error(field, format!("is {name:?}; use one of {all}"))
    })
}

/// Resources as they are; every value is valid.
pub fn resources_from_wire(wire: v1::Resources) -> Resources {
    Resources { gpus: wire.gpus, cpu_millis: wire.cpu_millis, memory_bytes: wire.memory_bytes }
}

/// Resources as they are.
pub fn resources_to_wire(resources: Resources) -> v1::Resources {
    v1::Resources {
        gpus: resources.gpus,
        cpu_millis: resources.cpu_millis,
        memory_bytes: resources.memory_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checked_spec_survives_the_wire() {
        let wire = v1::JobSpec { command: vec!["sh".into()], min_nodes: Some(2), ..Default::default() };
        let spec = spec_from_wire(wire).unwrap();
        assert_eq!((spec.max_nodes, spec.procs_per_node), (2, 1));
        assert_eq!(spec_from_wire(spec_to_wire(&spec)).unwrap(), spec);
    }

    #[test]
    fn an_explicit_zero_is_refused_but_an_absent_count_is_one() {
        let wire = v1::JobSpec { command: vec!["sh".into()], min_nodes: Some(0), ..Default::default() };
        assert_eq!(spec_from_wire(wire).unwrap_err()[0].field, "min_nodes");
    }
}
