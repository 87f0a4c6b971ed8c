//! `muster-trainer`: training programs that work out of the box, each on muster-ddp.
//!
//! Owns the command line and the exit code: 0 trained, 1 training failed (the whole chain of causes is on
//! stderr), 2 a wrong command line. SIGTERM keeps its default action: the next start goes on from the last checkpoint.

mod data;
mod vision;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Training programs built on muster-ddp. Run them under `muster`, under `torchrun --no-python`, or alone.
#[derive(Debug, Parser)]
#[command(name = "muster-trainer", version, about)]
struct Cli {
    #[command(subcommand)]
    program: Program,
}

#[derive(Debug, Subcommand)]
enum Program {
    /// Train a small convolutional network on Fashion-MNIST, or on any images in its file format.
    Vision(vision::Flags),
}

fn main() -> ExitCode {
    // Before any other use of torch: CUDA operators register when the library loads.
    let cuda = muster_ddp::load_cuda();
    let Program::Vision(flags) = Cli::parse().program;
    let outcome = muster_ddp::record(|| vision::train(&flags, cuda.is_ok()));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-trainer: {error:#}");
            ExitCode::FAILURE
        }
    }
}
