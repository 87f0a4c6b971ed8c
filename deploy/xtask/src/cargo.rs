//! The checkout's paths, and commands run in it.

use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

/// The root of the checkout that this runs for: cargo names it at run time, so a moved checkout works.
pub fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(here).join("../..").canonicalize().expect("xtask lies two folders below the root")
}

/// Where `.cargo/config.toml` looks for what the set-up brings.
pub fn deps_dir() -> PathBuf {
    root().join(".deps")
}

/// Where builds put what they make.
pub fn target_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    root().join(target)
}

/// The folder of the binaries that a build in the dev profile leaves.
pub fn debug_dir() -> PathBuf {
    target_dir().join("debug")
}

/// A command to be run at the root, written as one would type it there.
pub fn command(words: &[&str]) -> Command {
    let root = root();
    let program = if words[0].contains('/') { root.join(words[0]) } else { words[0].into() };
    let mut command = Command::new(program);
    command.args(&words[1..]).current_dir(root);
    // `cargo run` sets these for xtask; a build script that watches one would run again for nothing.
    for (name, _) in std::env::vars_os() {
        let ours = name.to_string_lossy();
        if ours.starts_with("CARGO_PKG_") || ours.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command to its end with this program's own input and output.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("failed to start {name}"))?;
    if !status.success() {
        bail!("{name} ended with {status}");
    }
    Ok(())
}

/// Becomes the command: it gets the terminal's signals itself, and its exit code is ours.
pub fn become_command(command: &mut Command, args: &[OsString]) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let name = command.get_program().to_string_lossy().into_owned();
    Err(command.args(args).exec()).with_context(|| format!("failed to start {name}"))
}
