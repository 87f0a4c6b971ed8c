//! Faults on real processes, one schedule each: whatever is killed or frozen, one generation lives at a time, nothing is
//! left behind, only faults cost restarts, and the cause is said.

use std::time::Duration;

use muster_tests::{Bed, Settings, eventually, is_running, processes_with, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LEASE: Settings = Settings { workers: 2, lease: "2s", netns: false };
/// Well beyond the lease of these clusters.
const BEYOND: Duration = Duration::from_secs(4);

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
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
        while [ $(cat $BED/c$((1-RANK)).$MUSTER_GENERATION 2>/dev/null | wc -l) -lt $(wc -l < $BED/c$RANK.$MUSTER_GENERATION) ]; do sleep 0.01; done; }
        [ $MUSTER_GENERATION = 1 ] && while :; do sync_peer; read up idle < /proc/uptime
        echo \"1 $RANK $$ $up $MUSTER_NODE\" >> $BED/beats; echo step; sleep 0.05; done";
    let flags = ["--nnodes", "2", "--max-restarts", "1", "--progress-timeout", "2s"];
    let bed = Bed::start(LEASE, &flags, before);
    signal(bed.wait_for_ranks(1, 2)[&1], Signal::SIGSTOP);
    let reason = bed.wait_for_reason("no rank has shown progress for 2 s");
    assert!(reason.contains("rank 1 on node n2 is stopped by a signal or a debugger"), "{reason}");
    bed.wait_for_ranks(2, 2);
    let stderr = bed
        .cluster
        .muster(&["logs", &bed.id, "--generation", "1", "--rank", "1", "--stream", "stderr"])
        .stderr;
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
fn a_daemon_is_killed_and_its_ranks_are_taken_over() {
    let mut bed = Bed::pair(&[]);
    let before = bed.wait_for_ranks(1, 2);
    bed.restart_worker(1, Duration::from_millis(300));
    bed.cluster.wait_for_nodes(2);
    assert!(before.values().all(|pid| is_running(*pid)), "ranks are untouched");
    bed.finish(1, 0);
}

