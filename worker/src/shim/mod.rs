//! Shims: one small process per gang on this node, the parent of the gang's ranks. The daemon may die or be
//! replaced by a newer one; the ranks run on, and the next daemon finds their shim and goes on from there.
//!
//! [`serve`] is the shim's own process: it starts the ranks, keeps their telemetry, ends them when it is told to or
//! when the lease of the node ends, and gives their exits to whatever daemon there is. [`client`] is a daemon's side.
//! They speak [`protocol`] over a socket beside the [`record`] by which a shim is found.

mod client;
mod control;
mod find;
mod progress;
mod protocol;
mod ranks;
mod record;
mod rendezvous;
mod serve;
mod told;

#[cfg(feature = "simulation")]
pub(crate) use client::Ends;
pub(crate) use client::{Context, Shim};
pub(crate) use find::find;
pub(crate) use protocol::Command;
#[cfg(any(test, fuzzing))]
pub(crate) use protocol::{News, State};
pub(crate) use record::Order;
#[cfg(any(test, fuzzing))]
pub(crate) use record::Record;
pub use serve::main;
