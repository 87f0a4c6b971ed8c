//! Real training under Muster whose ranks are killed: the next generation goes on from the newest checkpoint.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use muster_tests::{Cluster, Settings, eventually, processes_with, skip, trainer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The step of the newest checkpoint.
fn newest_step(dir: &Path) -> u64 {
    let names = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().file_name());
    let step = |name: std::ffi::OsString| name.to_str()?.strip_prefix("step-")?.parse().ok();
    names.filter_map(step).max().unwrap_or(0)
}

#[test]
fn training_goes_on_from_its_newest_checkpoint() {
    let Some(trainer) = trainer() else {
        return skip("checkpoints of real training", "muster-trainer is not built; `cargo xtask test` does");
    };
    let cluster = Cluster::start(Settings::default());
    let checkpoints = cluster.dir.path().join("checkpoints");
    let dir = checkpoints.to_str().unwrap();
    // Two ranks share the cores of one machine here, which Muster cannot know.
    let flags = ["submit", "--nnodes", "2", "--max-restarts", "1", "--env", "OMP_NUM_THREADS=1"];
    let flags = [&flags[..], &["--checkpoint-dir", dir, "--"]].concat();
    let program = [trainer.to_str().unwrap(), "vision", "--limit", "4000", "--checkpoint-steps", "5"];
    let id = cluster.muster(&[&flags[..], &program].concat()).ok().trim().to_owned();
    let before = eventually("a checkpoint", || {
        let step = newest_step(&checkpoints);
        if step >= 10 { Ok(step) } else { Err((step, cluster.job(&id))) }
    });
    let ranks = processes_with(&format!("MUSTER_JOB_ID={id} "));
    let second = ranks.iter().find(|(pid, _)| {
        let environ = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split('\0').any(|variable| variable == "RANK=1")
    });
    kill(Pid::from_raw(second.unwrap().0), Signal::SIGKILL).unwrap();
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!((&job["generation"], &job["restartsUsed"]), (&2.into(), &1.into()), "{job}");
    let output = cluster.output(&id, 0);
    let from = output.lines().find_map(|line| line.strip_prefix("going on from step ")).unwrap_or(&output);
    assert!(from.contains("written by 2 ranks of generation 1"), "{output}");
    let from: u64 = from.split(' ').next().unwrap().parse().unwrap();
    assert!(from >= before && !output.contains("\nstep 1/"), "{output}");
    assert_eq!(newest_step(&checkpoints).to_string(), job["latestStep"], "the last step is saved: {job}");
}

#[test]
fn training_that_is_drained_goes_on_where_it_was() {
    let Some(trainer) = trainer() else {
        return skip("checkpoints of real training", "muster-trainer is not built; `cargo xtask test` does");
    };
    let cluster = Cluster::start(Settings::default());
    let checkpoints = cluster.dir.path().join("checkpoints");
    let dir = checkpoints.to_str().unwrap();
    let flags =
        ["submit", "--nproc-per-node", "2", "--env", "OMP_NUM_THREADS=1", "--checkpoint-dir", dir, "--"];
    // None is due before the end.
    let program = [trainer.to_str().unwrap(), "vision", "--limit", "4000", "--checkpoint-steps", "100000"];
    let id = cluster.muster(&[&flags[..], &program].concat()).ok().trim().to_owned();
    let running = eventually("a few steps", || {
        let job = cluster.job(&id);
        // 64-bit numbers are strings in JSON.
        let step = job["latestStep"].as_str().and_then(|step| step.parse::<u64>().ok()).unwrap_or(0);
        if step >= 10 { Ok(job) } else { Err(job) }
    });
    let node = running["placement"][0]["nodeName"].as_str().unwrap().to_owned();
    cluster.muster(&["drain", &node]).ok();
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!((&job["generation"], &job["restartsUsed"]), (&2.into(), &0.into()), "{job}");
    let output = cluster.output(&id, 0);
    let from = output.lines().find_map(|line| line.strip_prefix("going on from step ")).unwrap_or(&output);
    let from: u64 = from.split(' ').next().unwrap().parse().unwrap_or(0);
    assert!(from >= 10 && !output.contains("\nstep 1/"), "{output}");
}
