//! What a daemon shows of itself over HTTP: `/metrics` to Prometheus, `/healthz` and `/readyz` to probes; what it says to
//! systemd; how many connections there may be; and whether its data directory and its secrets are its own. Both daemons use
//! it; what is counted is theirs. It only reads: nothing can be changed through it.
//!
//! Labels have few values that are known beforehand: no job, node, rank or user is one. What is counted is kept as it
//! changes, so that a look costs the same in a cluster of ten thousand nodes.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

mod address;
mod announce;
mod catalogue;
mod data_dir;
mod places;
mod secrets;
mod server;
mod systemd;

pub use address::{AddressError, Http, Listen, bind, canonical, listen};
pub use announce::{announce, announce_by};
pub use catalogue::{Catalogue, SECONDS};
pub use data_dir::{DataDirError, own_data_dir};
pub use places::{NoPlace, Place, PlaceLimits, Places};
pub use prometheus::{
    Histogram, HistogramTimer, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
pub use secrets::secret_file_warning;
pub use server::{Page, serve};
pub use systemd::{NOTIFY_SOCKET, ready, stopping};
