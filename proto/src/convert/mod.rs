//! Wire to checked types and back. Wire types go no further than here and the gRPC handlers.
//!
//! What comes in is refused with a field and a reason; nothing here panics on any message.

mod agents;
mod gang;
mod inventory;
mod job;
mod rendezvous;
mod status;
mod surroundings;
mod time;
mod token;

#[cfg(any(test, fuzzing))]
pub(crate) use agents::agent_hello_to_wire;
pub use agents::{agent_first_from_wire, agent_hello_from_wire, agent_said_from_wire, agent_tell_to_wire};
pub use gang::{
    assignment_from_wire, assignment_to_wire, gang_report_from_wire, gang_report_to_wire,
    placement_from_wire, placement_to_wire, rank_exit_from_wire, rank_exit_to_wire,
};
pub use inventory::{finding_to_wire, findings_from_wire, inventory_from_wire, inventory_to_wire};
pub use job::{
    optional_stop_signal, resources_from_wire, resources_to_wire, spec_from_wire, spec_to_wire,
    spec_to_wire_redacted,
};
pub use status::{NotLeader, invalid_argument, precondition, refusal, unavailable};
pub use surroundings::{surroundings_from_wire, surroundings_to_wire};
pub use time::{
    duration_to_wire, duration_to_wire_std, millis_from_timestamp, span_from_wire, timestamp_to_wire,
};
pub use token::{role_from_wire, role_to_wire, token_to_wire};

use muster_core::types::SpecError;

/// A message that cannot be taken: the field and what is wrong with it.
pub type FieldError = SpecError;

/// Makes a [`FieldError`].
pub fn field_error(field: &str, description: impl Into<String>) -> FieldError {
    SpecError { field: field.to_owned(), description: description.into() }
}

/// Unwraps a sub-message that every sender of this version fills in.
fn required<T>(field: &str, value: Option<T>) -> Result<T, FieldError> {
    value.ok_or_else(|| field_error(field, "is missing"))
}
