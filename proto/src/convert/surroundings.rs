//! What a node adds to the environment of its ranks.

use muster_core::types::Surroundings;
use muster_core::types::limits;
use muster_core::types::surroundings::{
    CPUS_BYTES_MAX, DerivedVariable, REASON_BYTES_MAX, RankBinding, VALUE_BYTES_MAX, VARIABLES_MAX,
    VariableSource,
};

use super::inventory::cut;
use super::{FieldError, field_error};
use crate::v1;

/// GPUs of one rank; as many as a node can have.
const GPUS_MAX: usize = 256;

/// Checks it. What is only shown is cut where it is too long.
pub fn surroundings_from_wire(wire: v1::Surroundings) -> Result<Surroundings, FieldError> {
    if wire.variables.len() > VARIABLES_MAX {
        return Err(field_error("surroundings.variables", format!("are more than {VARIABLES_MAX}")));
    }
    if wire.bindings.len() > limits::PROCS_PER_NODE_MAX as usize {
        return Err(field_error("surroundings.bindings", "are more than a node has ranks"));
    }
    let variable = |wire: v1::DerivedVariable| {
        let source = match wire.source() {
            v1::VariableSource::Unspecified => {
                return Err(field_error("surroundings.variables.source", "is not known to this version"));
            }
            v1::VariableSource::Node => VariableSource::Node,
            v1::VariableSource::Job => VariableSource::Job,
            v1::VariableSource::Daemon => VariableSource::Daemon,
        };
        Ok(DerivedVariable {
            name: cut(wire.name, limits::NAME_BYTES_MAX),
            value: cut(wire.value, VALUE_BYTES_MAX),
            source,
            reason: cut(wire.reason, REASON_BYTES_MAX),
        })
    };
    let binding = |wire: v1::RankBinding| {
        if wire.gpus.len() > GPUS_MAX {
            return Err(field_error("surroundings.bindings.gpus", "are more than a node has"));
        }
        Ok(RankBinding {
            local_rank: wire.local_rank,
            gpus: wire.gpus,
            cpus: cut(wire.cpus, CPUS_BYTES_MAX),
            reason: cut(wire.reason, REASON_BYTES_MAX),
        })
    };
    Ok(Surroundings {
        variables: wire.variables.into_iter().map(variable).collect::<Result<_, _>>()?,
        bindings: wire.bindings.into_iter().map(binding).collect::<Result<_, _>>()?,
        // Stays on the node.
        devices: Vec::new(),
    })
}

/// As it is.
pub fn surroundings_to_wire(surroundings: &Surroundings) -> v1::Surroundings {
    let variable = |variable: &DerivedVariable| v1::DerivedVariable {
        name: variable.name.clone(),
        value: variable.value.clone(),
        source: match variable.source {
            VariableSource::Node => v1::VariableSource::Node,
            VariableSource::Job => v1::VariableSource::Job,
            VariableSource::Daemon => v1::VariableSource::Daemon,
        }
        .into(),
        reason: variable.reason.clone(),
    };
    let binding = |binding: &RankBinding| v1::RankBinding {
        local_rank: binding.local_rank,
        gpus: binding.gpus.clone(),
        cpus: binding.cpus.clone(),
        reason: binding.reason.clone(),
    };
    v1::Surroundings {
        variables: surroundings.variables.iter().map(variable).collect(),
        bindings: surroundings.bindings.iter().map(binding).collect(),
    }
}
