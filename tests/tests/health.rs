//! Nodes that are not fit for work, seen through the real daemons: what is noticed, what becomes of jobs, and how a node
//! comes back.

use muster_tests::{Cluster, FakeMachine, Rail, Settings, eventually};
use serde_json::Value;

const ALONE: Settings = Settings { workers: 0, in_memory: true, ..Settings::DEFAULT };

fn node(cluster: &Cluster) -> Value {
    cluster.muster(&["node", "n1", "--output", "json"]).json().remove(0)
}

fn verdict(node: &Value) -> (String, String) {
    let text = |name: &str| node["health"][name].as_str().unwrap_or_default().to_owned();
    (text("verdict").trim_start_matches("HEALTH_VERDICT_").to_owned(), text("reason"))
}

fn wait_for_verdict(cluster: &Cluster, name: &str, wanted: &str) -> String {
    eventually(wanted, || {
        let node = cluster.muster(&["node", name, "--output", "json"]).json().remove(0);
        let (verdict, reason) = verdict(&node);
        if verdict == wanted { Ok(reason) } else { Err(node) }
    })
}

#[test]
fn a_cable_that_flaps_and_a_gpu_that_is_lost_are_noticed_while_jobs_run() {
    let mut cluster = Cluster::start(ALONE);
    let machine = FakeMachine::make(cluster.dir.path(), [Rail::Well; 8], ["0", "1"]);
    let flags = [&machine.flags()[..], &["--health-interval", "50ms"]].concat();
    let worker = cluster.spawn_worker_with("n1", "n1", &flags);
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    let running = cluster.submit(&["--nproc-per-node", "1", "--gpus-per-proc", "1"], "exec sleep 1000");
    cluster.wait_for(&running, "RUNNING");

    machine.set_faults(&[3]);
    let reason = wait_for_verdict(&cluster, "n1", "DEGRADED");
    assert_eq!(reason, "GPU 3: it has fallen off the bus");
    // That device is excluded, and not the node.
    let all = cluster.submit(&["--nproc-per-node", "7", "--gpus-per-proc", "1"], "true");
    let why = "waiting: 0 of 1 nodes; n1 refused: 6 of 8 GPUs free (1 faulty), 7 needed";
    assert_eq!(cluster.wait_for(&all, "QUEUED")["reason"], why);
    let six =
        cluster.submit(&["--nproc-per-node", "6", "--gpus-per-proc", "1"], "echo $CUDA_VISIBLE_DEVICES");
    cluster.wait_for(&six, "SUCCEEDED");
    let given: Vec<String> = (0..6).map(|rank| cluster.output(&six, rank).trim().to_owned()).collect();
    assert_eq!(given, ["1", "2", "4", "5", "6", "7"]);

    machine.set_rail(2, Rail::Down);
    eventually("the rail to be seen down", || {
        let node = node(&cluster);
        let found = node["health"]["findings"].as_array().cloned().unwrap_or_default();
        let seen = found.iter().any(|f| f["reason"] == "is DOWN, and was ACTIVE");
        if seen { Ok(()) } else { Err(node) }
    });
    machine.set_counter(5, "counters/link_downed", 6);
    let reason = wait_for_verdict(&cluster, "n1", "QUARANTINED");
    assert_eq!(reason, "mlx5_5:1: its link went down 6 times within 10 minutes; look at its cable");
    let waits = cluster.submit(&["--gpus-per-proc", "1"], "true");
    let why = format!("waiting: 0 of 1 nodes; n1 refused: quarantined ({reason})");
    assert_eq!(cluster.wait_for(&waits, "QUEUED")["reason"], *why);
    assert_eq!(cluster.job(&running)["state"], "JOB_STATE_RUNNING", "what runs there goes on");
    let shown = cluster.muster(&["nodes"]).ok();
    assert!(shown.contains("ready, quarantined (mlx5_5:1: its link went down 6 times"), "{shown}");
}

