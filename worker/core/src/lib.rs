//! The pure core of the node daemon: desired assignments against what runs, and the lease that ranks live by.
//!
//! No I/O, no clock. `now` counts milliseconds on a clock that never goes back and that goes on while the machine is
//! suspended (CLOCK_BOOTTIME): a node that slept must not take its lease to be younger than it is.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

mod adopt;
mod core;
pub mod doctor;
pub mod health;
mod lease;
mod messages;
mod numa;
mod part;
pub mod slurm;
mod surroundings;

pub use adopt::{Adoption, ShimRecord, adopt};
pub use core::Core;
pub use lease::Fence;
pub use messages::{Adopted, Effect, Input};
pub use numa::{NumaBinding, Processor, Topology};
pub use surroundings::{Facts, WARNING, compute_ports, derive};
