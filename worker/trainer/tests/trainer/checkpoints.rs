//! Training that is killed, replaced, or out of disk: what it had is gone on with, and nothing else is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Rank, trainer, write_data_set};

/// 25 steps in an epoch, 100 in all, a checkpoint every 5.
const FLAGS: [&str; 6] = ["--epochs", "4", "--global-batch-size", "32", "--checkpoint-steps", "5"];

/// A start of the job.
fn start(data: &Path, checkpoints: &Path, generation: u32) -> Command {
    let mut command = trainer(data, &FLAGS);
    command.arg("--checkpoint-dir").arg(checkpoints);
    command.env("MUSTER_JOB_ID", "job").env("MUSTER_GENERATION", generation.to_string());
    command
}

/// Its standard output and error, once it has ended well.
fn ended(command: &mut Command) -> (String, String) {
    let output = command.output().unwrap();
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{stdout}{stderr}");
    (stdout, stderr)
}

/// The directories of steps, oldest first.
fn steps(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    let is_step = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("step-");
    let mut steps: Vec<PathBuf> = entries.filter(is_step).collect();
    steps.sort();
    steps
}

/// Waits until a run has written a checkpoint beyond this step.
fn wait_for_step(rank: &mut Rank, dir: &Path, step: u64) {
    let beyond = dir.join(format!("step-{step:08}"));
    while steps(dir).last().is_none_or(|last| *last < beyond) {
        if rank.0.as_mut().unwrap().try_wait().unwrap().is_some() {
            let output = rank.0.take().unwrap().wait_with_output().unwrap();
            panic!("it ended before step {step}: {output:?}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_one_that_was_not() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let [whole, killed] = ["whole", "killed"].map(|name| dir.path().join(name));
    ended(&mut start(dir.path(), &whole, 1));
    for (generation, step) in [(1, 10), (2, 30), (3, 60)] {
        let mut rank = Rank(Some(start(dir.path(), &killed, generation).spawn().unwrap()));
        wait_for_step(&mut rank, &killed, step);
        // Dropped, it is killed without a chance to do anything.
        drop(rank);
    }
    // The newest one may be damaged by what killed the machine.
    let newest = steps(&killed).pop().unwrap();
    std::fs::write(newest.join("data"), "half").unwrap();
    let (stdout, stderr) = ended(&mut start(dir.path(), &killed, 4));
    assert!(stdout.contains("going on from step ") && stdout.contains("of generation 3"), "{stdout}");
    assert!(stderr.contains("is not whole and was passed over"), "{stderr}");
    let last = |dir: &Path| steps(dir).pop().unwrap();
    assert!(last(&whole).ends_with("step-00000100") && last(&killed).ends_with("step-00000100"));
    assert_eq!(steps(&killed).len(), 3, "the last ones are kept");
    let data = |dir: &Path| std::fs::read(last(dir).join("data")).unwrap();
    assert!(data(&whole) == data(&killed), "every weight and momentum is the same, to the last bit");

    // Once more, there is nothing left to do but to evaluate.
    let (stdout, _) = ended(&mut start(dir.path(), &killed, 5));
    assert!(stdout.contains("going on from step 100 ") && stdout.contains("epoch 4/4 accuracy"), "{stdout}");
    assert!(!stdout.contains("\nstep "), "{stdout}");
}

#[test]
fn a_zombie_ends_when_it_would_save_and_an_earlier_start_does_not_begin() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let checkpoints = dir.path().join("checkpoints");
    let mut zombie = Rank(Some(start(dir.path(), &checkpoints, 1).spawn().unwrap()));
    wait_for_step(&mut zombie, &checkpoints, 10);
    let pid = zombie.0.as_ref().unwrap().id().to_string();
    // The shell's own: a minimal system has no program of this name.
    let signal = |signal: &str| {
        let line = format!("kill {signal} {pid}");
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
    };
    // Its node is thought to be dead, and is not.
    signal("-STOP");
    ended(&mut start(dir.path(), &checkpoints, 2));
    signal("-CONT");
    let output = zombie.output();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("this process has been replaced") && stderr.contains("generation 2 of job job"),
        "{stderr}"
    );
    let newest = std::fs::read_to_string(steps(&checkpoints).pop().unwrap().join("manifest")).unwrap();
    assert!(newest.contains("\"generation\":2"), "{newest}");
    let late = start(dir.path(), &checkpoints, 1).output().unwrap();
    let stderr = String::from_utf8_lossy(&late.stderr);
    assert!(late.status.code() == Some(1) && stderr.contains("has taken it over"), "{stderr}");
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let checkpoints = dir.path().join("checkpoints");
    ended(&mut start(dir.path(), &checkpoints, 1));
    // Only seven of the eight labels: a smaller network.
    for name in ["train", "t10k"] {
        crate::write_idx(
            &dir.path().join(format!("{name}-images-idx3-ubyte.gz")),
            &[0x803, 64, 8, 8],
            &[0; 4096],
        );
        crate::write_idx(&dir.path().join(format!("{name}-labels-idx1-ubyte.gz")), &[0x801, 64], &[6; 64]);
    }
    let output = start(dir.path(), &checkpoints, 2).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("to start anew, remove") && stderr.contains("is not of this model"), "{stderr}");
}

/// Undoes a mount.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[test]
fn a_full_disk_costs_checkpoints_and_not_training() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let checkpoints = dir.path().join("checkpoints");
    std::fs::create_dir(&checkpoints).unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", "size=300k", "muster-test"];
    let mounted = Command::new("mount").args(tmpfs).arg(&checkpoints).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        // Past the test runner's capture, so that it is seen.
        std::io::Write::write_all(
            &mut std::io::stderr(),
            b"SKIPPED: a full disk: no tmpfs can be mounted here\n",
        )
        .ok();
        return;
    }
    let unmount = Unmount(checkpoints.clone());
    let (stdout, stderr) = ended(&mut start(dir.path(), &checkpoints, 1));
    assert!(stdout.contains("epoch 4/4 accuracy"), "{stdout}");
    assert!(
        stderr.contains("warning: training goes on, and the last checkpoint stays: failed to write"),
        "{stderr}"
    );
    assert!(!steps(&checkpoints).is_empty(), "those that fitted are there");
    // The next start finds no room even for its name, and still goes on from what is there.
    std::fs::write(checkpoints.join("ballast"), vec![1; 1 << 20]).unwrap_err();
    let (stdout, _) = ended(&mut start(dir.path(), &checkpoints, 2));
    assert!(stdout.contains("going on from step "), "{stdout}");
    drop(unmount);
}
