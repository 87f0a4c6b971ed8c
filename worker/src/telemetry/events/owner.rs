//! Whose an event file is. Jobs may share a directory, and so may nodes: what others write there is not taken for ours.

use std::collections::BTreeMap;

use muster_core::types::Rank;

use crate::launch::procfs;

/// Processes between a rank and one that it has started: a launcher, a shell, a pool.
const ANCESTORS_MAX: usize = 64;

/// Who has written a file, as far as its name tells: `<seconds>.<host>.<process>.<number>` by Python and TensorFlow, less
/// by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// A process of this host.
    Process(i32),
    /// The name does not tell.
    Unknown,
    /// One on another host.
    Elsewhere,
}

impl Writer {
    /// From what follows the part of the name that all event files have.
    pub fn named(rest: &str, host: &str) -> Self {
        let Some((seconds, writer)) = rest.split_once('.') else { return Self::Unknown };
        if seconds.is_empty() || !seconds.bytes().all(|byte| byte.is_ascii_digit()) {
            return Self::Unknown;
        }
        // A host's name may have dots itself.
        let after = writer.strip_prefix(host).filter(|after| after.is_empty() || after.starts_with('.'));
        let Some(after) = after else { return Self::Elsewhere };
        let process = after.split('.').nth(1).and_then(|word| word.parse().ok());
        process.map_or(Self::Unknown, Self::Process)
    }
}

/// Whose a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// This rank's, or that of something it has started.
    Rank(Rank),
    /// That cannot be told, or cannot any more.
    Unknown,
    /// None of this gang's on this node.
    Other,
}

/// The processes of this node's ranks.
#[derive(Debug)]
pub(crate) struct Owners {
    /// By process id, also those that have ended.
    pub ranks: BTreeMap<i32, Rank>,
    /// This host's name, as programs here have it.
    pub host: String,
    /// The parent of a process, if it is there.
    pub parent: fn(i32) -> Option<i32>,
    /// The parent of the ranks, and of what they left behind.
    pub shim: i32,
}

impl Owners {
    /// Of ranks that this process has started.
    pub fn of_children(ranks: BTreeMap<i32, Rank>) -> Self {
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        Self {
            ranks,
            host: host.unwrap_or_default(),
            parent: |pid| procfs::stat(pid).map(|stat| stat.parent),
            shim: std::process::id().cast_signed(),
        }
    }

    pub(super) fn of(&self, writer: Writer) -> Owner {
        let mut at = match writer {
            Writer::Process(pid) => pid,
            Writer::Unknown => return Owner::Unknown,
            Writer::Elsewhere => return Owner::Other,
        };
        for _ in 0..ANCESTORS_MAX {
            if let Some(rank) = self.ranks.get(&at) {
                return Owner::Rank(*rank);
            }
            match (self.parent)(at) {
                _ if at == self.shim => return Owner::Unknown,
                None => return Owner::Unknown,
                Some(0) => return Owner::Other,
                Some(parent) => at = parent,
            }
        }
        Owner::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_programs_give_them() {
        let table = [
            ("1795638342.vm.20351.0", Writer::Process(20351)),
            ("1795638342.vm.20351.0.suffix", Writer::Process(20351)),
            ("1795638342.vm.20351.0.v2", Writer::Process(20351)),
            ("1795638342.vm", Writer::Unknown),
            ("1795638342.vm.profile-empty", Writer::Unknown),
            ("1795638342.vm.99999999999.0", Writer::Unknown),
            ("1795638342.vm2.20351.0", Writer::Elsewhere),
            ("1795638342.other.20351.0", Writer::Elsewhere),
            ("mine", Writer::Unknown),
            ("mine.vm.7.0", Writer::Unknown),
            ("", Writer::Unknown),
        ];
        for (name, expected) in table {
            assert_eq!(Writer::named(name, "vm"), expected, "{name}");
        }
        assert_eq!(Writer::named("1.a.b.7.0", "a.b"), Writer::Process(7));
        assert_eq!(Writer::named("1..7.0", ""), Writer::Process(7));
    }

    #[test]
    fn a_file_is_that_of_the_rank_whose_descendant_wrote_it() {
        // 1 is init, 5 the shim, 10 and 11 ranks, 20 started by 11, 21 by 20, 30 left behind, 40 and 41 others'.
        let owners = Owners {
            ranks: [(10, Rank(0)), (11, Rank(1)), (12, Rank(2))].into(),
            host: "vm".into(),
            parent: |pid| match pid {
                1 => Some(0),
                5 | 40 => Some(1),
                10 | 11 | 30 => Some(5),
                20 => Some(11),
                21 => Some(20),
                41 => Some(40),
                50 => Some(50),
                _ => None,
            },
            shim: 5,
        };
        let table = [
            (Writer::Process(10), Owner::Rank(Rank(0))),
            (Writer::Process(21), Owner::Rank(Rank(1))),
            // One that has ended is known all the same.
            (Writer::Process(12), Owner::Rank(Rank(2))),
            (Writer::Process(30), Owner::Unknown),
            (Writer::Process(99), Owner::Unknown),
            (Writer::Process(41), Owner::Other),
            (Writer::Process(1), Owner::Other),
            (Writer::Process(50), Owner::Other),
            (Writer::Unknown, Owner::Unknown),
            (Writer::Elsewhere, Owner::Other),
        ];
        for (writer, expected) in table {
            assert_eq!(owners.of(writer), expected, "{writer:?}");
        }
    }
}
