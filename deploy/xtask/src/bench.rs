//! The benches, and the Python with torch that they compare with: a virtual environment in `.deps/python`.

use crate::cargo;
use crate::deps::{Deps, Part};
use crate::setup::{self, Wants};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::process::Command;

const PACKAGES: [&str; 2] = ["torch==2.11.0", "numpy==2.3.4"];

fn python() -> Part {
    Part {
        name: "Python with torch",
        stamp: "python/.stamp",
        fingerprint: PACKAGES.join(" "),
        files: &["python/bin/python3"],
    }
}

/// Sets up, then becomes the bench program.
pub fn run(args: &[OsString]) -> Result<()> {
    if args.first().is_some_and(|name| name == "reconnect") {
        return reconnect(&args[1..]);
    }
    setup::run(&cargo::deps_dir(), &Wants { libtorch: true, tools: false, digits: false })?;
    if !python().is_there(&cargo::deps_dir()) {
        bring_python().context("failed to set up the Python to compare with")?;
    }
    // What it measures is built beside it.
    let packages = ["muster-cli", "muster-trainer", "muster-tests", "muster-tcpstore"];
    let packages = packages.map(|package| ["--package", package]).concat();
    let build = [&["cargo", "build", "--release", "--bins", "--examples"][..], &packages].concat();
    cargo::run(&mut cargo::command(&build)).context("failed to build")?;
    let bench = cargo::debug_dir().with_file_name("release").join("bench");
    cargo::become_command(&mut Command::new(bench), args)
}

/// Control plane only: neither torch nor the trainer.
fn reconnect(args: &[OsString]) -> Result<()> {
    let build = ["cargo", "build", "--release", "--package", "muster-cli", "--package", "muster-reconnect"];
    cargo::run(&mut cargo::command(&build)).context("failed to build")?;
    let bench = cargo::debug_dir().with_file_name("release").join("reconnect");
    cargo::become_command(&mut Command::new(bench), args)
}

/// A virtual environment cannot be moved, so it is made in place; pip goes on with half of one.
fn bring_python() -> Result<()> {
    eprintln!("bench: installing Python's torch with all of CUDA into .deps/python, 3 GB to download; once");
    let deps = Deps::lock(&cargo::deps_dir())?;
    let venv = deps.path("python");
    cargo::run(Command::new("python3").args(["-m", "venv"]).arg(&venv))
        .context("python3 has no venv (Debian: `sudo apt-get install python3-venv`)")?;
    let mut pip = Command::new(venv.join("bin/python3"));
    cargo::run(pip.args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
    deps.stamp(&python())
}
