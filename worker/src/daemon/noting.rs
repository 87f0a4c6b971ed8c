//! What the daemon notes of what it hears, for metrics and for systemd.

use muster_core::types::GangId;
use muster_worker_core::Input;

use super::Daemon;
use crate::clock::boot_now;

impl Daemon {
    /// Before the core hears of it.
    pub(super) fn note(&self, input: &Input) {
        match input {
            Input::Exited(gang, exit) => {
                self.live.end(gang, exit.rank);
                self.outbox.exited(gang, exit.rank);
                self.monitor.exited(exit);
            }
            Input::Gone(gang) | Input::Failed(gang, _) => self.live.remove(gang),
            Input::Fenced(_) => self.monitor.fenced(),
            Input::Renewed { sent, .. } => self.monitor.renewed(boot_now().since(*sent)),
            _ => {}
        }
    }

    /// Tells systemd, unless this is a part of `muster run`, which may be a part of somebody's own service.
    pub(super) fn say(&self, what: fn()) {
        if self.identity.config.attached.is_none() {
            what();
        }
    }

    /// Something about the gang has changed.
    pub(super) fn count(&self, gang: &GangId) {
        let procs = self.core.assignment(gang).map_or(0, |assignment| assignment.placement.procs);
        self.monitor.gang(gang, self.core.report(gang).as_ref(), procs);
    }
}
