//! Whether a rank ended because memory ran out. All that the kernel tells the parent is SIGKILL, which has other senders.

use super::cgroup::GangCgroup;
use super::procfs;

/// Who ended a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutOfMemory {
    No,
    /// The kernel killed some process of this machine while the rank ran, and nobody else is known to have killed it.
    Probably,
    /// The rank's own group counts it.
    Certain,
}

/// How often the kernel had killed for want of memory before a rank was launched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    machine: Option<u64>,
    /// Of the rank's own group, where there is a memory controller.
    group: Option<u64>,
}

impl Counts {
    /// Taken before the launch, of the group that was made for the local rank.
    pub fn now(group: Option<(&GangCgroup, u32)>) -> Self {
        let machine = procfs::read("/proc/vmstat").and_then(|text| oom_kills(&text));
        Self { machine, group: group.and_then(|(gang, rank)| gang.oom_kills(rank)) }
    }
}

/// Tells from what was counted before the launch and after the exit. `code` and `signal` are how the rank ended;
/// `sent` is whether we had told it to end.
pub(crate) fn judge(
    before: Counts,
    after: Counts,
    code: Option<i32>,
    signal: Option<i32>,
    sent: bool,
) -> OutOfMemory {
    let rose = |before: Option<u64>, after: Option<u64>| Some(after? > before?);
    let killed = signal == Some(nix::libc::SIGKILL);
    if sent || code == Some(0) {
        return OutOfMemory::No;
    }
    match (rose(before.group, after.group), rose(before.machine, after.machine)) {
        (Some(true), _) if killed => OutOfMemory::Certain,
        // A process of the rank was killed, such as a data loader, and the rank did not outlive it.
        (Some(true), _) => OutOfMemory::Probably,
        (None, Some(true)) if killed => OutOfMemory::Probably,
        (Some(false) | None, _) => OutOfMemory::No,
    }
}

fn oom_kills(vmstat: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use OutOfMemory::{Certain, No, Probably};

    #[test]
    fn a_kill_is_blamed_on_memory_only_with_a_reason() {
        // The group's count and the machine's: did they rise? Then how the rank ended, and whether we ended it.
        let (yes, no) = (Some(true), Some(false));
        let killed = (None, Some(9));
        let table = [
            (yes, yes, killed, false, Certain),
            (yes, None, killed, false, Certain),
            (yes, yes, killed, true, No),
            (yes, yes, (Some(1), None), false, Probably),
            (yes, yes, (Some(0), None), false, No),
            (no, yes, killed, false, No),
            (None, yes, killed, false, Probably),
            (None, yes, killed, true, No),
            (None, yes, (None, Some(11)), false, No),
            (None, yes, (Some(1), None), false, No),
            (None, no, killed, false, No),
            (None, None, killed, false, No),
        ];
        for (group, machine, (code, signal), sent, expected) in table {
            let count = |rose: Option<bool>| rose.map(|rose| 7 + u64::from(rose));
            let before = Counts { machine: machine.map(|_| 7), group: group.map(|_| 7) };
            let after = Counts { machine: count(machine), group: count(group) };
            let told = judge(before, after, code, signal, sent);
            assert_eq!(told, expected, "{group:?} {machine:?} {code:?} {signal:?} {sent}");
        }
    }

    #[test]
    fn the_machine_counts_what_it_kills() {
        assert_eq!(oom_kills("nr_free_pages 7\noom_kill 3\noom_killer 9\n"), Some(3));
        assert_eq!(oom_kills("nr_free_pages 7\n"), None);
        let counts = Counts::now(None);
        assert!(counts.group.is_none() && counts.machine.is_some(), "{counts:?}");
    }
}
