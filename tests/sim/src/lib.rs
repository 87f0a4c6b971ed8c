//! Both cores, with a model of everything around them, on one virtual clock: a seed gives a schedule of faults, and
//! whatever comes of it, what must hold is checked after every step. The same seed gives the same history.

mod cluster;
mod coordinator;
mod daemon;
mod faults;
mod machine;
mod messages;
mod network;
mod schedule;
mod shims;
mod shrink;
mod stranger;
mod truth;
mod world;

pub use schedule::{Entry, Fault, MACHINES, SPAN, of_seed};
pub use shrink::shrink;

use world::World;

/// Time after the last fault by which everything that can run must have ended, in virtual milliseconds.
const HEALED: u64 = 1_800_000;

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was violated first, and when, in virtual milliseconds.
    pub violation: Option<(u64, String)>,
    /// Hash of the whole history.
    pub hash: u64,
    /// Events dealt with.
    pub steps: u64,
    /// Entries of the schedule carried out.
    pub faults: u64,
    /// Virtual time, times machines, in milliseconds.
    pub node_ms: u64,
}

/// Runs one schedule.
pub fn run(seed: u64, schedule: Vec<Entry>, trace: bool) -> Outcome {
    let mut world = World::new(seed, schedule, trace);
    world.set_up();
    world.run_until(SPAN);
    if world.truth.violation.is_none() {
        world.heal();
        let end = SPAN + HEALED;
        while world.now < end && world.truth.violation.is_none() && !world.is_at_rest() {
            let next = world.now + 10_000;
            world.run_until(next);
        }
        if let (None, Some(process)) = (&world.truth.violation, &world.coordinator.process) {
            world.truth.check_end(&process.core);
        }
    }
    Outcome {
        violation: world.truth.violation.clone().map(|what| (world.now, what)),
        hash: world.hash,
        steps: world.steps,
        faults: world.faults,
        node_ms: world.now * MACHINES as u64,
    }
}

/// Runs a seed's own schedule.
pub fn run_seed(seed: u64) -> Outcome {
    run(seed, of_seed(seed), false)
}
