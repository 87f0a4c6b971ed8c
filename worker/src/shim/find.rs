//! The shims that an earlier daemon left, found when one starts.

use std::time::Duration;

use muster_worker_core::{Adoption, adopt};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::client::{Context, Link, reconnect};
use super::protocol::{PROTOCOL, State};
use super::record::{StateDir, kill, start_time};
use crate::launch::sweep;

/// Time to kill what a shim without ranks may have started.
const SWEEP_MAX: Duration = Duration::from_secs(1);

/// Every gang that was launched and not released: its shim may run, have ended or be dead.
pub(crate) async fn find(context: &Context) -> Vec<Link> {
    let entries = std::fs::read_dir(context.data_dir.join("run")).into_iter().flatten().flatten();
    let mut looking = JoinSet::new();
    for entry in entries {
        let context = context.clone();
        looking.spawn(async move {
            let Ok(dir) = StateDir::open(&entry.path()) else { return None };
            look(dir, &context).await
        });
    }
    looking.join_all().await.into_iter().flatten().collect()
}

async fn look(dir: StateDir, context: &Context) -> Option<Link> {
    let path = dir.path().display().to_string();
    let Ok(record) = dir.record() else {
        // Its shim did not come to be before its daemon died.
        info!(path, "a shim that was not ready is forgotten");
        dir.remove();
        return None;
    };
    let mut stream = None;
    let mut state = dir.last_state().ok();
    let adoption = adopt(&record.process, &context.boot_id, start_time(record.process.pid));
    if state.is_none() && adoption == Adoption::Adopt && record.protocol == PROTOCOL {
        match reconnect(&dir, &record.process, &context.boot_id).await {
            Some((answer, connection)) => (state, stream) = (Some(answer), Some(connection)),
            // It may have ended in this moment.
            None => state = dir.last_state().ok(),
        }
    }
    // It may have been launched by what its former daemon said last.
    let record = dir.record().ok()?;
    if !record.launched {
        kill(&record.process, &context.boot_id);
        let mark = record.order.mark();
        let sweep = move || sweep::Gang { mark: Some(&mark), ..sweep::Gang::default() }.kill_all(SWEEP_MAX);
        tokio::task::spawn_blocking(sweep).await.ok();
        dir.remove();
        return None;
    }
    let gang = &record.order.assignment.gang;
    match (&state, &stream) {
        (Some(_), Some(_)) => info!(%gang, pid = record.process.pid, "a shim is adopted"),
        (Some(_), None) => info!(%gang, "a gang has ended meanwhile"),
        (None, _) => warn!(%gang, pid = record.process.pid, "a shim is dead or does not answer"),
    }
    let state = state.unwrap_or_else(|| State { master_port: record.master_port, ..State::default() });
    Some(Link { dir, record, state, stream })
}
