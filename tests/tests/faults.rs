//! The coordinator under faults: killed, without its port, its directory or its disk. Nothing that was
//! acknowledged is lost and no rank is touched.

use std::process::Command;

use muster_tests::{Cluster, Daemon, Settings, address_of, eventually, is_running, python, skip};
use nix::sys::signal::Signal;

/// A program that reports a point every 20 ms until a file is there.
const REPORTER: &str = r#"
import json, os, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["MUSTER_TELEMETRY"])
step = 0
while not os.path.exists(sys.argv[1]):
    step += 1
    s.sendall((json.dumps({"step": step, "values": {"loss": 1.0 / step}}) + "\n").encode())
    time.sleep(0.02)
print(step)
"#;

#[test]
fn a_killed_coordinator_comes_back_with_everything() {
    let mut cluster = Cluster::start(Settings::default());
    let done = cluster.dir.path().join("done");
    let done = done.to_str().unwrap();
    let submit = ["submit", "--nnodes", "2", "--", python(), "-c", REPORTER, done];
    let running = cluster.muster(&submit).ok().trim().to_owned();
    let queued = cluster.submit(&["--request-id", "q1"], "true");
    cluster.wait_for(&running, "RUNNING");
    let latest_step = |cluster: &Cluster| {
        cluster.job(&running)["latestStep"].as_str().and_then(|step| step.parse::<u64>().ok()).unwrap_or(0)
    };
    for round in 1..=3 {
        let before = latest_step(&cluster);
        // Stopped for a moment, it leaves points sent and not acknowledged; those must come again, in order.
        cluster.coordinator.signal(Signal::SIGSTOP);
        std::thread::sleep(std::time::Duration::from_millis(300));
        cluster.coordinator.kill();
        cluster.restart_coordinator();
        cluster.wait_for_nodes(2);
        let job = cluster.job(&running);
        assert_eq!(
            (&job["state"], &job["generation"]),
            (&"JOB_STATE_RUNNING".into(), &1.into()),
            "round {round}"
        );
        eventually("new points", || {
            let now = latest_step(&cluster);
            if now > before { Ok(()) } else { Err((before, now)) }
        });
    }
    assert_eq!(cluster.job(&queued)["state"], "JOB_STATE_QUEUED");
    let again = cluster.submit(&["--request-id", "q1"], "true");
    assert_eq!(again, queued, "a repeated submission is the same job, also over restarts");

    std::fs::write(done, "").unwrap();
    cluster.wait_for(&running, "SUCCEEDED");
    cluster.wait_for(&queued, "SUCCEEDED");
    for rank in 0..2 {
        let steps: u64 = cluster.output(&running, rank).trim().parse().unwrap();
        let points =
            cluster.muster(&["metrics", &running, "--rank", &rank.to_string(), "--output", "json"]).json();
        let seqs: Vec<u64> = points.iter().map(|p| p["seq"].as_str().unwrap().parse().unwrap()).collect();
        assert_eq!(seqs, (1..=steps).collect::<Vec<_>>(), "rank {rank}: every point, once, over three kills");
    }
}

#[test]
fn an_exit_while_the_coordinator_is_away_is_not_lost() {
    let mut cluster = Cluster::start(Settings::default());
    let go = cluster.dir.path().join("go");
    let script = format!("echo $$; while [ ! -e {} ]; do sleep 0.05; done; exit $RANK", go.display());
    let id = cluster.submit(&["--nnodes", "2"], &script);
    cluster.wait_for(&id, "RUNNING");
    let pid = eventually("the rank's pid", || cluster.output(&id, 1).trim().parse::<i32>());
    cluster.coordinator.kill();
    std::fs::write(&go, "").unwrap();
    eventually("the rank's end", || if is_running(pid) { Err(pid) } else { Ok(()) });
    cluster.restart_coordinator();
    let job = cluster.wait_for(&id, "FAILED");
    assert_eq!(job["reason"], "rank 1 on node n2 ended with exit code 1");
}

#[test]
fn a_worker_waits_for_its_coordinator() {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    cluster.coordinator.kill();
    cluster.add_worker();
    eventually("an attempt to connect", || {
        let log = cluster.workers[0].log();
        if log.contains("no session with the coordinator") { Ok(()) } else { Err(log) }
    });
    cluster.restart_coordinator();
    cluster.wait_for_nodes(1);
}

#[test]
fn sigterm_ends_a_coordinator_in_good_order_and_a_follower_finds_the_next() {
    let mut cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let go = cluster.dir.path().join("go");
    let script =
        format!("i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; sleep 0.05; done", go.display());
    let follower = std::thread::spawn({
        let (url, script) = (cluster.url(), script.clone());
        move || {
            let mut command = Command::new(muster_tests::binary("muster"));
            let args = ["submit", "--request-id", "f1", "--follow", "--", "sh", "-c", &script];
            muster_tests::Outcome::of(command.args(args).env("MUSTER_COORDINATOR", url))
        }
    });
    let id = eventually("the job", || {
        let jobs = cluster.muster(&["jobs", "--output", "json", "--state", "running"]).json();
        jobs.first().and_then(|job| job["id"].as_str().map(str::to_owned)).ok_or(jobs)
    });
    cluster.coordinator.signal(Signal::SIGTERM);
    assert_eq!(cluster.coordinator.wait(), 0);
    cluster.restart_coordinator();
    cluster.wait_for_nodes(1);
    std::fs::write(&go, "").unwrap();
    cluster.wait_for(&id, "SUCCEEDED");
    let followed = follower.join().unwrap();
    assert_eq!(followed.code, 0, "{followed:?}");
    let lines: Vec<String> = followed.stdout.lines().map(str::to_owned).collect();
    let expected: Vec<String> = (1..=lines.len()).map(|i| format!("line {i}")).collect();
    assert_eq!(lines, expected, "no line is missing or doubled over the restart");
    assert_eq!(cluster.output(&id, 0).lines().count(), lines.len());
}

