//! The benches.

use crate::cargo;
use crate::python;
use crate::setup::{self, Wants};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::process::Command;

/// Sets up, then becomes the bench program.
pub fn run(args: &[OsString]) -> Result<()> {
    match args.first().and_then(|name| name.to_str()) {
        Some("reconnect") => return load(args),
        Some("observers") => return observers(args),
        Some("durable") => {
            setup::run(&cargo::deps_dir(), &Wants { libtorch: false, tools: true, digits: false })?;
            return load(args);
        }
        Some("agents") => {
            python::bring_with(&["torchft==0.2.0"]).context("failed to set up the Python to compare with")?;
            return load(&[args, &["--python".into(), python::path().into()]].concat());
        }
        _ => {}
    }
    setup::run(&cargo::deps_dir(), &Wants { libtorch: true, tools: false, digits: false })?;
    python::bring().context("failed to set up the Python to compare with")?;
    // What it measures is built beside it.
    let packages = ["muster-cli", "muster-trainer", "muster-tests", "muster-tcpstore"];
    let packages = packages.map(|package| ["--package", package]).concat();
    let build = [&["cargo", "build", "--release", "--bins", "--examples"][..], &packages].concat();
    cargo::run(&mut cargo::command(&build)).context("failed to build")?;
    let bench = cargo::debug_dir().with_file_name("release").join("bench");
    cargo::become_command(&mut Command::new(bench), args)
}

/// Real daemons, whose ranks are the bench program itself, and readers of the load generator.
fn observers(args: &[OsString]) -> Result<()> {
    let packages = ["muster-cli", "muster-tests", "muster-reconnect"].map(|package| ["--package", package]);
    let build = [&["cargo", "build", "--release"][..], &packages.concat()].concat();
    cargo::run(&mut cargo::command(&build)).context("failed to build")?;
    let bench = cargo::debug_dir().with_file_name("release").join("bench");
    cargo::become_command(&mut Command::new(bench), args)
}

/// Control plane only: neither torch nor the trainer.
fn load(args: &[OsString]) -> Result<()> {
    let build = ["cargo", "build", "--release", "--package", "muster-cli", "--package", "muster-reconnect"];
    cargo::run(&mut cargo::command(&build)).context("failed to build")?;
    let bench = cargo::debug_dir().with_file_name("release").join("reconnect");
    cargo::become_command(&mut Command::new(bench), args)
}
