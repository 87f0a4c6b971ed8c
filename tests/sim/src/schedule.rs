//! What happens to the cluster from outside, drawn from a seed: what users ask for, and what goes wrong.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Machines of the cluster.
pub const MACHINES: usize = 5;
/// GPUs of each.
pub const GPUS: u32 = 4;
/// Virtual time over which faults come, in milliseconds.
pub const SPAN: u64 = 2_400_000;

/// A job as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub nodes: u32,
    pub max_nodes: u32,
    pub procs: u32,
    pub gpus: u32,
    pub restarts: u32,
    /// How long its ranks run, in milliseconds.
    pub work: u64,
    /// Generations that fail by themselves before one succeeds.
    pub failures: u32,
    pub ignores_stop: bool,
    pub progress: bool,
    /// Stopped when only the coordinator is gone.
    pub strict: bool,
}

/// Something that happens. `node` is a machine, `job` counts among those that run, `part` among its machines; `ms` is
/// how long it lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Fault {
    Submit(Wanted),
    /// The same submission once more, as a client does that has had no answer.
    Resubmit(usize),
    Cancel(usize),
    Drain {
        node: usize,
        timeout: Option<u64>,
    },
    Uncordon(usize),
    KillRank {
        job: usize,
        rank: usize,
        code: Option<i32>,
    },
    Hang(usize),
    /// Ranks of one node report nothing for a while; others do.
    Quiet {
        job: usize,
    },
    /// A rank of the job cannot be killed for a while.
    Stuck {
        job: usize,
        rank: usize,
    },
    KillShim {
        job: usize,
        part: usize,
    },
    FreezeShim {
        job: usize,
        part: usize,
        ms: u64,
    },
    KillDaemon {
        node: usize,
        ms: u64,
    },
    StopDaemon {
        node: usize,
        ms: u64,
    },
    FreezeDaemon {
        node: usize,
        ms: u64,
    },
    Reboot {
        node: usize,
        ms: u64,
    },
    FreezeMachine {
        node: usize,
        ms: u64,
    },
    Cut {
        node: usize,
        up: bool,
        down: bool,
        ms: u64,
    },
    CutAll {
        ms: u64,
    },
    BreakSession(usize),
    SlowNetwork {
        ms: u64,
    },
    KillCoordinator {
        ms: u64,
    },
    PauseCoordinator {
        ms: u64,
    },
    /// Somebody sets the coordinator's wall clock.
    SetClock {
        by: i64,
    },
    SlowDisk {
        ms: u64,
    },
    /// A node reports the end of a gang that it does not hold.
    Stranger {
        node: usize,
        job: usize,
    },
    /// Another machine comes up under the name of this one.
    Clone {
        node: usize,
        ms: u64,
    },
}

/// A fault and when it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// In virtual milliseconds.
    pub at: u64,
    /// What comes.
    pub fault: Fault,
}

/// The schedule of a seed.
pub fn of_seed(seed: u64) -> Vec<Entry> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed ^ 0x5EED);
    let gap = rng.random_range(5_000..40_000_u64);
    let (mut at, mut entries) = (1_000, Vec::new());
    for _ in 0..rng.random_range(1..4) {
        entries.push(Entry { at, fault: Fault::Submit(wanted(rng)) });
    }
    while at < SPAN {
        // Faults that come together find more than faults that come alone.
        at += if rng.random_bool(0.3) { rng.random_range(1..2_000) } else { rng.random_range(1..2 * gap) };
        if at < SPAN {
            entries.push(Entry { at, fault: fault(rng) });
        }
    }
    entries
}

fn wanted(rng: &mut impl Rng) -> Wanted {
    let nodes = rng.random_range(1..4);
    let elastic = rng.random_bool(0.4);
    Wanted {
        nodes,
        max_nodes: if elastic { rng.random_range(nodes..=MACHINES as u32) } else { nodes },
        procs: rng.random_range(1..3),
        gpus: rng.random_range(0..3),
        restarts: rng.random_range(0..6),
        work: *pick(rng, &[2_000, 20_000, 60_000, 300_000]),
        failures: if rng.random_bool(0.2) { rng.random_range(1..4) } else { 0 },
        ignores_stop: rng.random_bool(0.1),
        progress: rng.random_bool(0.3),
        strict: rng.random_bool(0.15),
    }
}

fn fault(rng: &mut impl Rng) -> Fault {
    let job = rng.random_range(0..64);
    let (node, part, rank) = (rng.random_range(0..MACHINES), rng.random_range(0..4), rng.random_range(0..8));
    // Shorter than the lease, about as long, longer.
    let ms = *pick(rng, &[300, 3_000, 15_000, 27_000, 33_000, 60_000]);
    match rng.random_range(0..66) {
        0..12 => Fault::Submit(wanted(rng)),
        12 => Fault::Resubmit(job),
        13..15 => Fault::Cancel(job),
        15 => Fault::Drain { node, timeout: rng.random_bool(0.5).then_some(ms) },
        16..20 => Fault::Uncordon(node),
        20..24 => Fault::KillRank { job, rank, code: if rng.random_bool(0.5) { None } else { Some(1) } },
        24 => Fault::Hang(job),
        25 => Fault::Quiet { job },
        27..30 => Fault::KillShim { job, part },
        30 => Fault::FreezeShim { job, part, ms },
        31..35 => Fault::KillDaemon { node, ms },
        35 => Fault::StopDaemon { node, ms },
        36..38 => Fault::FreezeDaemon { node, ms },
        38..40 => Fault::Reboot { node, ms },
        40..42 => Fault::FreezeMachine { node, ms },
        42..47 => {
            let (up, down) = *pick(rng, &[(true, true), (true, false), (false, true)]);
            Fault::Cut { node, up, down, ms }
        }
        47 => Fault::CutAll { ms },
        48..50 => Fault::BreakSession(node),
        50..52 => Fault::SlowNetwork { ms },
        52..55 => Fault::KillCoordinator { ms },
        55..58 => Fault::PauseCoordinator { ms },
        58 => Fault::SetClock { by: *pick(rng, &[-3_600_000, -20_000, 20_000, 3_600_000]) },
        59..61 => Fault::SlowDisk { ms },
        26 | 61..63 => Fault::Stuck { job, rank },
        63..65 => Fault::Stranger { node, job },
        _ => Fault::Clone { node, ms },
    }
}

fn pick<'a, T>(rng: &mut impl Rng, from: &'a [T]) -> &'a T {
    &from[rng.random_range(0..from.len())]
}