#[test]
fn what_is_taken_is_said() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let elsewhere = tempfile::tempdir().unwrap();
    let ends = |name: &str, args: &[&str], expected: &str| {
        let mut daemon = Daemon::start(elsewhere.path(), name, args);
        assert_eq!(daemon.wait(), 1, "{}", daemon.log());
        assert!(daemon.log().contains(expected), "{}", daemon.log());
    };
    let held = cluster.dir.path().join("coordinator");
    let free = elsewhere.path().join("data");
    let (held, free) = (held.to_str().unwrap(), free.to_str().unwrap());
    let coordinator = |listen: &'static str, dir| ["coordinator", "--listen", listen, "--data-dir", dir];
    ends("dir", &coordinator("127.0.0.1:0", held), "is in use by another coordinator");
    let port = ["coordinator", "--listen", &cluster.address, "--data-dir", free];
    ends("port", &port, "failed to listen on 127.0.0.1:");
    ends("world", &coordinator("0.0.0.0:0", free), "is not a loopback address");
    let url = cluster.url();
    let worker_dir = cluster.dir.path().join("n1");
    let worker =
        ["worker", "--coordinator", &url, "--name", "n9", "--data-dir", worker_dir.to_str().unwrap()];
    ends("worker-dir", &worker, "another node daemon uses the data directory");
    let bad_url = ["worker", "--coordinator", "10.0.0.1", "--name", "n9", "--data-dir", free];
    ends("worker-url", &bad_url, "is not the URL of a coordinator");
}

#[test]
fn a_damaged_store_is_refused_in_words() {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    cluster.submit(&[], "true");
    cluster.coordinator.kill();
    let store = cluster.dir.path().join("coordinator/store.redb");
    let bytes = std::fs::read(&store).unwrap();
    std::fs::write(&store, &bytes[..bytes.len() / 3]).unwrap();
    cluster.restart_coordinator();
    assert_eq!(cluster.coordinator.wait(), 1);
    let log = cluster.coordinator.log();
    assert!(log.contains("is damaged") && log.contains("restore it from a backup"), "{log}");
}

struct Unmount<'a>(&'a std::path::Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0).output().ok();
    }
}

#[test]
fn a_full_disk_refuses_submissions_and_loses_nothing() {
    let mount = tempfile::tempdir().unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", "size=8m", "muster-test"];
    let mounted = Command::new("mount").args(tmpfs).arg(mount.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return skip("a full disk", "a tmpfs cannot be mounted here");
    }
    let _unmount = Unmount(mount.path());
    let logs = tempfile::tempdir().unwrap();
    let data_dir = mount.path().join("data");
    let coordinator = |name: &str, listen: &str| {
        Daemon::start(
            logs.path(),
            name,
            &["coordinator", "--listen", listen, "--data-dir", data_dir.to_str().unwrap()],
        )
    };
    let daemon = coordinator("first", "127.0.0.1:0");
    let address = address_of(&daemon);
    let submit = |id: &str, bytes: usize| {
        let mut command = Command::new(muster_tests::binary("muster"));
        let filler = "x".repeat(bytes);
        command.args(["submit", "--request-id", id, "--", "echo", &filler]);
        command.env("MUSTER_COORDINATOR", format!("http://{address}"));
        command
    };
    let first = muster_tests::Outcome::of(&mut submit("r1", 10)).ok();
    std::fs::write(mount.path().join("ballast"), vec![0; 16 << 20]).unwrap_err();
    // The command tries again until the coordinator can store the job; what it says meanwhile is seen here.
    let waiting: Vec<_> = (0..8)
        .map(|i| {
            let mut command = submit(&format!("full{i}"), 100_000);
            std::thread::spawn(move || muster_tests::Outcome::of(&mut command))
        })
        .collect();
    eventually("the refusal", || {
        let log = daemon.log();
        if log.contains("the store cannot be written") { Ok(()) } else { Err(log) }
    });
    std::fs::remove_file(mount.path().join("ballast")).unwrap();
    let ids: std::collections::BTreeSet<String> =
        waiting.into_iter().map(|t| t.join().unwrap().ok()).collect();
    assert_eq!(ids.len(), 8, "each was accepted once there was room");
    assert!(daemon.log().contains("the store can be written again"), "{}", daemon.log());
    let again = muster_tests::Outcome::of(&mut submit("r1", 10)).ok();
    assert_eq!(first, again);
}

#[test]
fn a_name_held_by_a_live_daemon_is_not_taken_over() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let clone = cluster.spawn_worker("n1", "clone");
    eventually("the refusal", || {
        let log = clone.log();
        if log.contains("is held by another live daemon") { Ok(()) } else { Err(log) }
    });
    let id = cluster.submit(&[], "true");
    cluster.wait_for(&id, "SUCCEEDED");
    assert!(cluster.dir.path().join("n1/logs").join(&id).is_dir(), "the first daemon ran it");
}
