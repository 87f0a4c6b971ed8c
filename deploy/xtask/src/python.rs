//! A Python with torch, to compare with and to run programs that know nothing of Muster: a virtual environment in
//! `.deps/python`.

use crate::cargo;
use crate::deps::{Deps, Part};
use crate::sha256;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// torch, what its programs write their curves with, and what the plug-in needs and is made with.
const PACKAGES: [&str; 7] = [
    "torch==2.11.0",
    "numpy==2.3.4",
    "tensorboard==2.21.0",
    "grpcio==1.85.1",
    "protobuf==7.36.2",
    "grpcio-tools==1.85.1",
    "setuptools==80.9.0",
];
/// The plug-in for stock torchrun, and what it is made of.
const PLUG_IN: &str = "deploy/torchrun";
const PLUG_IN_FILES: [&str; 7] = [
    "proto/muster/v1/rendezvous_service.proto",
    "deploy/torchrun/pyproject.toml",
    "deploy/torchrun/setup.py",
    "deploy/torchrun/muster_torchrun/__init__.py",
    "deploy/torchrun/muster_torchrun/api.py",
    "deploy/torchrun/muster_torchrun/handler.py",
    "deploy/torchrun/muster_torchrun/link.py",
];

fn python() -> Part {
    Part {
        name: "Python with torch",
        stamp: "python/.stamp",
        fingerprint: PACKAGES.join(" "),
        files: &["python/bin/python3"],
    }
}

fn plug_in() -> Result<Part> {
    let hash = |file: &&str| Ok(sha256::hex(&sha256::of_file(&cargo::root().join(file))?));
    Ok(Part {
        name: "the plug-in for torchrun",
        stamp: "python/.plug-in",
        fingerprint: PLUG_IN_FILES.iter().map(hash).collect::<Result<Vec<String>>>()?.join(" "),
        files: &["python/bin/python3"],
    })
}

/// Brings it, if it is not there, and the plug-in as it is now. A virtual environment cannot be moved, so it is made in
/// place; pip goes on with half of one.
pub fn bring() -> Result<()> {
    let plug_in = plug_in()?;
    let dir = cargo::deps_dir();
    let is_whole = python().is_there(&dir);
    if is_whole && plug_in.is_there(&dir) {
        return Ok(());
    }
    let deps = Deps::lock(&dir)?;
    if !is_whole {
        eprintln!("python: installing torch with all of CUDA into .deps/python, 3 GB to download; once");
        cargo::run(Command::new("python3").args(["-m", "venv"]).arg(deps.path("python")))
            .context("python3 has no venv (Debian: `sudo apt-get install python3-venv`)")?;
        pip(&PACKAGES)?;
        deps.stamp(&python())?;
    }
    pip(&["--no-deps", "--no-build-isolation", "--force-reinstall", PLUG_IN])?;
    deps.stamp(&plug_in)
}

/// Where it is.
pub fn path() -> PathBuf {
    cargo::deps_dir().join("python/bin/python3")
}

/// Brings it with packages that only a bench needs.
pub fn bring_with(packages: &[&str]) -> Result<()> {
    bring()?;
    pip(&[&PACKAGES, packages].concat())
}

fn pip(args: &[&str]) -> Result<()> {
    let mut pip = Command::new(path());
    cargo::run(pip.args(["-m", "pip", "install", "--quiet"]).args(args).current_dir(cargo::root()))
}
