//! The fuzzer: each decoder for a while, on a corpus of its own that is kept in `target/fuzz-corpus` from one run to the
//! next. Which decoders there are, the binary says (`tests/fuzz`).

use crate::cargo;
use crate::setup::{self, Wants};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs::{self, File};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Where the standard library with a sanitizer's runtime comes from, as for everything in `.deps`.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Bounds of one input: longer ones find nothing more and cost speed; the slowest decoder takes milliseconds, and its
/// memory is a fraction of this.
const LIMITS: [&str; 3] = ["-max_len=16384", "-timeout=10", "-rss_limit_mb=2048"];

/// What to fuzz.
#[derive(Args)]
pub struct Options {
    /// How long for each decoder
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this decoder
    #[arg(long, value_name = "DECODER")]
    target: Option<String>,
    /// Run the decoder on this file alone: to see a crash again
    #[arg(long, value_name = "FILE", requires = "target")]
    replay: Option<PathBuf>,
}

/// How one decoder fared.
struct Outcome {
    name: String,
    executions: u64,
    corpus: usize,
    /// The input that broke it, and the last words of the fuzzer.
    crash: Option<(Option<PathBuf>, String)>,
}

/// Builds the fuzzer, and runs it on as many decoders at once as there are cores.
#[expect(clippy::disallowed_methods, reason = "a duration shown to a person")]
pub fn run(options: &Options) -> Result<()> {
    setup::run(&cargo::deps_dir(), &Wants { libtorch: false, tools: true, digits: false })?;
    let fuzzer = Fuzzer::build()?;
    let mut names = fuzzer.decoders()?;
    if let Some(target) = &options.target {
        ensure!(names.contains(target), "no decoder is called {target}; there are {}", names.join(", "));
        names.retain(|name| name == target);
    }
    if let (Some(target), Some(file)) = (&options.target, &options.replay) {
        let file = file.canonicalize().with_context(|| format!("failed to find {}", file.display()))?;
        return cargo::become_command(fuzzer.command(target).args(LIMITS).arg(file), &[]);
    }
    let began = Instant::now();
    let outcomes = fuzzer.run_all(&names, options.seconds)?;
    let seconds = began.elapsed().as_secs();
    show(&outcomes, seconds)
}

struct Fuzzer {
    binary: PathBuf,
    corpus: PathBuf,
    crashes: PathBuf,
}

impl Fuzzer {
    fn build() -> Result<Self> {
        let target = cargo::target_dir();
        let build = target.join("fuzz");
        let mut command =
            cargo::command(&[".deps/bin/cargo-fuzz", "fuzz", "build", "--fuzz-dir", "tests/fuzz"]);
        command.args(["--target", TARGET, "--target-dir"]).arg(&build).arg("decoder");
        // The pinned compiler has the sanitizers; its options for them are not stable.
        cargo::run(command.env("RUSTC_BOOTSTRAP", "1")).context("failed to build the fuzzer")?;
        let binary = build.join(TARGET).join("release/decoder");
        Ok(Self { binary, corpus: target.join("fuzz-corpus"), crashes: target.join("fuzz-crashes") })
    }

    /// Every decoder's name; its samples are in its corpus then.
    fn decoders(&self) -> Result<Vec<String>> {
        let output = Command::new(&self.binary).env("MUSTER_SEEDS", &self.corpus).output();
        let output = output.context("failed to start the fuzzer")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.env("MUSTER_DECODER", name).env("RUST_BACKTRACE", "1");
        command
    }

