//! `cargo xtask`: brings what a build needs into `.deps`, then demo, tests, fuzzing and benches of the
//! checkout.
//! It installs nothing outside the checkout and needs no root.

mod apt;
mod bare;
mod bench;
#[cfg(test)]
mod brought_tests;
mod cargo;
mod containers;
mod data;
mod demo;
mod deps;
mod digits;
mod failures;
mod fetch;
mod fuzz;
mod libraries;
mod libtorch;
mod machine;
mod minimal;
mod nightly;
mod optional;
mod pypi;
mod python;
mod setup;
mod sha256;
mod sim;
mod test;
mod tools;

use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set-up, demo, tests, fuzzing and benches of this checkout")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring libtorch, protoc and a data set into .deps (about 570 MB to download, once)
    Setup(SetupArgs),
    /// Set up, build, and run the demo; further arguments go to `muster demo`
    Demo {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Set up, then run every check and every test, as CI does
    #[command(visible_alias = "ci")]
    Test {
        /// Leave out what needs libtorch
        #[arg(long)]
        quick: bool,
        /// Bring a Python with torch first (several GB), for the tests that run Python programs and compare with torchrun;
        /// without one they are skipped
        #[arg(long, conflicts_with = "quick")]
        python: bool,
    },
    /// Fuzz every decoder that faces the network or the disk; the last line of output is a JSON object
    Fuzz(fuzz::Options),
    /// Simulate clusters under faults, one for each seed; the last line of output is a JSON object. `--seed S` replays one
    Sim {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run a command in a bare root: a minimal Debian with only what README asks for, and a clone of HEAD. As root
    Bare(bare::Options),
    /// What takes longer than a test may: the fuzzer, a minute for each decoder, and half an hour of simulation
    Nightly,
    /// Set up a Python with torch as well (several GB) where a bench needs it, and run the benches; further arguments go to them
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

#[derive(Args)]
struct SetupArgs {
    /// Also bring the tools that only the tests use: buf, grpcurl, cargo-deny, cargo-fuzz,
    /// hadolint, patchelf, etcd, ibstat, iproute2, kubectl, kubernetes-validate, buildah,
    /// debootstrap, libfaketime, Prometheus, Slurm, systemd, torch's tests
    #[arg(long)]
    tools: bool,
    /// Also bring a Python with torch, with which tests and benches compare (3 GB to download)
    #[arg(long)]
    python: bool,
    /// Where to bring it instead of .deps: to try the set-up itself
    #[arg(long, hide = true)]
    deps_dir: Option<PathBuf>,
    /// Take scikit-learn's digits, as on a machine without apt: to try the set-up itself
    #[arg(long, hide = true)]
    digits: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Setup(args) => {
            let wants = setup::Wants { libtorch: true, tools: args.tools, digits: args.digits };
            let done = setup::run(&args.deps_dir.unwrap_or_else(cargo::deps_dir), &wants);
            if args.python { done.and_then(|()| python::bring()) } else { done }
        }
        Command::Demo { args } => demo::run(&args),
        Command::Test { quick, python } => test::run(quick, python),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Sim { args } => sim::run(&args),
        Command::Bare(options) => bare::run(&options),
        Command::Nightly => nightly::run(),
        Command::Bench { args } => bench::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
