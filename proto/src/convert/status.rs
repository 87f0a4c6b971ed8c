//! Refusals as rich gRPC statuses: google.rpc details that say what to do.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::FieldError;

/// Domain of every ErrorInfo.
const DOMAIN: &str = "muster.v1";
/// Reason of a coordinator that does not lead.
const NOT_LEADER: &str = "NOT_LEADER";
/// Time after which somebody leads, most likely, where nobody does.
const ELECTION: Duration = Duration::from_secs(1);

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

/// What a coordinator that does not lead says of itself and of the one that does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NotLeader {
    /// Where the leader is reached; empty if none is known.
    pub leader: String,
    /// Identity of the coordinator that says so, made anew at each of its starts.
    pub coordinator: String,
    /// Coordinators that stand for election, as last seen.
    pub coordinators: u32,
    /// Address and port at which it took the connection, as in JoinResponse.
    pub accepted_at: String,
    /// Boot id of its machine.
    pub boot_id: String,
}

impl NotLeader {
    /// UNAVAILABLE, with the leader's address in plain words and in the details.
    pub fn to_status(&self, why: &str) -> Status {
        let message = match (self.leader.as_str(), why) {
            ("", "") => "this coordinator does not lead, and no other one does yet; try again".to_owned(),
            ("", why) => format!("this coordinator does not lead, and no leader is known: {why}"),
            (leader, _) => format!("this coordinator does not lead; the one at {leader} does: call that one"),
        };
        let pairs = [
            ("leader", &self.leader),
            ("coordinator", &self.coordinator),
            ("coordinators", &self.coordinators.to_string()),
            ("accepted_at", &self.accepted_at),
            ("boot_id", &self.boot_id),
        ];
        let pairs = pairs.map(|(key, value)| (key.to_owned(), cut(value, TEXT_BYTES_MAX)));
        let mut details = ErrorDetails::with_retry_info(Some(ELECTION));
        details.set_error_info(NOT_LEADER, DOMAIN, HashMap::from(pairs));
        Status::with_error_details(Code::Unavailable, cut(&message, MESSAGE_BYTES_MAX), details)
    }

    /// What such a status says; none if it is of another kind.
    pub fn from_status(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info().filter(|_| status.code() == Code::Unavailable)?;
        if info.reason != NOT_LEADER || info.domain != DOMAIN {
            return None;
        }
        let text = |key: &str| info.metadata.get(key).cloned().unwrap_or_default();
        Some(Self {
            leader: text("leader"),
            coordinator: text("coordinator"),
            coordinators: text("coordinators").parse().unwrap_or(0),
            accepted_at: text("accepted_at"),
            boot_id: text("boot_id"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_lead_says_who_does_in_words_and_in_details() {
        let says = NotLeader {
            leader: "http://10.0.0.2:7070".to_owned(),
            coordinator: "c".to_owned(),
            coordinators: 3,
            accepted_at: "10.0.0.1:7070".to_owned(),
            boot_id: "b".to_owned(),
        };
        let status = says.to_status("");
        assert!(status.message().contains("http://10.0.0.2:7070"), "{status}");
        assert!(status.get_details_retry_info().is_some());
        assert_eq!(NotLeader::from_status(&status), Some(says));
        assert_eq!(NotLeader::from_status(&unavailable("STOPPING", "", ELECTION)), None);
        let nobody = NotLeader::default().to_status("etcd does not answer");
        assert!(nobody.message().contains("etcd does not answer"), "{nobody}");
    }
}
