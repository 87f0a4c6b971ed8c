//! The c10d TCPStore server: the key-value store at which the ranks of one generation meet, to torch's wire protocol.
//!
//! [`Store`] is the state machine: keys, queues, and who waits for them; a request goes in and replies come out, and it
//! knows no sockets and no clock. [`Input`] finds the requests in what a client sends, and [`Outbox`] keeps the replies
//! that it does not take yet. [`Server`] is the thin driver around them. Whatever comes from the network may be
//! hostile: every length is checked before memory is taken for it, everything that is held counts against one limit,
//! and who goes beyond a limit is disconnected with a reason in the log, for the protocol has no reply that says no.
//!
//! # What differs from torch's own server
//!
//! The encoding is from recordings of torch 2.11's client with its libuv server, and from the headers of 2.9 to 2.13;
//! what a server does beside it, from torch's public source. The clients of 2.9.1 and 2.13.0 have gone through the same
//! conformance tests as that of 2.11 (`MUSTER_TORCH_PYTHON` names the Python); BARRIER was not recorded. A client cannot
//! tell the two servers apart but for this, of which the points on comparisons, queues and lists of keys were read and not seen to happen:
//!
//! - It listens on one address, not on all of the machine's, and what it holds is bounded.
//! - Values may have 64 MiB; torch's stop at 8.
//! - A comparison that sets nothing wakes nobody; torch wakes who waits for the key, which then reads an empty value.
//! - A queue that has values counts as there for who waits for it among other keys; torch has them wait for the next.
//! - A counter that would leave 64 bits is refused; torch's starts again from the other end.
//! - A list of several keys is set whole or not at all; torch sets those that have come in.
//! - A client that does not begin with the validation is disconnected; torch's server may keep it, unanswered.
//! - LIST_KEYS and BARRIER, which came with torch 2.10 and 2.12, are known whichever torch a job uses.
//!
//! A store is for one generation: ranks that end their process group and make it again under the same store find the
//! addresses of before, with torch's own agent store as with this one. A generation that starts anew has a new store.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

mod connection;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod input;
mod limits;
mod observe;
mod refusal;
mod reply;
mod server;
mod store;
mod wire;

pub use input::Input;
pub use limits::{Budget, Limits, Value};
pub use observe::{ClientView, Snapshot, WaitView};
pub use refusal::Refusal;
pub use reply::{Outbox, Reply};
pub use server::{Running, Server};
pub use store::{Client, Replies, Store, Waiting, shown};
pub use wire::{Key, MAGIC, Request};
