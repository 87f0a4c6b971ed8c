//! Where nodes are in the network, as Slurm says, and where gangs are put: beside the real Slurm.

use std::process::Stdio;

use muster_tests::{Cluster, Settings, Slurm, SlurmOptions, binary, skip};

#[test]
fn a_gang_is_placed_by_slurms_topology_so_that_it_crosses_the_fewest_uplinks() {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let file = cluster.dir.path().join("topology.conf");
    let text = "SwitchName=l1 Nodes=n[1-2]\nSwitchName=l2 Nodes=n[3-5]\nSwitchName=top Switches=l[1-2]\n";
    std::fs::write(&file, text).unwrap();
    // The addresses would have it otherwise: all are the same, and then names decide.
    for host in 1..=5 {
        let name = format!("n{host}");
        let worker = cluster.spawn_worker_with(&name, &name, &["--topology-conf", file.to_str().unwrap()]);
        cluster.workers.push(worker);
    }
    cluster.wait_for_nodes(5);
    let shown = cluster.muster(&["node", "n3"]).ok();
    assert!(shown.contains("in the network: spine top, leaf l2\n"), "{shown}");
    let placed = |nodes: &str| -> Vec<String> {
        let flags = ["submit", "--dry-run", "--nnodes", nodes, "--output", "json", "--", "true"];
        let plan = cluster.muster(&flags).json().remove(0);
        let names = plan["placement"].as_array().unwrap().iter();
        names.map(|node| node["nodeName"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(placed("3"), ["n3", "n4", "n5"]);
    assert_eq!(placed("2"), ["n1", "n2"]);
    assert_eq!(placed("4"), ["n1", "n3", "n4", "n5"]);
}

/// A step of Slurm that ends before its Slurm does: it is asked to, and hands that on to its tasks.
struct Step(std::process::Child);

impl Drop for Step {
    fn drop(&mut self) {
        let srun = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(srun, nix::sys::signal::Signal::SIGTERM).ok();
        self.0.wait().ok();
    }
}

#[test]
fn slurms_steps_and_its_topology_conf_say_the_same() {
    let text = "SwitchName=l0 Nodes=n[0-1]\nSwitchName=l1 Nodes=n[2-3]\nSwitchName=top Switches=l[0-1]\n";
    let Some(slurm) = Slurm::start_with(4, SlurmOptions { topology: Some(text), ..SlurmOptions::default() })
    else {
        return skip("nodes in an allocation of Slurm", "`cargo xtask setup --tools` has brought no Slurm");
    };
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let dir = cluster.dir.path().to_owned();
    let script = format!(
        "exec {} worker --coordinator {} --name $SLURMD_NODENAME --data-dir {}/$SLURMD_NODENAME",
        binary("muster").display(),
        cluster.url(),
        dir.display()
    );
    let mut srun = slurm.command("srun");
    srun.args(["-N4", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "sh", "-c", &script]);
    let _step = Step(srun.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    cluster.wait_for_nodes(4);
    let file = dir.join("topology.conf");
    std::fs::write(&file, text).unwrap();
    // The same names again, as they are in the file; found by the name of the node.
    for (node, leaf) in [("n0", "l0"), ("n1", "l0"), ("n2", "l1"), ("n3", "l1")] {
        let of = |name: &str| {
            cluster.muster(&["node", name, "--output", "json"]).json().remove(0)["location"].clone()
        };
        assert_eq!(of(node), serde_json::json!(["", "top", leaf]), "as its step says");
    }
    let flags = ["--topology-conf", file.to_str().unwrap()];
    let other = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let worker = other.spawn_worker_with("n2", "n2", &flags);
    cluster.workers.push(worker);
    other.wait_for_nodes(1);
    let of_file = other.muster(&["node", "n2", "--output", "json"]).json().remove(0);
    assert_eq!(of_file["location"], serde_json::json!(["", "top", "l1"]), "as the file says");
    // A gang of two is put below one switch.
    let plan = cluster.muster(&["submit", "--dry-run", "--nnodes", "2", "--output", "json", "--", "true"]);
    let plan = plan.json().remove(0);
    let names: Vec<&str> =
        plan["placement"].as_array().unwrap().iter().map(|node| node["nodeName"].as_str().unwrap()).collect();
    assert!(names == ["n0", "n1"] || names == ["n2", "n3"], "{names:?}");
}
