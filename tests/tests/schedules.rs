//! Faults of ranks, shims and what is around them, on real processes, one schedule each: one generation lives at a time,
//! nothing is left behind, only faults cost restarts, and the cause is said.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use muster_tests::{Bed, Settings, eventually, is_running, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LEASE: Settings = Settings { lease: "2s", ..Settings::DEFAULT };

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn a_rank_is_killed() {
    let bed = Bed::pair(&["--max-restarts", "2"]);
    signal(bed.wait_for_ranks(1, 2)[&1], Signal::SIGKILL);
    bed.wait_for_ranks(2, 2);
    bed.finish(2, 1);
}

#[test]
fn a_rank_is_killed_and_nothing_is_left_to_restart() {
    let bed = Bed::pair(&[]);
    signal(bed.wait_for_ranks(1, 2)[&1], Signal::SIGKILL);
    let job = bed.cluster.wait_for(&bed.id, "FAILED");
    assert!(
        job["reason"].as_str().unwrap().starts_with("rank 1 on node n2 was ended by signal 9 (SIGKILL)"),
        "{job}"
    );
    bed.check();
}

#[test]
fn a_rank_is_killed_again_and_again() {
    let bed = Bed::pair(&["--max-restarts", "3"]);
    for generation in 1..=3 {
        signal(bed.wait_for_ranks(generation, 2)[&(generation % 2)], Signal::SIGKILL);
    }
    bed.wait_for_ranks(4, 2);
    bed.finish(4, 3);
}

#[test]
fn a_rank_is_frozen_and_its_peers_wait_for_it() {
    // Each waits for the other at every step, as in a collective.
    let before = "touch $BED/c$RANK; sync_peer() { echo x >> $BED/c$RANK.$MUSTER_GENERATION
        while [ $(cat $BED/c$((1-RANK)).$MUSTER_GENERATION 2>/dev/null | wc -l) -lt \
            $(wc -l < $BED/c$RANK.$MUSTER_GENERATION) ]; do sleep 0.01; done; }
        [ $MUSTER_GENERATION = 1 ] && while :; do sync_peer; read up idle < /proc/uptime
        echo \"1 $RANK $$ $up $MUSTER_NODE\" >> $BED/beats; echo step; sleep 0.05; done";
    let flags = ["--nnodes", "2", "--max-restarts", "1", "--progress-timeout", "2s"];
    let bed = Bed::start(LEASE, &flags, before);
    signal(bed.wait_for_ranks(1, 2)[&1], Signal::SIGSTOP);
    let reason = bed.wait_for_reason("no rank has shown progress for 2 s");
    assert!(reason.contains("rank 1 on node n2 is stopped by a signal or a debugger"), "{reason}");
    bed.wait_for_ranks(2, 2);
    let logs = ["logs", &bed.id, "--generation", "1", "--rank", "1", "--stream", "stderr"];
    let stderr = bed.cluster.muster(&logs).stderr;
    assert!(stderr.contains("stopped"), "its stacks are in its standard error: {stderr}");
    bed.finish(2, 1);
}

#[test]
fn a_shim_is_killed() {
    let bed = Bed::pair(&["--max-restarts", "1"]);
    let rank = bed.wait_for_ranks(1, 2)[&1];
    signal(bed.shims(Some("n2"))[0], Signal::SIGKILL);
    eventually("the rank's end", || if is_running(rank) { Err(rank) } else { Ok(()) });
    bed.wait_for_ranks(2, 2);
    bed.finish(2, 1);
}

#[test]
fn a_rank_ends_while_its_daemon_is_dead() {
    let mut bed = Bed::pair(&[]);
    let rank = bed.wait_for_ranks(1, 2)[&1];
    bed.cluster.workers[1].kill();
    signal(rank, Signal::SIGTERM);
    eventually("the rank's end", || if is_running(rank) { Err(rank) } else { Ok(()) });
    bed.restart_worker(1, Duration::ZERO);
    let job = bed.cluster.wait_for(&bed.id, "FAILED");
    assert_eq!(
        (&job["exit"]["rank"], &job["exit"]["signal"]),
        (&1.into(), &15.into()),
        "its exit was kept: {job}"
    );
    bed.check();
}

