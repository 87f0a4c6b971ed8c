//! Several coordinators on a real etcd: one leads, the others say who, and a job runs on whatever becomes of them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use muster_tests::{Cluster, Cut, Etcd, FAST, Settings, Several, eventually, grpcurl, grpcurl_path, skip};
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
#[expect(clippy::disallowed_methods, reason = "that it is sooner than a lease is what is looked at")]
fn who_comes_back_leads_without_waiting_for_the_lease_that_he_held() {
    let Some(etcd) = Etcd::start(1) else { return skip("a lease that is left", "there is no etcd here") };
    let lease = Duration::from_mins(1);
    let flags = [&FAST[..], &["--leader-lease", "60s"]].concat();
    let mut several = Several::on(etcd, None, 1, 2, &flags);
    let id = several.submit_beats(&[]);
    several.wait_for(&id, "RUNNING");
    several.kill_coordinator(0);
    let began = Instant::now();
    several.start_coordinator(0);
    several.leader();
    assert!(began.elapsed() < lease / 2, "it waited for itself: {:?}", began.elapsed());
    several.wait_for_nodes(2);
    finish(&several, &id);
}

#[test]
fn tokens_and_certificates_outlive_the_leader_that_has_issued_them() {
    let Some(mut several) = Several::start_encrypted(1, 3, 2) else {
        return skip("several coordinators with TLS", "there is no etcd here");
    };
    let id = several.submit_beats(&[]);
    several.wait_for(&id, "RUNNING");
    let leader = several.leader();
    several.kill_coordinator(leader);
    assert_ne!(several.leader(), leader);
    several.wait_for_nodes(2);
    // One that follows sends its caller on, whoever he is, and the leader asks who he is.
    let follower = (0..3).find(|index| ![leader, several.leader()].contains(index)).unwrap();
    let at_follower = format!("https://{}", several.address(follower));
    several.muster_at(&at_follower, &["token", "create", "--role", "viewer", "--name", "late"]).ok();
    let listed = several.muster(&["token", "list"]).ok();
    assert!(listed.contains("late"), "{listed}");
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

#[test]
fn a_leader_that_is_cut_off_steps_down_and_its_job_runs_on() {
    if !muster_tests::has_etcd() {
        return skip("a partition of coordinators", "there is no etcd here");
    }
    // A host that is cut off says nothing, so the next leader must be there before the nodes' lease ends: as by default.
    let Some(several) = Several::start_on_hosts(2, 2, &[]) else {
        return skip("a partition of coordinators", "no network namespaces can be made here");
    };
    let id = several.submit_beats(&[]);
    let cut_off = several.leader();
    let hosts = several.netns.as_ref().unwrap();
    hosts.cut(cut_off + 1, Cut::Full);
    eventually("the other's turn", || match several.leader_now() {
        Some(now) if now != cut_off => Ok(()),
        now => Err(now),
    });
    several.wait_for_nodes(2);
    let log = several.coordinators[cut_off].as_ref().unwrap().log();
    assert!(log.contains("stepped down"), "it has given up before the other one led: {log}");
    hosts.mend(cut_off + 1, Cut::Full);
    several.wait_for_nodes(2);
    finish(&several, &id);
}

#[test]
fn an_etcd_at_addresses_of_ipv6_is_called_as_people_write_them() {
    let Ok(at_v6) = std::net::TcpListener::bind("[::1]:0") else {
        return skip("an etcd at [::1]", "this machine has no IPv6");
    };
    drop(at_v6);
    let Some(etcd) = Etcd::start_on(vec![(Vec::new(), "[::1]".to_owned())], &[]) else {
        return skip("an etcd at [::1]", "there is no etcd here");
    };
    let member = etcd.url().replace("etcd://", "");
    assert!(member.starts_with("[::1]:"), "{member}");
    let several = Several::on(etcd, None, 1, 2, &FAST);
    let id = several.submit_beats(&[]);
    several.wait_for(&id, "RUNNING");
    finish(&several, &id);
    // Another member that is not there, spaces and slashes.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("export").display().to_string();
    let store = format!(" etcd://[::1]:9, {member} /muster/ ");
    several.muster(&["store", "export", "--store", &store, &file]).ok();
    assert!(std::fs::read_to_string(&file).unwrap().contains(&id), "it is the same cluster");
    for (wrong, words) in [
        (format!("etcd://{}", member.replace(['[', ']'], "")), "IPv6 without brackets"),
        (format!("http://{member}"), "begins with etcd://"),
        (format!("etcd://https://{member}"), "which --etcd-ca decides"),
    ] {
        let refused = several.muster(&["store", "export", "--store", &wrong, "/dev/null"]);
        assert!(refused.code == 2 && refused.stderr.contains(words), "{wrong}: {refused:?}");
    }
}

#[test]
fn a_cluster_moves_from_redb_to_etcd_and_back() {
    let Some(etcd) = Etcd::start(1) else {
        return skip("moving a store to etcd", "there is no etcd here");
    };
    let mut cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let ended = cluster.submit(&[], "true");
    cluster.wait_for(&ended, "SUCCEEDED");
    let waiting = cluster.submit(&["--nnodes", "3"], "true");
    cluster.workers.clear();
    cluster.coordinator.signal(Signal::SIGTERM);
    assert_eq!(cluster.coordinator.wait(), 0);

    let (store, dir) = (etcd.url(), cluster.dir.path().to_owned());
    let path = |name: &str| dir.join(name).display().to_string();
    let (redb, back) = (path("coordinator"), path("back"));
    let (first, second) = (path("first"), path("second"));
    cluster.muster(&["store", "export", "--data-dir", &redb, &first]).ok();
    cluster.muster(&["store", "import", "--store", &store, &first]).ok();
    let again = cluster.muster(&["store", "import", "--store", &store, &first]);
    assert!(again.code == 1 && again.stderr.contains("records already"), "{again:?}");
    cluster.muster(&["store", "export", "--store", &store, &second]).ok();
    let [first, second] = [first, second].map(|file| std::fs::read_to_string(file).unwrap());
    let records = |text: &str| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(records(&first), records(&second));
    cluster.muster(&["store", "import", "--data-dir", &back, &path("second")]).ok();

    let several = Several::on(etcd, None, 2, 0, &FAST);
    several.wait_for(&ended, "SUCCEEDED");
    several.wait_for(&waiting, "QUEUED");
    let term = several.terms().into_iter().max().unwrap();
    assert!(term > 1, "it goes on counting: {term}");
    let busy = several.muster(&["store", "import", "--store", &store, &path("second")]);
    assert!(busy.stderr.contains("stop every coordinator"), "{busy:?}");
}
