//! The pure core of the coordinator: jobs, nodes, leases, gangs, rendezvous and rank assignment.
//!
//! Decisions are functions of (state, input, now). Nothing here does I/O, reads a clock, knows tokio or
//! the wire format; the driver in `muster-coordinator` feeds inputs in and carries effects out.
//!
//! Time: `now` is Unix time in milliseconds that never goes back while the process lives (the driver takes
//! the wall clock once and adds monotonic time), so a clock that is set changes no lease.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

pub mod access;
pub mod agents;
#[doc(hidden)]
pub mod bugs;
mod core;
mod effects;
mod fault;
mod gang;
pub mod health;
mod input;
mod invariants;
mod inventory;
mod job;
mod lease;
mod membership;
mod node;
mod owners;
mod pulse;
mod quota;
mod read;
mod rendezvous;
mod requests;
mod schedule;
mod topology;
pub mod types;
mod waiting;

pub use core::{Config, Core, Meta, Snapshot};
pub use effects::{Effects, Event, Refusal, Reply, ToNode, Write, not_owned};
pub use input::{Heard, Input};
pub use inventory::{
    Device, FabricPort, GPU_MODEL_LABEL, Inventory, LinkLayer, NetworkInterface, NumaNode, PortState,
    is_model,
};
pub use job::{Gang, Job, JobState, PastGeneration, RootCause};
pub use node::{Drain, Held, Join, Node, NodeState, Reserved};
pub use owners::{Caller, Rights};
pub use pulse::Pulse;
pub use quota::{QueueFull, QueueMax};
pub use rendezvous::{Awaited, Rendezvous};
pub use schedule::{Plan, solve};
pub use topology::Location;
