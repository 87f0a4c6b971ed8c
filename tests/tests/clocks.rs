//! Clocks that are set while a job runs, those of the coordinator and those of the nodes: leases are counted on clocks that
//! nobody sets, so no rank notices, and the times that are shown stay in order.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use muster_tests::{Bed, Clocks, Settings, eventually, faketime_path, is_running, skip};

const WALL: Settings = Settings { lease: "2s", clocks: Some(Clocks::Wall), ..Settings::DEFAULT };
/// Twice the lease: what a jump breaks has broken by then.
const BEYOND: Duration = Duration::from_secs(4);

/// Whether clocks can be set here; else says so.
fn can_set_clocks() -> bool {
    let can = faketime_path().is_some();
    if !can {
        skip("clocks that are set", "libfaketime is not there; `cargo xtask setup --tools` brings it");
    }
    can
}

/// Waits until each rank has lived for well longer than the lease, on a clock that is not set.
fn outlive_the_lease(bed: &Bed) {
    let last = |bed: &Bed| {
        let mut last = [0.0; 2];
        for beat in bed.beats() {
            last[beat.rank as usize] = beat.time;
        }
        last
    };
    let before = last(bed);
    eventually("the ranks' life", || {
        let now = last(bed);
        let lived = (0..2).all(|rank| now[rank] - before[rank] > BEYOND.as_secs_f64());
        if lived { Ok(()) } else { Err((before, now, bed.job())) }
    });
}

fn times(job: &serde_json::Value) -> Vec<&str> {
    ["created", "started", "finished"].iter().map(|name| job[*name].as_str().unwrap()).collect()
}

#[test]
fn a_wall_clock_is_set() {
    if !can_set_clocks() {
        return;
    }
    for hosts in [&[0][..], &[1, 2]] {
        let bed = Bed::start(WALL, &["--nnodes", "2", "--max-restarts", "3"], "");
        let before = bed.wait_for_ranks(1, 2);
        for offset in ["+3600", "-3600"] {
            for host in hosts {
                bed.cluster.set_clock(*host, offset);
            }
            outlive_the_lease(&bed);
            bed.cluster.wait_for_nodes(2);
        }
        assert!(before.values().all(|pid| is_running(*pid)), "ranks are untouched");
        let log = bed.cluster.coordinator.log();
        assert!(!log.contains("lease"), "no lease was even in doubt: {log}");
        std::fs::write(bed.cluster.dir.path().join("bed/done"), "").unwrap();
        let job = bed.cluster.wait_for(&bed.id, "SUCCEEDED");
        assert!(times(&job).is_sorted(), "{job}");
        bed.finish(1, 0);
    }
}

#[test]
fn a_coordinator_is_restarted_after_its_wall_clock_was_set() {
    if !can_set_clocks() {
        return;
    }
    for offset in ["-3600", "+3600"] {
        let mut bed = Bed::start(WALL, &["--nnodes", "2", "--max-restarts", "1"], "");
        let before = bed.wait_for_ranks(1, 2);
        bed.cluster.wait_for(&bed.id, "RUNNING");
        bed.cluster.coordinator.kill();
        bed.cluster.set_clock(0, offset);
        bed.cluster.restart_coordinator();
        bed.cluster.wait_for_nodes(2);
        outlive_the_lease(&bed);
        assert!(before.values().all(|pid| is_running(*pid)), "ranks are untouched");
        // A fault now is mended now, not in an hour.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(before[&1]), nix::sys::signal::SIGKILL).unwrap();
        bed.wait_for_ranks(2, 2);
        std::fs::write(bed.cluster.dir.path().join("bed/done"), "").unwrap();
        let job = bed.cluster.wait_for(&bed.id, "SUCCEEDED");
        assert!(times(&job).is_sorted(), "{offset}: {job}");
        bed.finish(2, 1);
    }
}

#[test]
fn a_node_wakes_up_long_after_its_lease() {
    if !can_set_clocks() {
        return;
    }
    let settings = Settings { clocks: Some(Clocks::All), ..WALL };
    let bed = Bed::start(settings, &["--nnodes", "2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    // The kernel's timers do not follow: whoever acts has looked at the clock. It stops its ranks before anything else.
    bed.cluster.set_clock(2, "+3600");
    bed.wait_for_ranks(2, 2);
    bed.finish(2, 1);
}

#[test]
fn a_coordinator_wakes_up_long_after_the_leases() {
    if !can_set_clocks() {
        return;
    }
    let settings = Settings { clocks: Some(Clocks::All), ..WALL };
    let bed = Bed::start(settings, &["--nnodes", "2"], "");
    let before = bed.wait_for_ranks(1, 2);
    bed.cluster.set_clock(0, "+3600");
    outlive_the_lease(&bed);
    assert!(before.values().all(|pid| is_running(*pid)), "ranks are untouched");
    assert!(bed.cluster.coordinator.log().contains("did not run for a while"), "it noticed");
    bed.finish(1, 0);
}
