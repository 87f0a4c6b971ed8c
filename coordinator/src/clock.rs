//! The only place that reads a clock.

use std::time::{SystemTime, UNIX_EPOCH};

use muster_core::types::Millis;
use tokio::time::Instant;

/// Unix time that never goes back: the wall clock once, monotonic time from then on. Setting the clock of a
/// running coordinator moves no lease.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    started: Instant,
    started_unix: Millis,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the driver's clock is where time enters")]
    pub fn start() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started: Instant::now(), started_unix: crate::millis(unix) }
    }

    pub fn now(&self) -> Millis {
        self.started_unix.plus(crate::millis(self.started.elapsed()))
    }

    pub fn started(&self) -> Millis {
        self.started_unix
    }
}
