//! The gRPC API `muster.v1` and its conversion to the checked types of `muster-core`.
//!
//! Wire types stop in [`convert`]: what comes from the network is checked there, once, and whoever holds a
//! checked type need not check again. This crate opens no connection.

pub mod convert;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;

/// Messages, clients and servers generated from `muster/v1/*.proto`.
pub mod v1 {
    #![allow(
        clippy::all,
        clippy::pedantic,
        clippy::allow_attributes_without_reason,
        missing_docs,
        reason = "generated code"
    )]
    tonic::include_proto!("muster.v1");
}

/// The encoded descriptor set of `muster.v1` with its comments, for reflection.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/muster.v1.bin"));
