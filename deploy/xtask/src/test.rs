//! The tests as a list of stages, each a command that can be typed alone; the first failure ends it.

use crate::cargo;
use crate::failures;
use crate::machine;
use crate::python;
use crate::setup::{self, Wants};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// One check.
pub struct Stage {
    name: &'static str,
    /// The words of the command, or why it cannot be run here.
    words: Result<Vec<String>, String>,
    env: Option<(&'static str, &'static str)>,
}

/// Sets up, then runs every stage until one fails.
pub fn run(quick: bool, python: bool) -> Result<()> {
    machine::git()?;
    setup::run(&cargo::deps_dir(), &Wants { libtorch: !quick, tools: true, digits: false })?;
    // What it is for is skipped without it, and says so; the rest is worth having.
    if python && let Err(error) = python::bring() {
        eprintln!("SKIPPED: tests with Python's torch: {error:#}");
    }
    run_stages(&stages(quick))
}

/// Runs stages until one fails, then shows how long each took.
pub fn run_stages(stages: &[Stage]) -> Result<()> {
    let mut table = Vec::new();
    for stage in stages {
        let line = match &stage.words {
            Err(why) => format!("SKIPPED: {why}"),
            Ok(words) => format!("{:6.1} s", stage.run(words)?.as_secs_f64()),
        };
        if stage.words.is_err() {
            eprintln!("==> {}: {line}", stage.name);
        }
        table.push((stage.name, line));
    }
    eprintln!();
    for (name, line) in table {
        eprintln!("{name:14} {line}");
    }
    Ok(())
}

fn stages(quick: bool) -> Vec<Stage> {
    let stage = Stage::new;
    // One set of packages for every build, or features would differ and the same crates be built twice.
    let on = |words: &str| if quick { words.replace(" --workspace", "") } else { words.to_owned() };
    vec![
        stage("format", "cargo fmt --all --check"),
        stage("proto lint", ".deps/bin/buf lint proto"),
        Stage { name: "proto breaking", words: breaking(), env: None },
        stage("licences", ".deps/bin/cargo-deny --locked check bans licenses sources"),
        stage("clippy", &on("cargo clippy --workspace --all-targets -- -D warnings")),
        Stage {
            env: Some(("RUSTDOCFLAGS", "-Dwarnings")),
            ..stage("doc", &on("cargo doc --workspace --no-deps"))
        },
        // Everything at once: the tests start the binaries of other packages.
        stage("build", &on("cargo build --workspace --all-targets")),
        // Known at once, rather than after the long ones.
        stage("house rules", &on("cargo test --workspace --test tidy")),
        // The one program of the coordinator's image.
        stage("static build", &static_build()),
        stage("test", &on("cargo test --workspace --no-fail-fast")),
        stage(
            "simulation",
            if quick { "cargo xtask sim --seeds 1000" } else { "cargo xtask sim --seeds 20000" },
        ),
    ]
}

impl Stage {
    /// A stage that is a command.
    pub fn new(name: &'static str, words: &str) -> Self {
        Self { name, words: Ok(words.split(' ').map(str::to_owned).collect()), env: None }
    }

    #[expect(clippy::disallowed_methods, reason = "a duration shown to a person")]
    fn run(&self, words: &[String]) -> Result<Duration> {
        let env = self.env.map(|(name, value)| format!("{name}={value} ")).unwrap_or_default();
        let typed = format!("{env}{}", words.join(" "));
        eprintln!("==> {}: {typed}", self.name);
        let began = Instant::now();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = cargo::command(&words);
        let command = command.envs(self.env);
        let tests = words.starts_with(&["cargo", "test"]);
        let ended = if tests { failures::run(command) } else { cargo::run(command) };
        if let Err(error) = ended {
            bail!("the stage `{}` failed ({error:#}); to run it alone: {typed}", self.name);
        }
        Ok(began.elapsed())
    }
}

/// With musl, as the image has it; where that is not installed, a static glibc stands in for it in the tests.
fn static_build() -> String {
    let build = "cargo build --locked --profile image -p muster-cli --target x86_64-unknown-linux-";
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", "x86_64-unknown-linux-musl"]);
    let folder = rustc.output().map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let has_target = folder.is_ok_and(|folder| Path::new(&folder).is_dir());
    if has_target && machine::on_path(Path::new("musl-gcc")).is_some() {
        format!("{build}musl")
    } else {
        format!("{build}gnu --config build.rustflags=[\"-Ctarget-feature=+crt-static\"]")
    }
}

/// Compares the API with its first version: what a client was once built against works for good.
fn breaking() -> Result<Vec<String>, String> {
    first_api().map_err(|error| format!("{error:#}")).map(|commit| {
        let against = format!(".git#ref={commit},subdir=proto");
        [".deps/bin/buf", "breaking", "proto", "--against", &against].map(str::to_owned).to_vec()
    })
}

/// The oldest commit that has the API's description.
fn first_api() -> Result<String> {
    if git(&["rev-parse", "--is-shallow-repository"])? != "false" {
        bail!("this clone is shallow, so the first version of the API is not in it");
    }
    let commits = git(&["log", "--diff-filter=A", "--format=%H", "--", "proto/buf.yaml"])?;
    commits.lines().last().map(str::to_owned).context("no commit has added proto/buf.yaml")
}

fn git(args: &[&str]) -> Result<String> {
    let output = cargo::command(&["git"]).args(args).output().context("failed to start git")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
