//! The two clocks of a node: the wall's, for the times that people see, and the one that leases are counted on.

use std::time::{SystemTime, UNIX_EPOCH};

use muster_core::types::Millis;
use nix::time::{ClockId, clock_gettime};

/// Unix time now. Nothing is decided by it.
#[expect(clippy::disallowed_methods, reason = "the daemon's clock is where time enters")]
pub(crate) fn unix_now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Time since the machine was started, suspends included: a node that slept must not take its lease to be younger than
/// it is. The same for every process of the machine.
pub fn boot_now() -> Millis {
    #[cfg(feature = "simulation")]
    if let Some(now) = crate::simulation::now() {
        return now;
    }
    // It only fails for a clock that the kernel does not have; this one came with Linux 2.6.39.
    let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return Millis(0) };
    let millis = now.tv_sec().saturating_mul(1000).saturating_add(now.tv_nsec() / 1_000_000);
    Millis(u64::try_from(millis).unwrap_or(0))
}
