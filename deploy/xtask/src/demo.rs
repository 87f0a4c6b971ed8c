//! The demo: from a fresh clone to a running cluster with one command.

use crate::cargo;
use crate::setup::{self, Wants};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::process::Command;

/// Sets up, builds, and becomes the demo.
pub fn run(args: &[OsString]) -> Result<()> {
    setup::run(&cargo::deps_dir(), &Wants { libtorch: true, tools: false, digits: false })?;
    let build = ["cargo", "build", "--package", "muster-cli", "--package", "muster-trainer"];
    cargo::run(&mut cargo::command(&build)).context("failed to build")?;
    let mut muster = Command::new(cargo::debug_dir().join("muster"));
    cargo::become_command(muster.arg("demo").current_dir(cargo::root()), args)
}
