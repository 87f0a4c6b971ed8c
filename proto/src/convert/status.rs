//! Refusals as rich gRPC statuses: google.rpc details that say what to do.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::FieldError;

/// Domain of every ErrorInfo.
const DOMAIN: &str = "muster.v1";

// A status travels in headers, of which gRPC's clients take 8 KiB: message and details, the one percent-encoded, the
// other with the message again and in base64, must fit whatever they quote.
/// Bytes of a message.
const MESSAGE_BYTES_MAX: usize = 768;
/// Bytes of all violations.
const VIOLATIONS_BYTES_MAX: usize = 2560;
/// Bytes of a field or a description.
const TEXT_BYTES_MAX: usize = 224;

/// A text that may quote anything, cut to what fits.
fn cut(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(bytes_max - '…'.len_utf8())])
}

/// INVALID_ARGUMENT with one violation per field; the first ones are in the message, for plain clients.
pub fn invalid_argument(errors: &[FieldError]) -> Status {
    let shown: Vec<String> =
        errors.iter().take(3).map(|error| cut(&error.to_string(), TEXT_BYTES_MAX)).collect();
    let more = errors.len().saturating_sub(shown.len());
    let suffix = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    let mut room = VIOLATIONS_BYTES_MAX;
    let violations = errors.iter().map_while(|error| {
        let [field, description] = [&error.field, &error.description].map(|text| cut(text, TEXT_BYTES_MAX));
        // Lengths and tags of the encoding take some bytes too.
        room = room.checked_sub(field.len() + description.len() + 8)?;
        Some(FieldViolation::new(field, description))
    });
    let mut details = ErrorDetails::with_bad_request(violations.collect::<Vec<_>>());
    details.set_error_info("INVALID_FIELD", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, format!("{}{suffix}", shown.join("; ")), details)
}

/// A refusal with a machine-readable reason in UPPER_SNAKE_CASE.
pub fn refusal(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let message = cut(&message.into(), MESSAGE_BYTES_MAX);
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new()))
}

/// FAILED_PRECONDITION: what must be true first.
pub fn precondition(subject: &str, message: impl Into<String>) -> Status {
    let message = cut(&message.into(), MESSAGE_BYTES_MAX);
    let mut details = ErrorDetails::new();
    details.add_precondition_failure_violation("STATE", cut(subject, TEXT_BYTES_MAX), message.clone());
    Status::with_error_details(Code::FailedPrecondition, message, details)
}

/// UNAVAILABLE: the same call may succeed after `retry`.
pub fn unavailable(reason: &str, message: impl Into<String>, retry: Duration) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(retry));
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::Unavailable, cut(&message.into(), MESSAGE_BYTES_MAX), details)
}
