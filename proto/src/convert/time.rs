//! Timestamps and durations.

use std::time::Duration;

use muster_core::types::Millis;

use super::{FieldError, field_error};

/// The last millisecond that a Timestamp can say, in the year 9999; readers choke on what lies beyond it.
const TIME_MAX: Millis = Millis(253_402_300_799_999);
/// The longest span that a Duration can say, 10,000 years.
const DURATION_MAX: Millis = Millis::from_secs(315_576_000_000);

/// A Unix time in milliseconds as a Timestamp; later ones than it can say become its last.
pub fn timestamp_to_wire(time: Millis) -> prost_types::Timestamp {
    let time = time.min(TIME_MAX);
    prost_types::Timestamp {
        seconds: i64::try_from(time.0 / 1000).unwrap_or(i64::MAX),
        nanos: (time.0 % 1000) as i32 * 1_000_000,
    }
}

/// A Timestamp as Unix time in milliseconds; times before 1970 become 0, and those that no Timestamp
/// may say its last.
pub fn millis_from_timestamp(time: &prost_types::Timestamp) -> Millis {
    let seconds = u64::try_from(time.seconds).unwrap_or(0);
    let millis = u64::try_from(time.nanos).unwrap_or(0) / 1_000_000;
    Millis(seconds.saturating_mul(1000).saturating_add(millis)).min(TIME_MAX)
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
            let span = Millis(seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000));
            Ok(span.min(DURATION_MAX))
        }
        _ => Err(field_error(field, "is negative")),
    }
}
