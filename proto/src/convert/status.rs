//! Refusals as rich gRPC statuses: google.rpc details that say what to do.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::FieldError;

/// Domain of every ErrorInfo.
const DOMAIN: &str = "muster.v1";

/// INVALID_ARGUMENT with one violation per field; the first ones are in the message, for plain clients.
pub fn invalid_argument(errors: &[FieldError]) -> Status {
    let shown: Vec<String> = errors.iter().take(3).map(ToString::to_string).collect();
    let more = errors.len().saturating_sub(shown.len());
    let suffix = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    let violations = errors.iter().map(|e| FieldViolation::new(e.field.clone(), e.description.clone()));
    let mut details = ErrorDetails::with_bad_request(violations.collect::<Vec<_>>());
    details.set_error_info("INVALID_FIELD", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, format!("{}{suffix}", shown.join("; ")), details)
}

/// A refusal with a machine-readable reason in UPPER_SNAKE_CASE.
pub fn refusal(code: Code, reason: &str, message: impl Into<String>) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new()))
}

/// FAILED_PRECONDITION: what must be true first.
pub fn precondition(subject: &str, message: impl Into<String>) -> Status {
    let message = message.into();
    let mut details = ErrorDetails::new();
    details.add_precondition_failure_violation("STATE", subject, message.clone());
    Status::with_error_details(Code::FailedPrecondition, message, details)
}

/// UNAVAILABLE: the same call may succeed after `retry`.
pub fn unavailable(reason: &str, message: impl Into<String>, retry: Duration) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(retry));
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::Unavailable, message, details)
}
