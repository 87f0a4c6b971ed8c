//! `muster demo`: the whole of it on one machine, with the real daemons as separate processes.

mod daemons;

use std::path::{Path, PathBuf};
use std::time::Duration;

use muster_proto::v1;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{DemoArgs, Global, Output};
use crate::client::Client;
use crate::exit::Failure;
use crate::output::{lines, out, say};
use crate::{follow, json, plot, submit};
use daemons::Daemons;

/// The least accuracy on the test images that the full form accepts.
const ACCURACY_MIN: f64 = 0.85;
/// Arguments of the trainer in the short form.
const SHORT: [&str; 4] = ["--limit", "4000", "--epochs", "1"];
const NODES: u32 = 2;
const PROCS_PER_NODE: u32 = 2;

/// `muster demo`.
pub(crate) async fn run(args: &DemoArgs) -> Result<(), Failure> {
    let binary = std::env::current_exe().map_err(anyhow::Error::from)?;
    check_trainer(&binary)?;
    let dir = tempfile::Builder::new().prefix("muster-demo-").tempdir().map_err(anyhow::Error::from)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(anyhow::Error::from)?;
    let mut hangup = crate::signals::Hangup::listen().map_err(anyhow::Error::from)?;
    let mut daemons = Daemons::new(binary, dir.path());
    let result = tokio::select! {
        result = train(args, &mut daemons) => result,
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
        _ = terminate.recv() => Err(Failure::Interrupted),
        () = hangup.recv() => Err(Failure::Interrupted),
    };
    if matches!(result, Err(Failure::Interrupted)) {
        say!("interrupted; stopping the daemons");
    }
    daemons.stop().await;
    if args.keep {
        say!("the daemons' logs and data are kept in {}", dir.keep().display());
    }
    result
}

fn check_trainer(binary: &Path) -> Result<(), Failure> {
    let beside = binary.parent().map(|dir| dir.join("muster-trainer"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("muster-trainer")).chain(beside);
    if found.into_iter().any(|path: PathBuf| path.is_file()) {
        return Ok(());
    }
    Err(Failure::Other(anyhow::anyhow!(
        "muster-trainer is neither beside {} nor on the PATH; build it with `cargo build -p muster-trainer`, or let \
         `cargo xtask demo` do everything",
        binary.display()
    )))
}

async fn train(args: &DemoArgs, daemons: &mut Daemons) -> Result<(), Failure> {
    say!("starting a coordinator and {NODES} workers, each a process of its own");
    let url = daemons.start(NODES).await?;
    let client =
        Client::connect(&Global { coordinator: vec![url], ca: None, token_file: None, output: Output::Text })
            .await?;
    daemons.wait_for_workers(&client, NODES).await?;

    let mut command: Vec<String> = ["muster-trainer", "vision"].map(str::to_owned).into();
    command.extend(args.short.then_some(SHORT).into_iter().flatten().map(str::to_owned));
    command.extend(args.trainer.iter().cloned());
    let spec = v1::JobSpec {
        name: "vision".to_owned(),
        command,
        min_nodes: Some(NODES),
        procs_per_node: Some(PROCS_PER_NODE),
        ..Default::default()
    };
    let request = v1::SubmitJobRequest { request_id: "demo".to_owned(), spec: Some(spec.clone()) };
    let job = submit::submit(&client, request.request_id.clone(), spec).await?;
    say!(
        "submitted over gRPC to {}: job {} of {NODES} nodes x {PROCS_PER_NODE} ranks, DDP over Gloo on the CPU",
        client.url(),
        job.id
    );
    let options = follow::Options { cancel_on_interrupt: true, ..follow::Options::default() };
    let (job, points) = follow::to_the_end(&client, &job.id, options).await?;
    let curve: Vec<(f32, f32)> = points.iter().filter_map(|point| plot::dot(point, "loss")).collect();
    out!("");
    lines(plot::draw(&curve, "loss"))?;
    follow::verdict(&job)?;
    let accuracy = points.iter().rev().find_map(|point| point.values.get("accuracy").copied());
    let Some(accuracy) = accuracy else {
        return Err(Failure::Other(anyhow::anyhow!("the training program reported no accuracy")));
    };
    out!("accuracy on the test images: {:.2} %", accuracy * 100.0);
    if !args.short && accuracy < ACCURACY_MIN {
        let least = ACCURACY_MIN * 100.0;
        return Err(Failure::Other(anyhow::anyhow!("that is less than the {least} % expected")));
    }
    by_hand(&request)
}

fn by_hand(request: &v1::SubmitJobRequest) -> Result<(), Failure> {
    let request = json::line("SubmitJobRequest", request)?;
    lines([
        "",
        "The same by hand, with `muster coordinator` and two of `muster worker --name … --data-dir …` running:",
        "",
        &format!("  grpcurl -plaintext -d '{request}' \\"),
        "    localhost:7070 muster.v1.JobService/SubmitJob",
    ])
}

/// Time for a daemon to come up on a loaded machine.
const START_MAX: Duration = Duration::from_secs(30);
