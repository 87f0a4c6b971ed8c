//! What a service of `Type=notify` says to systemd; nothing where nobody listens.

use sd_notify::NotifyState;
use tracing::warn;

/// The variable that names systemd's socket. It is the daemon's own, and none of its ranks' business.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// It does its work.
pub fn ready() {
    say(NotifyState::Ready);
}

/// It is about to end.
pub fn stopping() {
    say(NotifyState::Stopping);
}

fn say(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "systemd could not be told how this daemon is");
    }
}
