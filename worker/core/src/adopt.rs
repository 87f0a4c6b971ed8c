//! Whether a shim that an earlier daemon started is taken over.

use muster_core::bugs::{Bug, planted};
use serde::{Deserialize, Serialize};

/// Identity of a shim's process, as it wrote it down when it began. A process id alone says nothing: it is given to
/// another process once its own has ended, and after a reboot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimRecord {
    /// The kernel's boot id.
    pub boot_id: String,
    /// Process id.
    pub pid: i32,
    /// When the process began, in clock ticks since boot (proc(5), field 22 of stat).
    pub start_time: u64,
}

/// What becomes of what an earlier daemon left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// The shim runs: take it over.
    Adopt,
    /// The shim has ended; something of its ranks may be left, and is to be killed.
    Sweep,
    /// The machine was started anew: nothing of it can be left.
    Discard,
}

/// Decides. `start_time` is that of the process that has the shim's id now, if one has.
pub fn adopt(record: &ShimRecord, boot_id: &str, start_time: Option<u64>) -> Adoption {
    if planted(Bug::AdoptByPidAlone) && start_time.is_some() {
        return Adoption::Adopt;
    }
    if record.boot_id != boot_id {
        Adoption::Discard
    } else if start_time == Some(record.start_time) {
        Adoption::Adopt
    } else {
        Adoption::Sweep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_process_is_adopted() {
        let record = ShimRecord { boot_id: "b1".into(), pid: 7, start_time: 100 };
        let table = [
            ("b1", Some(100), Adoption::Adopt),
            ("b1", Some(101), Adoption::Sweep),
            ("b1", None, Adoption::Sweep),
            ("b2", Some(100), Adoption::Discard),
            ("b2", None, Adoption::Discard),
        ];
        for (boot_id, start_time, expected) in table {
            assert_eq!(adopt(&record, boot_id, start_time), expected, "{boot_id} {start_time:?}");
        }
    }
}
