//! One gang's part on this node, from preparation to the last exit.

use std::path::PathBuf;
use std::time::Duration;

use muster_core::types::{Assignment, Rank, RankExit};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::process::{self, Group, RankProcess};
use super::{Command, environment, prepare};
use crate::telemetry::{Outbox, RankSocket, Sockets};
use muster_worker_core::Input;

/// What every runner shares.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub data_dir: PathBuf,
    pub sockets: Sockets,
    pub outbox: Outbox,
}

/// Follows one gang to its end. Err means that nothing runs and why; Ok that everything that ran has ended.
pub(super) async fn run(
    assignment: Assignment,
    context: Context,
    mut commands: mpsc::Receiver<Command>,
    events: &mpsc::Sender<Input>,
) -> Result<(), String> {
    let gang = assignment.gang.clone();
    let data_dir = context.data_dir.clone();
    let preparing = tokio::task::spawn_blocking(move || prepare::prepare(&assignment, &data_dir));
    let mut prepared = preparing.await.map_err(|error| format!("failed to prepare: {error}"))??;
    let own_port = prepared.master.as_ref().and_then(|listener| Some(listener.local_addr().ok()?.port()));
    events.send(Input::Prepared(gang.clone(), own_port)).await.ok();

    let assignment = match commands.recv().await {
        Some(Command::Launch(assignment)) => assignment,
        Some(Command::Stop(_)) | None => return Ok(()),
    };
    let port = own_port.or(assignment.master_port).ok_or("no master port was assigned")?;
    let sockets: Vec<RankSocket> = ranks(&assignment)
        .map(|rank| context.sockets.open(&gang, rank, context.outbox.clone()))
        .collect::<Result<_, _>>()
        .map_err(|error| format!("failed to make a telemetry socket: {error}"))?;
    // Rank 0 binds the port itself; from here on it is free for it.
    drop(prepared.master.take());
    let processes = launch(&assignment, &prepared, &sockets, port).await?;
    info!(%gang, ranks = processes.len(), "ranks launched");
    events.send(Input::Launched(gang.clone())).await.ok();

    let groups: Vec<Group> = processes.iter().map(RankProcess::group).collect();
    let mut running = JoinSet::new();
    for (process, socket) in processes.into_iter().zip(sockets) {
        running.spawn(async move {
            let exit = process.wait().await;
            // Whatever the rank wrote before it ended goes ahead of the news that it ended.
            socket.drain().await;
            exit
        });
    }
    let mut kill_at = None;
    while !running.is_empty() {
        tokio::select! {
            ended = running.join_next() => match ended {
                Some(Ok(exit)) => tell_exit(&gang, exit, events).await,
                Some(Err(error)) => warn!(%gang, %error, "failed to wait for a rank"),
                None => {}
            },
            Some(command) = commands.recv() => if let Command::Stop(grace) = command {
                for group in &groups {
                    group.terminate();
                }
                kill_at = Some(tokio::time::Instant::now() + Duration::from_millis(grace.0));
            },
            () = sleep_until(kill_at) => {
                warn!(%gang, "ranks did not end within their grace and are killed");
                for group in &groups {
                    group.kill();
                }
                kill_at = None;
            }
        }
    }
    Ok(())
}

fn ranks(assignment: &Assignment) -> impl Iterator<Item = Rank> + use<> {
    let first = assignment.placement.first_rank.0;
    (first..first + assignment.placement.procs).map(Rank)
}

/// Starts every rank, or none: if one cannot be started, those before it are killed.
async fn launch(
    assignment: &Assignment,
    prepared: &prepare::Prepared,
    sockets: &[RankSocket],
    port: u16,
) -> Result<Vec<RankProcess>, String> {
    let mut started: Vec<RankProcess> = Vec::new();
    for ((rank, log_dir), socket) in ranks(assignment).zip(&prepared.log_dirs).zip(sockets) {
        let local_rank = rank.0 - assignment.placement.first_rank.0;
        let paths = environment::RankPaths { log_dir, telemetry: socket.path() };
        let env = environment::of_rank(assignment, local_rank, port, paths, std::env::vars_os());
        let working_dir = assignment.spec.working_dir.as_ref().map_or(log_dir.clone(), PathBuf::from);
        match process::start(rank, &prepared.program, &assignment.spec.command, &working_dir, log_dir, env) {
            Ok(process) => started.push(process),
            Err(why) => {
                for process in started {
                    process.group().kill();
                    process.wait().await;
                }
                return Err(why);
            }
        }
    }
    Ok(started)
}

async fn tell_exit(gang: &muster_core::types::GangId, exit: RankExit, events: &mpsc::Sender<Input>) {
    info!(%gang, rank = exit.rank.0, code = exit.code, signal = exit.signal, "rank ended");
    events.send(Input::Exited(gang.clone(), exit)).await.ok();
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