#[test]
fn a_users_check_takes_a_node_out_and_a_person_gives_it_back() {
    let mut cluster = Cluster::start(ALONE);
    let checks = cluster.dir.path().join("checks");
    std::fs::create_dir(&checks).unwrap();
    let write = |name: &str, script: &str| {
        let (path, new) = (checks.join(name), cluster.dir.path().join("check.new"));
        std::fs::write(&new, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(new, path).unwrap();
    };
    write("10-fans", "echo '{\"reason\":\"fan 3 stands still\"}'; exit 2");
    write("20-well", "exit 0");
    // It writes without an end, and is cut short.
    write("30-loud", "exec yes");
    let flags = ["--check-dir", checks.to_str().unwrap(), "--health-interval", "20ms"];
    let worker = cluster.spawn_worker_with("n1", "n1", &flags);
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    assert_eq!(wait_for_verdict(&cluster, "n1", "QUARANTINED"), "check 10-fans: fan 3 stands still");
    let found = node(&cluster)["health"]["findings"].clone();
    assert_eq!(found[1]["reason"], "the check is broken: a signal ended it", "{found}");
    let id = cluster.submit(&[], "true");
    let why = "waiting: 0 of 1 nodes; n1 refused: quarantined (check 10-fans: fan 3 stands still)";
    assert_eq!(cluster.wait_for(&id, "QUEUED")["reason"], why);

    write("10-fans", "exit 0");
    write("30-loud", "exit 0");
    eventually("the fan to turn", || {
        let node = node(&cluster);
        if node["health"]["findings"].as_array().is_none_or(Vec::is_empty) { Ok(()) } else { Err(node) }
    });
    // By itself it would take five minutes.
    assert_eq!(verdict(&node(&cluster)).0, "QUARANTINED");
    cluster.muster(&["uncordon", "n1"]).ok();
    cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!(verdict(&node(&cluster)), ("HEALTHY".to_owned(), String::new()));
}

#[test]
fn a_node_with_a_rail_less_than_its_fleet_is_named() {
    let mut cluster = Cluster::start(ALONE);
    for host in 1..=4 {
        let (name, dir) = (format!("n{host}"), cluster.dir.path().join(format!("machine{host}")));
        let mut rails = [Rail::Well; 8];
        rails[6] = if host == 4 { Rail::Slow } else { Rail::Well };
        let machine = FakeMachine::make(&dir, rails, ["0", "1"]);
        let worker = cluster.spawn_worker_with(
            &name,
            &name,
            &[&machine.flags()[..], &["--health-interval", "50ms"]].concat(),
        );
        cluster.workers.push(worker);
        cluster.wait_for_nodes(host);
    }
    let reason =
        "fabric: its active ports have 3200 Gb/s together (mlx5_6:1 has 200); 3 of 3 nodes like it have 3400";
    assert_eq!(wait_for_verdict(&cluster, "n4", "DEGRADED"), reason);
    assert_eq!(wait_for_verdict(&cluster, "n1", "HEALTHY"), "");
    // It is the last to be taken.
    let id = cluster.submit(&["--nnodes", "3", "--gpus-per-proc", "8"], "true");
    let nodes = cluster.wait_for(&id, "SUCCEEDED")["placement"].clone();
    let names: Vec<&str> =
        nodes.as_array().unwrap().iter().map(|node| node["nodeName"].as_str().unwrap()).collect();
    assert_eq!(names, ["n1", "n2", "n3"]);
}

#[test]
fn damaged_packets_of_roce_are_errors_of_its_link() {
    let mut cluster = Cluster::start(ALONE);
    let machine = FakeMachine::make(cluster.dir.path(), [Rail::Roce; 8], ["0", "1"]);
    machine.set_counter(2, "hw_counters/rx_icrc_encapsulated", 7);
    machine.set_counter(3, "hw_counters/local_ack_timeout_err", 7);
    let flags = [&machine.flags()[..], &["--health-interval", "50ms"]].concat();
    let worker = cluster.spawn_worker_with("n1", "n1", &flags);
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    let mut count = 7;
    let reason = eventually("the verdict", || {
        count += 700;
        machine.set_counter(2, "hw_counters/rx_icrc_encapsulated", count);
        // Peers that are killed make as many of these, and the port is well.
        machine.set_counter(3, "hw_counters/local_ack_timeout_err", 100 * count);
        let node = node(&cluster);
        let (verdict, reason) = verdict(&node);
        if verdict == "DEGRADED" { Ok(reason) } else { Err(node) }
    });
    let words = " errors on its link within 10 minutes; look at its cable";
    assert!(reason.starts_with("mlx5_2:1: ") && reason.ends_with(words), "{reason}");
}
