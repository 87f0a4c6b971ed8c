//! Points from the ranks: JSON lines on a Unix socket per rank, numbered and kept in a file by the shim, and sent
//! from there by the daemon.
//!
//! A rank connects to the socket named in MUSTER_TELEMETRY and writes lines such as
//! `{"step":1,"values":{"loss":2.3}}`, with an optional `"time"` in Unix seconds.

mod file;
mod outbox;
pub(crate) mod parse;
mod socket;

#[cfg(any(test, fuzzing))]
pub(crate) use file::numbers;
pub(crate) use outbox::Outbox;
pub(crate) use socket::{Changes, RankSocket, Sockets};