    fn run_all(&self, names: &[String], seconds: u32) -> Result<Vec<Outcome>> {
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || -> Result<()> {
            while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                let outcome =
                    self.run_one(name, seconds).with_context(|| format!("failed to fuzz {name}"))?;
                let result = if outcome.crash.is_some() { "CRASHED" } else { "ok" };
                eprintln!("fuzz: {name}: {} executions, {result}", outcome.executions);
                done.lock().expect("no worker panics while it holds this").push(outcome);
            }
            Ok(())
        };
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..cores.min(names.len())).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().expect("a worker only fails with an error"))
        })?;
        let mut outcomes = done.into_inner().expect("no worker panicked");
        outcomes.sort_by_key(|outcome| names.iter().position(|name| *name == outcome.name));
        Ok(outcomes)
    }

    fn run_one(&self, name: &str, seconds: u32) -> Result<Outcome> {
        let (corpus, crashes) = (self.corpus.join(name), self.crashes.join(name));
        fs::create_dir_all(&crashes)?;
        let log = crashes.join("log");
        let file = File::create(&log)?;
        let mut prefix = std::ffi::OsString::from("-artifact_prefix=");
        prefix.push(crashes.join(""));
        let mut command = self.command(name);
        command.arg(&corpus).args(LIMITS).arg(prefix);
        command.args([format!("-max_total_time={seconds}"), "-print_final_stats=1".to_owned()]);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let status = command.status().context("failed to start it")?;
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let crash = (!status.success()).then(|| (artifact(&text), reason(&text, &log)));
        let corpus = fs::read_dir(&corpus)?.count();
        Ok(Outcome { name: name.to_owned(), executions: executions(&text), corpus, crash })
    }
}

/// From libFuzzer's last statistics, or from its last progress where it crashed before them.
fn executions(log: &str) -> u64 {
    let stat = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let progress = log.lines().rev().find_map(|line| line.strip_prefix('#')?.split_whitespace().next());
    stat.or(progress).and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

fn artifact(log: &str) -> Option<PathBuf> {
    log.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim().into()))
}

/// What the fuzzer said of the crash, or where it said it.
fn reason(log: &str, file: &Path) -> String {
    let mut lines = log.lines();
    let panic = lines
        .find(|line| line.contains("panicked at"))
        .map(|at| format!("{at} {}", lines.next().unwrap_or("")));
    let error = || log.lines().find(|line| line.contains("ERROR: ")).map(str::to_owned);
    panic.or_else(error).unwrap_or_else(|| format!("see {}", file.display()))
}

/// A table for people on standard error, and one line of JSON for programs on standard output.
fn show(outcomes: &[Outcome], seconds: u64) -> Result<()> {
    eprintln!("\n{:24} {:>12} {:>8}  result", "decoder", "executions", "corpus");
    for Outcome { name, executions, corpus, crash } in outcomes {
        let result = if crash.is_some() { "CRASHED" } else { "ok" };
        eprintln!("{name:24} {executions:12} {corpus:8}  {result}");
    }
    for Outcome { name, crash, .. } in outcomes {
        let Some((input, why)) = crash else { continue };
        eprintln!("\n{name}: {why}");
        if let Some(input) = input {
            eprintln!("to see it again: cargo xtask fuzz --target {name} --replay {}", input.display());
        }
    }
    let executions: u64 = outcomes.iter().map(|outcome| outcome.executions).sum();
    let crashes = outcomes.iter().filter(|outcome| outcome.crash.is_some()).count();
    let targets = outcomes.len();
    println!(r#"{{"targets":{targets},"executions":{executions},"seconds":{seconds},"crashes":{crashes}}}"#);
    if crashes > 0 {
        bail!("{crashes} of {targets} decoders crashed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_read() {
        let whole = "#2\tINITED cov: 5\n#4096\tpulse\nDone 9 runs\nstat::number_of_executed_units: 9000\n";
        assert_eq!((executions(whole), artifact(whole)), (9000, None));
        let crash = "#8\tNEW cov: 1\nthread '<unnamed>' panicked at a.rs:1:2:\nno rank\n== ERROR: libFuzzer: deadly signal\n\
                     artifact_prefix='x/'; Test unit written to x/crash-1\n";
        assert_eq!((executions(crash), artifact(crash)), (8, Some("x/crash-1".into())));
        assert_eq!(reason(crash, Path::new("log")), "thread '<unnamed>' panicked at a.rs:1:2: no rank");
    }
}