#[test]
fn a_rank_ignores_what_it_is_asked() {
    let bed = Bed::start(LEASE, &["--nnodes", "2"], "trap '' TERM\n");
    bed.wait_for_ranks(1, 2);
    bed.cluster.muster(&["cancel", &bed.id]).ok();
    bed.cluster.wait_for(&bed.id, "CANCELLED");
    bed.check();
}

#[test]
fn a_rank_leaves_its_session_behind() {
    // A child of a child, in a session of its own, that nobody waits for.
    let before = "(setsid sh -c 'sleep 3001 & sleep 3002' > /dev/null 2>&1 &)\n";
    let bed = Bed::start(LEASE, &["--nnodes", "2"], before);
    bed.wait_for_ranks(1, 2);
    eventually(
        "the grandchildren",
        || if bed.ranks(None).len() >= 6 { Ok(()) } else { Err(bed.ranks(None)) },
    );
    bed.finish(1, 0);
}

#[test]
fn a_shim_dies_whose_rank_left_its_session_behind() {
    let before = "(setsid sh -c 'sleep 3003 & sleep 3004' > /dev/null 2>&1 &)\n";
    let bed = Bed::start(LEASE, &["--nnodes", "2", "--max-restarts", "1"], before);
    bed.wait_for_ranks(1, 2);
    let old = bed.ranks(Some("n2"));
    signal(bed.shims(Some("n2"))[0], Signal::SIGKILL);
    bed.wait_for_ranks(2, 2);
    assert!(old.iter().all(|pid| !is_running(*pid)), "nothing of the first generation is left");
    bed.finish(2, 1);
}

#[test]
fn a_rank_floods_its_log() {
    let before = "[ $RANK = 0 ] && head -c 60000000 /dev/zero | tr '\\0' x && echo\n";
    let bed = Bed::start(LEASE, &["--nnodes", "2"], before);
    bed.wait_for_ranks(1, 2);
    let id = bed.id.clone();
    let written = bed.cluster.output(&id, 0);
    assert!(written.len() > 60_000_000 && written.starts_with("xxx"), "{} bytes", written.len());
    bed.finish(1, 0);
}

#[test]
fn a_master_port_is_taken() {
    let before = "[ $MUSTER_GENERATION$RANK = 10 ] && { echo 'DistNetworkError: EADDRINUSE' >&2; exit 1; }\n";
    let bed = Bed::start(LEASE, &["--nnodes", "2"], before);
    bed.wait_for_ranks(2, 2);
    bed.finish(2, 0);
}

#[test]
fn a_job_that_crashes_at_once_does_not_hold_up_others() {
    let bed = Bed::pair(&[]);
    let poison = bed.cluster.submit(&["--max-restarts", "2", "--cpus-per-proc", "0.001"], "exit 3");
    // The pair has both nodes for itself: the job waits, and the cluster with it goes on.
    assert_eq!(bed.cluster.job(&poison)["state"], "JOB_STATE_QUEUED");
    let cluster = &bed.cluster;
    std::fs::write(cluster.dir.path().join("bed/done"), "").unwrap();
    let job = cluster.wait_for(&poison, "FAILED");
    assert_eq!((&job["restartsUsed"], &job["generation"]), (&2.into(), &3.into()), "{job}");
    bed.finish(1, 0);
}

