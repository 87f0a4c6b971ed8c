//! Real partitions between real hosts: a node that is cut off fences itself before its ranks are replaced, survivors go
//! on, and when the network is back so is the node.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use muster_tests::{Bed, Cut, Netns, Settings, skip};

const HOSTS: Settings = Settings { lease: "2s", netns: true, ..Settings::DEFAULT };

/// Seconds in which survivors have their new generation: the lease, and one.
const REPLACED_MAX: f64 = 3.0;

/// Seconds since the machine was started, as the ranks read them.
fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

fn cut_and_mend(cut: Cut) {
    if Netns::new(1).is_none() {
        return skip("a partition", "no network namespaces can be made here");
    }
    let bed = Bed::start(HOSTS, &["--nnodes", "1:2", "--max-restarts", "1"], "");
    bed.wait_for_ranks(1, 2);
    let hosts = bed.cluster.netns.as_ref().unwrap();
    let before = uptime();
    hosts.cut(2, cut);
    // The survivors' new generation: nothing of the old one writes a line after its first (checked at the end).
    bed.wait_for_ranks(2, 1);
    assert!(bed.ranks(Some("n2")).is_empty(), "it has fenced itself");
    let beats = bed.beats();
    let first = beats.iter().find(|beat| beat.generation == 2).unwrap().time;
    assert!(first - before < REPLACED_MAX, "the survivors waited {} s", first - before);
    hosts.mend(2, cut);
    bed.wait_for_ranks(3, 2);
    bed.finish(3, 1);
}

#[test]
fn a_node_is_cut_off() {
    cut_and_mend(Cut::Full);
}

#[test]
fn a_node_is_heard_no_more() {
    cut_and_mend(Cut::Up);
}

#[test]
fn a_node_hears_no_more() {
    cut_and_mend(Cut::Down);
}

#[test]
fn a_coordinator_that_is_gone_is_told_from_one_that_cannot_be_reached() {
    if Netns::new(1).is_none() {
        return skip("a coordinator away", "no network namespaces can be made here");
    }
    let mut bed = Bed::start(HOSTS, &["--nnodes", "2"], "");
    bed.wait_for_ranks(1, 2);
    // Its host is there and says that nobody listens: nobody can replace the ranks.
    bed.cluster.coordinator.kill();
    std::thread::sleep(Duration::from_secs(4));
    bed.cluster.restart_coordinator();
    bed.cluster.wait_for_nodes(2);
    bed.finish(1, 0);
}
