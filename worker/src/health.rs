//! Looks at the machine again and again, and says what is wrong with it. What that means is decided in the cores.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use muster_core::Inventory;
use muster_core::health::{Finding, Severity};
use muster_worker_core::health::Monitor;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::clock::boot_now;
use crate::devices::Machine;
use crate::launch::checks;

/// Checks are further apart than looks by this factor: they are programs.
const CHECKS_APART: u32 = 6;
/// Longest time of one look. A GPU driver that hangs holds it up for ever.
const LOOK_MAX: Duration = Duration::from_secs(30);

/// How a machine is watched.
#[derive(Clone, Debug)]
pub struct Watch {
    /// Time between looks.
    pub interval: Duration,
    /// Directory with programs that check the machine.
    pub check_dir: Option<PathBuf>,
}

/// What a look has shown.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// What the machine has; none if it did not answer.
    pub inventory: Option<Arc<Inventory>>,
    pub findings: Vec<Finding>,
}

/// Looks until it is dropped.
pub(crate) fn watch(
    machine: Arc<Machine>,
    data_dir: PathBuf,
    watch: Watch,
    seen: mpsc::Sender<Seen>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let (found, checks) = watch::channel(Vec::new());
        let _checking = watch.check_dir.map(|dir| {
            let mut beat = interval(watch.interval * CHECKS_APART);
            beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    beat.tick().await;
                    found.send_replace(checks::run(&dir).await);
                }
            }))
        });
        let mut beat = interval(watch.interval);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut monitor = Monitor::default();
        loop {
            beat.tick().await;
            let mut looking = tokio::task::spawn_blocking({
                let (machine, data_dir) = (machine.clone(), data_dir.clone());
                move || machine.readings(&data_dir)
            });
            let looked = if let Ok(looked) = timeout(LOOK_MAX, &mut looking).await {
                looked
            } else {
                let reason = "the machine's devices do not answer; a driver hangs".to_owned();
                let finding = Finding { subject: "devices".into(), severity: Severity::Quarantined, reason };
                if seen.send(Seen { inventory: None, findings: vec![finding] }).await.is_err() {
                    return;
                }
                // No second look beside one that hangs.
                looking.await
            };
            let look = match looked.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(mut readings) => {
                    readings.checks.clone_from(&checks.borrow());
                    let findings = monitor.look(boot_now(), &readings);
                    Seen { inventory: Some(Arc::new(readings.inventory)), findings }
                }
                Err(error) => {
                    warn!(%error, "the machine could not be looked at");
                    continue;
                }
            };
            if seen.send(look).await.is_err() {
                return;
            }
        }
    }))
}
