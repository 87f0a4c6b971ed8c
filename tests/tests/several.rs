//! Several coordinators on a real etcd: one leads, the others say who, and a job runs on whatever becomes of them.

use std::collections::BTreeSet;
use std::time::Duration;

use muster_tests::{Several, eventually, grpcurl, grpcurl_path, skip};
use nix::sys::signal::Signal;

/// Such a cluster, or a word that there is no etcd.
fn several(members: usize, coordinators: usize, workers: usize) -> Option<Several> {
    let several = Several::start(members, coordinators, workers);
    if several.is_none() {
        skip("several coordinators", "there is no etcd here; `cargo xtask test` brings it where it can");
    }
    several
}

/// The job ends as it began: one generation, no restart, and the same processes throughout.
fn finish(several: &Several, id: &str) {
    several.end_beats();
    let job = several.wait_for(id, "SUCCEEDED");
    assert_eq!((&job["generation"], &job["restartsUsed"]), (&1.into(), &0.into()), "{job}");
    let beats = several.beats();
    let processes: BTreeSet<(u32, i32)> = beats.iter().map(|beat| (beat.rank, beat.pid)).collect();
    assert_eq!(processes.len(), 2, "no rank was ever started twice: {processes:?}");
    assert!(beats.iter().all(|beat| beat.generation == 1));
}

#[test]
fn followers_say_who_leads_and_everybody_follows() {
    let Some(several) = several(1, 3, 2) else { return };
    let leader = several.leader();
    let follower = (leader + 1) % 3;
    let url = format!("http://{}", several.address(leader));
    if grpcurl_path().is_some() {
        let refused = grpcurl(several.address(follower), &["muster.v1.JobService/ListJobs"]);
        assert_eq!(refused.code, 64 + 14, "UNAVAILABLE: {refused:?}");
        assert!(refused.stderr.contains(&format!("the one at {url} does")), "{refused:?}");
        assert!(
            refused.stderr.contains("NOT_LEADER") && refused.stderr.contains("accepted_at"),
            "{refused:?}"
        );
        let health = |index: usize, service: &str| {
            let data = format!("{{\"service\":\"{service}\"}}");
            grpcurl(several.address(index), &["-d", &data, "--", "grpc.health.v1.Health/Check"]).stdout
        };
        assert!(health(leader, "").contains("\"SERVING\""));
        assert!(health(follower, "").contains("NOT_SERVING"));
        assert!(health(follower, "live").contains("\"SERVING\""), "a follower is well all the same");
    }
    // Whoever knows one of them finds the leader.
    let at_follower = format!("http://{}", several.address(follower));
    let id = several.muster_at(&at_follower, &["submit", "--", "true"]).ok();
    several.wait_for(id.trim(), "SUCCEEDED");
}

#[test]
fn a_leader_is_killed_and_its_job_runs_on() {
    let Some(mut several) = several(3, 3, 2) else { return };
    let id = several.submit_beats(&[]);
    let mut terms = Vec::new();
    for _ in 0..2 {
        let leader = several.leader();
        several.kill_coordinator(leader);
        let next = several.leader();
        assert_ne!(next, leader);
        several.wait_for_nodes(2);
        several.start_coordinator(leader);
        terms.push(next);
    }
    several.etcd.kill(0);
    several.wait_for_nodes(2);
    finish(&several, &id);
}

#[test]
fn a_leader_that_is_stopped_hands_over_at_once() {
    let Some(several) = several(1, 2, 2) else { return };
    let id = several.submit_beats(&[]);
    let leader = several.leader();
    several.coordinators[leader].as_ref().unwrap().signal(Signal::SIGTERM);
    eventually("the other's turn", || match several.leader_now() {
        Some(now) if now != leader => Ok(()),
        now => Err(now),
    });
    several.wait_for_nodes(2);
    finish(&several, &id);
}

#[test]
fn a_leader_that_was_frozen_beyond_its_lease_has_nothing_more_to_say() {
    let Some(several) = several(1, 2, 2) else { return };
    let id = several.submit_beats(&[]);
    let frozen = several.leader();
    several.coordinators[frozen].as_ref().unwrap().signal(Signal::SIGSTOP);
    let next = eventually("the other's turn", || match several.leader_now() {
        Some(now) if now != frozen => Ok(now),
        now => Err(now),
    });
    assert_ne!(next, frozen);
    several.wait_for_nodes(2);
    let second = several.muster(&["submit", "--", "true"]).ok();
    several.coordinators[frozen].as_ref().unwrap().signal(Signal::SIGCONT);
    eventually("its stepping down", || {
        let log = several.coordinators[frozen].as_ref().unwrap().log();
        if log.contains("stepped down") { Ok(()) } else { Err(log) }
    });
    several.wait_for_nodes(2);
    assert_eq!(several.leader(), next, "it stands behind the one that leads");
    several.wait_for(second.trim(), "QUEUED");
    finish(&several, &id);
    several.wait_for(second.trim(), "SUCCEEDED");
}

#[test]
fn without_etcd_training_goes_on_and_what_is_read_says_that_it_is_old() {
    let Some(mut several) = several(1, 2, 2) else { return };
    let id = several.submit_beats(&[]);
    several.etcd.kill(0);
    let stale = eventually("an old answer", || {
        let outcome = several.muster(&["job", &id, "--output", "json"]);
        let stale = outcome.code == 0 && outcome.stderr.contains("no longer be so");
        if stale { Ok(outcome) } else { Err(outcome) }
    });
    assert_eq!(stale.json()[0]["state"], "JOB_STATE_RUNNING");
    let refused = several.muster(&["cancel", &id]);
    assert!(refused.code == 3 && refused.stderr.contains("try again"), "{refused:?}");
    // Well beyond the nodes' lease of 5 s: nobody can replace their ranks, and they know it.
    std::thread::sleep(Duration::from_secs(8));
    several.etcd.restart(0);
    several.leader();
    several.wait_for_nodes(2);
    finish(&several, &id);
}
