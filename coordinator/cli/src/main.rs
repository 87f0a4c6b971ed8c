//! `muster`: the coordinator, the node daemon, and every command of their users, in one binary.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "everything is printed by `output`")]

mod args;
mod client;
mod daemons;
mod demo;
mod doctor;
mod exit;
mod follow;
mod healthcheck;
mod json;
mod leader;
mod log;
mod nodes;
mod output;
mod pki;
mod plot;
mod progress;
mod run;
mod show;
mod spec;
mod store;
mod stream;
mod submit;
mod token;
mod units;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};
use exit::Failure;

fn main() -> ExitCode {
    // One thread and little memory for each gang of a node; its log is a file. Ranks wait for it, and the command line of all
    // the rest takes longer to describe than this one to read.
    if std::env::args_os().skip(1).eq(["shim"]) {
        daemons::start_shim_log();
        return muster_worker::shim();
    }
    let args = Args::parse();
    let mut runtime = match args.command {
        // It shares the machine with the ranks, and has little to do.
        Command::Run(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(anyhow::Error::from(error).context("failed to start")).report(),
    };
    let result = runtime.block_on(run(args));
    // The process ends, and with it every task: those that wait for a terminal or a peer must not hold that up.
    std::mem::forget(runtime);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

async fn run(args: Args) -> Result<(), Failure> {
    let Args { global, command } = args;
    match command {
        Command::Coordinator(args) => daemons::coordinator(*args).await,
        Command::Worker(args) => daemons::worker(args, &global).await,
        Command::Shim => Err(Failure::Usage("the node daemon starts it, without any option".to_owned())),
        Command::Run(args) => run::run(*args, &global).await,
        Command::Submit(args) => submit::run(*args, &global).await,
        Command::Jobs(args) => show::jobs(&args, &global).await,
        Command::Job(args) => show::job(&args, &global).await,
        Command::Explain(args) => show::explain(&args, &global).await,
        Command::Logs(args) => stream::logs(&args, &global).await,
        Command::Metrics(args) => stream::metrics(&args, &global).await,
        Command::Plot(args) => plot::run(&args, &global).await,
        Command::Nodes => nodes::nodes(&global).await,
        Command::Node(args) => nodes::node(&args, &global).await,
        Command::Doctor(args) => doctor::run(args, &global).await,
        Command::Healthcheck(args) => healthcheck::run(&args, &global).await,
        Command::Cancel(args) => submit::cancel(args, &global).await,
        Command::Cordon(args) => nodes::cordon(args, &global).await,
        Command::Drain(args) => nodes::drain(args, &global).await,
        Command::Uncordon(args) => nodes::uncordon(args, &global).await,
        Command::Token(command) => token::run(command, &global).await,
        Command::Pki(command) => pki::run(command),
        Command::Store(command) => store::run(command).await,
        Command::Demo(args) => demo::run(&args).await,
    }
}
