//! The simulation, optimised.

use crate::cargo;
use anyhow::Result;
use std::ffi::OsString;

/// Builds and runs it.
pub fn run(args: &[OsString]) -> Result<()> {
    let words = ["cargo", "run", "--quiet", "--release", "--package", "muster-sim", "--"];
    cargo::run(cargo::command(&words).args(args))
}
