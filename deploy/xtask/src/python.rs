//! A Python with torch, to compare with and to run programs that know nothing of Muster: a virtual environment in
//! `.deps/python`.

use crate::cargo;
use crate::deps::{Deps, Part};
use anyhow::{Context, Result};
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

/// Brings it, if it is not there. A virtual environment cannot be moved, so it is made in place; pip goes on with half of one.
pub fn bring() -> Result<()> {
    if python().is_there(&cargo::deps_dir()) {
        return Ok(());
    }
    eprintln!("python: installing torch with all of CUDA into .deps/python, 3 GB to download; once");
    let deps = Deps::lock(&cargo::deps_dir())?;
    let venv = deps.path("python");
    cargo::run(Command::new("python3").args(["-m", "venv"]).arg(&venv))
        .context("python3 has no venv (Debian: `sudo apt-get install python3-venv`)")?;
    let mut pip = Command::new(venv.join("bin/python3"));
    cargo::run(pip.args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
    deps.stamp(&python())
}
