//! The wall clock, for the times that people see. Nothing is decided by it.

use std::time::{SystemTime, UNIX_EPOCH};

use muster_core::types::Millis;

/// Unix time now.
#[expect(clippy::disallowed_methods, reason = "the daemon's clock is where time enters")]
pub(crate) fn unix_now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
