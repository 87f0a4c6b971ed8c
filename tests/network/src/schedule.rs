//! What goes wrong, and when.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::NODES;

/// Faults are injected within this much simulated time.
const SPAN: Duration = Duration::from_mins(2);
/// Shortest and longest time for which a fault holds, in milliseconds: below and beyond the lease of 10 s.
const HOLDS_MS: std::ops::Range<u64> = 500..25_000;
/// The delay of a slow link, and of one that is well.
const SLOW: Duration = Duration::from_millis(1_500);
const WELL: Duration = Duration::from_millis(40);

/// A fault, or its end.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Nothing passes between a node and the coordinator.
    Cut(usize),
    /// Nothing that the node sends arrives.
    CutUp(usize),
    /// Nothing that the coordinator sends it arrives.
    CutDown(usize),
    /// Everything between them waits.
    Hold(usize),
    /// They hear each other again; what waited arrives.
    Repair(usize),
    /// The user and the coordinator do not hear each other.
    CutUser,
    /// They do again.
    RepairUser,
    /// A message takes up to so long.
    Slow(usize, Duration),
    /// A node's machine dies.
    Crash(usize),
    /// It is started again.
    Start(usize),
    /// The coordinator's machine dies.
    CrashCoordinator,
    /// Its process dies. The machine refuses connections.
    KillCoordinator,
    /// Both are there again.
    StartCoordinator,
}

/// A fault at a time.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Simulated time.
    pub at: Duration,
    /// What happens.
    pub fault: Fault,
}

/// So many faults, with their ends, in order. When the last has ended everything is well.
pub fn random(seed: u64, faults: usize) -> Vec<Entry> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut all = Vec::new();
    // Who is dead until when, the coordinator last: nobody is started twice.
    let mut dead = [Duration::ZERO; NODES + 1];
    for _ in 0..faults {
        let at = Duration::from_millis(rng.random_range(1_000..SPAN.as_millis() as u64));
        let until = at + Duration::from_millis(rng.random_range(HOLDS_MS));
        let node = rng.random_range(0..NODES);
        let (begins, ends) = match rng.random_range(0..10) {
            0 => (Fault::Cut(node), Fault::Repair(node)),
            1 => (Fault::CutUp(node), Fault::Repair(node)),
            2 => (Fault::CutDown(node), Fault::Repair(node)),
            3 => (Fault::Hold(node), Fault::Repair(node)),
            4 => (Fault::CutUser, Fault::RepairUser),
            5 => (Fault::Slow(node, SLOW), Fault::Slow(node, WELL)),
            6 | 7 => (Fault::Crash(node), Fault::Start(node)),
            8 => (Fault::CrashCoordinator, Fault::StartCoordinator),
            _ => (Fault::KillCoordinator, Fault::StartCoordinator),
        };
        let who = match begins {
            Fault::Crash(_) => Some(node),
            Fault::CrashCoordinator | Fault::KillCoordinator => Some(NODES),
            _ => None,
        };
        all.push((at, until, who, begins, ends));
    }
    all.sort_by_key(|(at, ..)| *at);
    let mut entries = Vec::new();
    for (at, until, who, begins, ends) in all {
        if let Some(who) = who {
            if at <= dead[who] {
                continue;
            }
            dead[who] = until;
        }
        entries.push(Entry { at, fault: begins });
        entries.push(Entry { at: until, fault: ends });
    }
    entries.sort_by_key(|entry| entry.at);
    let last = entries.last().map_or(Duration::ZERO, |entry| entry.at);
    // A link that was cut twice at once may have been repaired once.
    entries.extend((0..NODES).map(|node| Entry { at: last, fault: Fault::Repair(node) }));
    entries.push(Entry { at: last, fault: Fault::RepairUser });
    entries
}
