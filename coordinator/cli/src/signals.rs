//! Signals as this process was started with them.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Returns whether a signal was ignored from the start on, as SIGHUP is under nohup. What ignores
/// it stays so: to handle it would undo what somebody wanted.
pub(crate) fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignored(&status).is_some_and(|mask| number > 0 && mask & (1 << (number - 1)) != 0)
}

/// Returns the mask of ignored signals.
fn ignored(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

/// SIGHUP, which never comes where it was ignored from the start on.
#[derive(Debug)]
pub(crate) struct Hangup(Option<Signal>);

impl Hangup {
    /// Listens to it.
    pub fn listen() -> io::Result<Self> {
        let kind = SignalKind::hangup();
        Ok(Self(if is_ignored(kind.as_raw_value()) { None } else { Some(signal(kind)?) }))
    }

    /// Waits for the next one.
    pub async fn recv(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        assert_eq!(ignored("Name:\tx\nSigIgn:\t0000000080001001\nSigCgt:\t1\n"), Some(0x8000_1001));
        assert_eq!(ignored("Name:\tx\n"), None);
        // A program of Rust ignores it.
        assert!(is_ignored(nix::libc::SIGPIPE) && !is_ignored(nix::libc::SIGTERM) && !is_ignored(0));
    }
}