/// Undoes a mount.
struct Unmount(std::path::PathBuf);
impl Drop for Unmount {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[test]
fn the_disk_of_the_logs_is_full() {
    let mount = tempfile::tempdir().unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", "size=2m,mode=700", "muster-test"];
    let mounted = std::process::Command::new("mount").args(tmpfs).arg(mount.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return skip("a full disk of the logs", "a tmpfs cannot be mounted here");
    }
    let _unmount = Unmount(mount.path().to_owned());
    let cluster = muster_tests::Cluster::start(Settings { workers: 0, ..LEASE });
    let worker = cluster.spawn_worker("full", mount.path().to_str().unwrap());
    cluster.wait_for_nodes(1);
    let script = "head -c 5000000 /dev/zero 2>/dev/null; sleep 0.5; exit 0";
    let id = cluster.submit(&[], script);
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!(job["restartsUsed"], 0, "training goes on: {job}");
    drop(worker);
}

#[test]
fn a_rank_runs_out_of_memory() {
    if !std::path::Path::new("/sys/fs/cgroup").exists() || !nix::unistd::geteuid().is_root() {
        return skip("a rank out of memory", "there is no control group to limit it");
    }
    let cluster = muster_tests::Cluster::start(LEASE);
    let hog = "exec python3 -c 'x = bytearray(400 << 20); print(len(x))'";
    let id = cluster.submit(&["--memory-per-proc", "64MiB"], hog);
    let job = eventually("its end", || {
        let job = cluster.job(&id);
        let ended = ["JOB_STATE_FAILED", "JOB_STATE_SUCCEEDED"].iter().any(|state| job["state"] == *state);
        if ended { Ok(job) } else { Err(job) }
    });
    if job["state"] == "JOB_STATE_SUCCEEDED" {
        return skip("a rank out of memory", "no memory controller can be used here");
    }
    let reason = job["reason"].as_str().unwrap();
    assert!(reason.contains("ran out of memory: the kernel killed it; it may have 0.1 GiB"), "{job}");
    assert_eq!(job["exit"]["outOfMemory"], true);
}

#[test]
fn the_error_file_of_a_rank_is_its_reason() {
    let cluster = muster_tests::Cluster::start(Settings { workers: 1, ..LEASE });
    let script = r#"echo '{"message":{"message":"ValueError: no shard 7","extraInfo":{"timestamp":"1"}}}' > $TORCHELASTIC_ERROR_FILE
        echo noise >&2; exit 1"#;
    let id = cluster.submit(&[], script);
    let job = cluster.wait_for(&id, "FAILED");
    assert_eq!(job["reason"], "rank 0 on node n1 ended with exit code 1: ValueError: no shard 7");
}

/// A group that the kernel does not let run, nor end.
struct Frozen(std::path::PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        std::fs::write(self.0.join("freezer.state"), "THAWED").ok();
    }
}

#[test]
fn the_kernel_holds_a_rank_that_was_killed() {
    let group = format!("/sys/fs/cgroup/freezer/muster-test-{}", std::process::id());
    let group = Frozen(group.into());
    if std::fs::create_dir(&group.0).is_err() || !group.0.join("freezer.state").exists() {
        return skip(
            "a rank that the kernel holds",
            "there is no freezer that SIGKILL does not reach (version 1)",
        );
    }
    let settings = Settings { workers: 3, ..LEASE };
    let bed = Bed::start(settings, &["--nnodes", "2", "--max-restarts", "1"], "");
    let ranks = bed.wait_for_ranks(1, 2);
    std::fs::write(group.0.join("cgroup.procs"), ranks[&1].to_string()).unwrap();
    std::fs::write(group.0.join("freezer.state"), "FROZEN").unwrap();
    signal(ranks[&0], Signal::SIGKILL);
    // It is killed, and runs no more: the job goes on where there is room, and the node is given no more work.
    bed.wait_for_ranks(2, 2);
    let node = bed.cluster.muster(&["node", "n2"]).ok();
    assert!(node.contains("drained (ranks of") && node.contains("processes are left of"), "{node}");
    std::fs::write(group.0.join("freezer.state"), "THAWED").unwrap();
    eventually("the end of what was left", || {
        let node = bed.cluster.muster(&["node", "n2"]).ok();
        if node.contains("processes are left of") { Err(node) } else { Ok(()) }
    });
    bed.finish(2, 1);
    std::fs::remove_dir(&group.0).ok();
}
