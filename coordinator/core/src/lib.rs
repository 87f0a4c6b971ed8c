//! The pure core of the coordinator: jobs, nodes, leases, gangs, rendezvous and rank assignment.
//!
//! Decisions are functions of (state, input, now). Nothing here does I/O, reads a clock, knows tokio or
//! the wire format; the driver in `muster-coordinator` feeds inputs in and carries effects out.

pub mod types;
