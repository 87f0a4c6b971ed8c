//! Faults of daemons, nodes and coordinators, on real processes, one schedule each: one generation lives at a time, ranks
//! outlive what only watches them, and who cannot be watched ends before it is replaced.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use muster_tests::{Bed, Settings, eventually, is_running, processes_with, user};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LEASE: Settings = Settings { lease: "2s", ..Settings::DEFAULT };
/// Well beyond the lease of these clusters.
const BEYOND: Duration = Duration::from_secs(4);

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
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
    let by = format!("drained by {} (new kernel)", user());
    assert!(drained.contains(&by), "{drained}");
    bed.wait_for_ranks(2, 2);
    assert!(bed.cluster.dir.path().join("bed/asked1").exists(), "by the signal that the job asked for");
    let beats = bed.finish(2, 0);
    assert!(beats.iter().all(|beat| beat.generation == 1 || beat.node != "n2"));
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
fn no_two_daemons_share_a_directory() {
    let bed = Bed::pair(&[]);
    let mut second = bed.cluster.spawn_worker("n9", "n2");
    assert_eq!(second.wait(), 1);
    assert!(second.log().contains("another node daemon uses the data directory"), "{}", second.log());
    assert_eq!(processes_with("MUSTER_NODE=n9").len(), 0);
    bed.finish(1, 0);
}
