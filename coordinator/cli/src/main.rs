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
mod signals;
mod spec;
mod store;
mod stream;
mod submit;
mod token;
mod units;
mod usage;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use args::{Args, Command};
use exit::Failure;

/// Longest pause of a reader at the end of a command whose results are what it is for: `less` stays open all day.
const READER_PAUSE_MAX: Duration = Duration::from_hours(24 * 365);

fn main() -> ExitCode {
    // One thread and little memory for each gang of a node; its log is a file. Ranks wait for it, and the command line of all
    // the rest takes longer to describe than this one to read.
    if std::env::args_os().skip(1).eq(["shim"]) {
        daemons::start_shim_log();
        return muster_worker::shim();
    }
    std::panic::set_hook(Box::new(output::say_panic));
    let args = Args::try_parse_from(usage::plain_words(std::env::args_os()));
    let is_run = matches!(&args, Ok(Args { command: Command::Run(_), .. }));
    let mut runtime = if is_run {
        // It shares the machine with the ranks, and has little to do.
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(anyhow::Error::from(error).context("failed to start")).report(),
    };
    let code = runtime.block_on(async {
        let (result, pauses) = match args {
            Ok(args) => {
                let pauses = pauses_max(&args.command);
                (run(args).await, pauses)
            }
            Err(said) if said.use_stderr() => (usage::say(&said), [output::PAUSE_MAX; 2]),
            Err(said) => (usage::say(&said), [READER_PAUSE_MAX; 2]),
        };
        // Whoever interrupts does not wait for a reader.
        let pauses =
            if matches!(result, Err(Failure::Interrupted)) { [output::PAUSE_MAX; 2] } else { pauses };
        let code = result.map_or_else(|failure| failure.report(), |()| ExitCode::SUCCESS);
        ended(code, pauses).await
    });
    // The process ends, and with it every task: those that wait for a terminal or a peer must not hold that up.
    std::mem::forget(runtime);
    code
}

/// Returns how long what a command has printed waits for readers that take nothing, before the process ends: that of
/// standard output and that of standard error.
fn pauses_max(command: &Command) -> [Duration; 2] {
    match command {
        // Somebody waits for these to end; nobody may be there to read them.
        Command::Run(_) | Command::Coordinator(_) | Command::Worker(_) | Command::Healthcheck(_) => {
            [output::PAUSE_MAX; 2]
        }
        Command::Logs(_) => [READER_PAUSE_MAX; 2],
        _ => [READER_PAUSE_MAX, output::PAUSE_MAX],
    }
}

/// Waits for the readers. Ctrl-C ends that, whatever else the command has made of it.
async fn ended(code: ExitCode, pauses_max: [Duration; 2]) -> ExitCode {
    tokio::select! {
        written = output::drain(pauses_max) => match written {
            // What is there for something else has done that.
            Err(failure) if code == ExitCode::SUCCESS && pauses_max[0] == READER_PAUSE_MAX => {
                let code = failure.report();
                output::drain([output::PAUSE_MAX; 2]).await.ok();
                code
            }
            Ok(_) | Err(_) => code,
        },
        _ = tokio::signal::ctrl_c() => code,
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
