//! `cargo xtask sim`: runs seeds and prints, as its last line, what came of them.

#![expect(clippy::disallowed_methods, reason = "how long it took is shown to a person")]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use clap::Parser;
use muster_core::bugs::{ALL, Bug, plant};
use muster_sim::{Outcome, of_seed, run, shrink};

/// Failing seeds that are shown and shrunk; one is enough to work on.
const SHOWN_MAX: usize = 3;

/// Simulates clusters under faults, one for each seed.
#[derive(Debug, Parser)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Run this seed alone and print its history.
    #[arg(long)]
    seed: Option<u64>,
    /// Of the schedule of --seed, only these entries.
    #[arg(long, value_delimiter = ',', requires = "seed")]
    keep: Vec<usize>,
    /// Plant this bug, to see that it is found.
    #[arg(long)]
    bug: Option<String>,
    /// Seeds that run side by side. Default: one for each core.
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let bug = args.bug.as_ref().map(|name| (name, ALL.into_iter().find(|bug| format!("{bug:?}") == *name)));
    let bug = match bug {
        Some((name, None)) => {
            eprintln!("error: {name} is not one of {ALL:?}");
            return ExitCode::from(2);
        }
        Some((_, Some(bug))) => bug,
        None => Bug::None,
    };
    plant(bug);
    match args.seed {
        Some(seed) => replay(seed, &args.keep),
        None => explore(&args, bug),
    }
}

fn replay(seed: u64, keep: &[usize]) -> ExitCode {
    let mut schedule = of_seed(seed);
    if !keep.is_empty() {
        schedule = keep.iter().filter_map(|index| schedule.get(*index).cloned()).collect();
    }
    let outcome = run(seed, schedule, true);
    let violations = u64::from(outcome.violation.is_some());
    if let Some((at, what)) = &outcome.violation {
        println!("at {:.3} s: {what}", *at as f64 / 1000.0);
    }
    let hash = format!("{:016x}", outcome.hash);
    let line =
        serde_json::json!({ "seed": seed, "steps": outcome.steps, "hash": hash, "violations": violations });
    println!("{line}");
    ExitCode::from(u8::from(violations > 0))
}

#[derive(Default)]
struct Totals {
    steps: u64,
    faults: u64,
    node_ms: u64,
    hash: u64,
    failed: Vec<(u64, Outcome)>,
}

fn explore(args: &Args, bug: Bug) -> ExitCode {
    let began = Instant::now();
    let threads =
        args.threads.or_else(|| Some(std::thread::available_parallelism().ok()?.get())).unwrap_or(1);
    let (next, totals) = (AtomicU64::new(0), Mutex::new(Totals::default()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                plant(bug);
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= args.seeds {
                        break;
                    }
                    let seed = args.first + index;
                    let outcome = run(seed, of_seed(seed), false);
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    totals.steps += outcome.steps;
                    totals.faults += outcome.faults;
                    totals.node_ms += outcome.node_ms;
                    // In any order of the threads the same.
                    totals.hash ^= outcome.hash.rotate_left((seed % 64) as u32);
                    if outcome.violation.is_some() {
                        totals.failed.push((seed, outcome));
                    }
                    if index > 0 && index % 500 == 0 {
                        eprintln!("{index} of {} seeds, {} violations", args.seeds, totals.failed.len());
                    }
                }
            });
        }
    });
    let mut totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    totals.failed.sort_by_key(|(seed, _)| *seed);
    for (seed, outcome) in totals.failed.iter().take(SHOWN_MAX) {
        show(*seed, outcome);
    }
    let seconds = began.elapsed().as_secs_f64();
    let line = serde_json::json!({
        "seeds": args.seeds,
        "steps": totals.steps,
        "node_hours": totals.node_ms as f64 / 3_600_000.0,
        "faults": totals.faults,
        "seconds": seconds,
        "seeds_per_second": args.seeds as f64 / seconds,
        "hash": format!("{:016x}", totals.hash),
        "violations": totals.failed.len(),
        "failed_seeds": totals.failed.iter().map(|(seed, _)| seed).collect::<Vec<_>>(),
    });
    println!("{line}");
    ExitCode::from(u8::from(!totals.failed.is_empty()))
}

fn show(seed: u64, outcome: &Outcome) {
    let Some((at, what)) = &outcome.violation else { return };
    println!("seed {seed}, at {:.3} s: {what}", *at as f64 / 1000.0);
    let schedule = of_seed(seed);
    let (kept, shrunk) = shrink(seed, &schedule);
    if let Some((at, what)) = &shrunk.violation {
        println!(
            "with {} of its {} entries, at {:.3} s: {what}",
            kept.len(),
            schedule.len(),
            *at as f64 / 1000.0
        );
    }
    for index in &kept {
        println!("  {:>9.3} s  {:?}", schedule[*index].at as f64 / 1000.0, schedule[*index].fault);
    }
    let kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
    println!("to see its history: cargo xtask sim --seed {seed} --keep {}", kept.join(","));
}