#[test]
fn a_daemon_is_killed_twenty_times() {
    // None of them lives long enough to renew the lease.
    let settings = Settings { lease: "20s", ..LEASE };
    let mut bed = Bed::start(settings, &["--nnodes", "2"], "");
    let before = bed.wait_for_ranks(1, 2);
    for round in 0..20 {
        bed.restart_worker(1, Duration::from_millis(round * 7 % 60));
        pause(round * 13 % 90);
    }
    bed.cluster.wait_for_nodes(2);
    assert!(before.values().all(|pid| is_running(*pid)), "ranks are untouched");
    let id = bed.id.clone();
    let seen = bed.cluster.output(&id, 1).lines().count();
    assert!(seen > 10, "{seen}");
    bed.finish(1, 0);
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
fn a_daemon_and_its_shim_are_killed() {
    let mut bed = Bed::pair(&["--max-restarts", "1"]);
    bed.cluster.workers[1].kill();
    signal(bed.shims(Some("n2"))[0], Signal::SIGKILL);
    bed.restart_worker(1, Duration::from_millis(100));
    bed.wait_for_ranks(2, 2);
    bed.finish(2, 1);
}

#[test]
fn a_daemon_does_not_come_back() {
    let mut bed = Bed::start(LEASE, &["--nnodes", "1:2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    bed.cluster.workers[1].kill();
    bed.wait_for_ranks(2, 1);
    assert!(bed.ranks(Some("n2")).is_empty(), "its ranks have fenced themselves");
    bed.finish(2, 1);
}

#[test]
fn a_node_dies_and_the_survivors_go_on() {
    let bed = Bed::start(LEASE, &["--nnodes", "1:2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    bed.signal_node(1, Signal::SIGKILL);
    let ranks = bed.wait_for_ranks(2, 1);
    assert_eq!(ranks.len(), 1);
    bed.finish(2, 1);
}

#[test]
fn a_node_dies_and_is_replaced_at_once() {
    let mut bed =
        Bed::start(Settings { lease: "20s", ..LEASE }, &["--nnodes", "2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    bed.signal_node(1, Signal::SIGKILL);
    bed.restart_worker(1, Duration::ZERO);
    bed.wait_for_ranks(2, 2);
    let beats = bed.finish(2, 1);
    let last = beats.iter().filter(|beat| beat.generation == 1).map(|beat| beat.time).fold(0.0, f64::max);
    let first = beats.iter().find(|beat| beat.generation == 2).unwrap().time;
    assert!(first - last < 10.0, "the lease of 20 s was not waited for: {}", first - last);
}

#[test]
fn a_node_comes_back_and_is_taken_in_again() {
    let mut bed = Bed::start(LEASE, &["--nnodes", "1:2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    bed.signal_node(1, Signal::SIGKILL);
    bed.wait_for_ranks(2, 1);
    bed.restart_worker(1, Duration::ZERO);
    bed.wait_for_ranks(3, 2);
    bed.finish(3, 1);
}

#[test]
fn a_node_is_frozen_and_thawed() {
    let bed = Bed::start(LEASE, &["--nnodes", "1:2", "--max-restarts", "1"], "");
    let rank = bed.wait_for_ranks(1, 2)[&1];
    bed.signal_node(1, Signal::SIGSTOP);
    bed.wait_for_ranks(2, 1);
    bed.signal_node(1, Signal::SIGCONT);
    eventually("its fencing itself", || if is_running(rank) { Err(rank) } else { Ok(()) });
    bed.wait_for_ranks(3, 2);
    std::fs::write(bed.cluster.dir.path().join("bed/done"), "").unwrap();
    let job = bed.cluster.wait_for(&bed.id, "SUCCEEDED");
    assert_eq!((&job["generation"], &job["restartsUsed"]), (&3.into(), &1.into()));
    // A thawed rank may write one more line before its shim has killed it; nothing can be done about that.
    let zombies = bed.beats();
    let first = zombies.iter().position(|beat| beat.generation == 2).unwrap();
    let late = zombies[first..].iter().filter(|beat| beat.generation == 1).count();
    assert!(late <= 2, "{late} beats of a thawed rank");
}

#[test]
fn a_daemon_is_frozen_beyond_the_lease() {
    let bed = Bed::start(LEASE, &["--nnodes", "1:2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    bed.cluster.workers[1].signal(Signal::SIGSTOP);
    bed.wait_for_ranks(2, 1);
    bed.cluster.workers[1].signal(Signal::SIGCONT);
    bed.wait_for_ranks(3, 2);
    bed.finish(3, 1);
}

#[test]
fn a_coordinator_is_frozen_beyond_the_lease() {
    let bed = Bed::pair(&[]);
    bed.cluster.coordinator.signal(Signal::SIGSTOP);
    std::thread::sleep(BEYOND);
    bed.cluster.coordinator.signal(Signal::SIGCONT);
    bed.cluster.wait_for_nodes(2);
    bed.finish(1, 0);
}

#[test]
fn a_coordinator_is_away_beyond_the_lease() {
    let mut bed = Bed::pair(&[]);
    bed.cluster.coordinator.kill();
    std::thread::sleep(BEYOND);
    bed.cluster.restart_coordinator();
    bed.cluster.wait_for_nodes(2);
    bed.finish(1, 0);
}

#[test]
fn a_coordinator_is_away_and_the_job_wants_to_be_stopped() {
    let mut bed = Bed::pair(&["--on-coordinator-loss", "stop", "--max-restarts", "1"]);
    bed.cluster.coordinator.kill();
    eventually("the ranks' end", || {
        let left = bed.ranks(None);
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    bed.cluster.restart_coordinator();
    bed.wait_for_ranks(2, 2);
    bed.finish(2, 1);
}

#[test]
fn a_coordinator_is_killed_again_and_again() {
    let mut bed = Bed::pair(&[]);
    for round in 0..6_u64 {
        pause(round * 37 % 150);
        bed.cluster.coordinator.kill();
        bed.cluster.restart_coordinator();
    }
    bed.cluster.wait_for_nodes(2);
    bed.finish(1, 0);
}

#[test]
fn a_coordinator_and_a_daemon_are_killed_at_once() {
    let mut bed = Bed::pair(&[]);
    bed.cluster.coordinator.kill();
    bed.restart_worker(1, Duration::from_millis(50));
    bed.cluster.restart_coordinator();
    bed.cluster.wait_for_nodes(2);
    bed.finish(1, 0);
}

#[test]
fn a_daemon_is_stopped_in_good_order() {
    let mut bed = Bed::start(Settings { workers: 3, ..LEASE }, &["--nnodes", "2"], "");
    bed.wait_for_ranks(1, 2);
    bed.cluster.workers[1].signal(Signal::SIGTERM);
    assert_eq!(bed.cluster.workers[1].wait(), 0);
    bed.wait_for_ranks(2, 2);
    assert!(bed.finish(2, 0).iter().all(|beat| beat.generation == 1 || beat.node != "n2"));
}

#[test]
fn a_daemon_is_replaced_by_a_newer_one() {
    let mut bed = Bed::pair(&[]);
    let before = bed.wait_for_ranks(1, 2);
    bed.cluster.workers[1].signal(Signal::SIGHUP);
    assert_eq!(bed.cluster.workers[1].wait(), 0, "it leaves its ranks to their shims");
    bed.restart_worker(1, Duration::ZERO);
    bed.cluster.wait_for_nodes(2);
    assert!(before.values().all(|pid| is_running(*pid)), "ranks are untouched");
    bed.finish(1, 0);
}

#[test]
fn a_node_is_drained() {
    let before = "trap 'echo asked > $BED/asked$RANK; exit 0' INT\n";
    let flags = ["--nnodes", "2", "--stop-signal", "SIGINT"];
    let bed = Bed::start(Settings { workers: 3, ..LEASE }, &flags, before);
    bed.wait_for_ranks(1, 2);
    let drained = bed.cluster.muster(&["drain", "n2", "--reason", "new kernel"]).ok();
    assert!(drained.contains("drained (new kernel)"), "{drained}");
    bed.wait_for_ranks(2, 2);
    assert!(bed.cluster.dir.path().join("bed/asked1").exists(), "by the signal that the job asked for");
    let beats = bed.finish(2, 0);
    assert!(beats.iter().all(|beat| beat.generation == 1 || beat.node != "n2"));
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
fn a_clone_takes_no_name() {
    let bed = Bed::pair(&[]);
    let clone = bed.cluster.spawn_worker("n2", "elsewhere");
    eventually("its refusal", || {
        let log = clone.log();
        if log.contains("held by another live daemon") { Ok(()) } else { Err(log) }
    });
    drop(clone);
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

#[test]
fn the_disk_of_the_logs_is_full() {
    let mount = tempfile::tempdir().unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", "size=2m", "muster-test"];
    let mounted = std::process::Command::new("mount").args(tmpfs).arg(mount.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return skip("a full disk of the logs", "a tmpfs cannot be mounted here");
    }
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            std::process::Command::new("umount").arg("-l").arg(&self.0).status().ok();
        }
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
fn no_two_daemons_share_a_directory() {
    let bed = Bed::pair(&[]);
    let mut second = bed.cluster.spawn_worker("n9", "n2");
    assert_eq!(second.wait(), 1);
    assert!(second.log().contains("another node daemon uses the data directory"), "{}", second.log());
    assert_eq!(processes_with("n9").len(), 0);
    bed.finish(1, 0);
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
