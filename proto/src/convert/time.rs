//! Timestamps and durations.

use std::time::Duration;

use muster_core::types::Millis;

use super::{FieldError, field_error};

/// A Unix time in milliseconds as a Timestamp.
pub fn timestamp_to_wire(time: Millis) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(time.0 / 1000).unwrap_or(i64::MAX),
        nanos: (time.0 % 1000) as i32 * 1_000_000,
    }
}

/// A Timestamp as Unix time in milliseconds; times before 1970 become 0.
pub fn millis_from_timestamp(time: &prost_types::Timestamp) -> Millis {
    let seconds = u64::try_from(time.seconds).unwrap_or(0);
    let millis = u64::try_from(time.nanos).unwrap_or(0) / 1_000_000;
    Millis(seconds.saturating_mul(1000).saturating_add(millis))
}

/// A span as a Duration message.
pub fn duration_to_wire(span: Millis) -> prost_types::Duration {
    duration_to_wire_std(Duration::from_millis(span.0))
}

/// A [`Duration`] as a Duration message.
pub fn duration_to_wire_std(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: span.subsec_nanos() as i32,
    }
}

/// A Duration message as a span; `default` if it is absent. Negative spans are refused.
pub fn span_from_wire(
    field: &str,
    span: Option<&prost_types::Duration>,
    default: Millis,
) -> Result<Millis, FieldError> {
    let Some(span) = span else { return Ok(default) };
    match (u64::try_from(span.seconds), u64::try_from(span.nanos)) {
        (Ok(seconds), Ok(nanos)) => {
            Ok(Millis(seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000)))
        }
        _ => Err(field_error(field, "is negative")),
    }
}
