//! How many files a process may have open: more for a shim that hosts a store, and for its ranks what it was.

use std::io;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// The soft and the hard limit before they were changed.
static BEFORE: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises the soft limit to the hard one, for this process.
pub(crate) fn allow_many() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    BEFORE.get_or_init(|| (soft, hard));
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// In a rank, between fork and exec: the limit that the daemon has. Some programs fail with more than they expect.
/// Allocates nothing.
pub(super) fn as_before() -> io::Result<()> {
    match BEFORE.get() {
        Some((soft, hard)) => Ok(setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard)?),
        None => Ok(()),
    }
}
