//! The environment of a rank: the daemon's own, then torchrun's contract and MUSTER_*, then the job's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use muster_core::types::{Assignment, Rank};

/// Variables of the daemon that mean nothing to a rank.
const DROPPED: [&str; 3] = ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"];

/// Where a rank writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct RankPaths<'a> {
    pub log_dir: &'a Path,
    pub telemetry: &'a Path,
}

/// Every variable of one rank. `inherited` is the daemon's environment.
pub(super) fn of_rank(
    assignment: &Assignment,
    local_rank: u32,
    port: u16,
    paths: RankPaths<'_>,
    inherited: impl Iterator<Item = (OsString, OsString)>,
) -> BTreeMap<OsString, OsString> {
    let spec = &assignment.spec;
    let placement = &assignment.placement;
    let mut env: BTreeMap<OsString, OsString> = inherited
        .filter(|(key, _)| !DROPPED.iter().any(|dropped| key == dropped))
        // What a daemon was told about itself, by MUSTER_COORDINATOR and the like, stays; what an outer job
        // told its ranks must not leak into ours, and is set anew below.
        .collect();
    if !env.contains_key::<std::ffi::OsStr>("OMP_NUM_THREADS".as_ref()) && placement.procs > 1 {
        env.insert("OMP_NUM_THREADS".into(), "1".into());
    }
    if !env.contains_key::<std::ffi::OsStr>("TORCH_NCCL_ASYNC_ERROR_HANDLING".as_ref()) {
        env.insert("TORCH_NCCL_ASYNC_ERROR_HANDLING".into(), "1".into());
    }
    for (key, value) in &spec.env {
        env.insert(key.into(), value.into());
    }
    let rank = Rank(placement.first_rank.0 + local_rank);
    let mut set = |key: &str, value: String| env.insert(key.into(), value.into());
    set("RANK", rank.to_string());
    set("ROLE_RANK", rank.to_string());
    set("ROLE_NAME", "default".to_owned());
    set("LOCAL_RANK", local_rank.to_string());
    set("GROUP_RANK", placement.group_rank.to_string());
    set("LOCAL_WORLD_SIZE", placement.procs.to_string());
    set("WORLD_SIZE", assignment.world_size.to_string());
    set("ROLE_WORLD_SIZE", assignment.world_size.to_string());
    set("GROUP_WORLD_SIZE", assignment.group_world_size.to_string());
    set("MASTER_ADDR", assignment.master_addr.to_string());
    set("MASTER_PORT", port.to_string());
    set("TORCHELASTIC_RESTART_COUNT", assignment.restart_count.to_string());
    set("TORCHELASTIC_MAX_RESTARTS", spec.max_restarts.to_string());
    set("TORCHELASTIC_RUN_ID", assignment.gang.job.to_string());
    // Rank 0 serves the store itself.
    set("TORCHELASTIC_USE_AGENT_STORE", "False".to_owned());
    set("TORCHELASTIC_ERROR_FILE", paths.log_dir.join("error.json").display().to_string());
    set("MUSTER_JOB_ID", assignment.gang.job.to_string());
    set("MUSTER_GENERATION", assignment.gang.generation.to_string());
    set("MUSTER_NODE", placement.node.to_string());
    set("MUSTER_TELEMETRY", paths.telemetry.display().to_string());
    if let Some(dir) = &spec.checkpoint_dir {
        set("MUSTER_CHECKPOINT_DIR", dir.clone());
    }
    let per_rank = spec.per_proc.gpus as usize;
    let mine = placement.gpus.chunks(per_rank.max(1)).nth(local_rank as usize);
    if let (Some(mine), true) = (mine, per_rank > 0) {
        let list: Vec<String> = mine.iter().map(ToString::to_string).collect();
        set("CUDA_VISIBLE_DEVICES", list.join(","));
    }
    env
}
