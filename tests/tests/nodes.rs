//! What nodes have, seen through the real daemons: fake machines with 8 GPUs and 9 HCAs, what is found on them, what their
//! ranks are given, and the real ibstat on the same tree.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use muster_tests::{
    Cluster, FakeMachine, Outcome, Rail, Settings, eventually, ibstat_path, processors, skip,
};
use serde_json::Value;

/// One rail down, one RoCE, one at half its rate.
const MIXED: [Rail; 8] =
    [Rail::Well, Rail::Well, Rail::Well, Rail::Down, Rail::Well, Rail::Roce, Rail::Slow, Rail::Well];

/// A cluster of one fake machine.
fn cluster(rails: [Rail; 8], cpus: [&str; 2]) -> (Cluster, FakeMachine) {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let machine = FakeMachine::make(cluster.dir.path(), rails, cpus);
    let worker = cluster.spawn_worker_with("n1", "n1", &machine.flags());
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    (cluster, machine)
}

fn node(cluster: &Cluster) -> Value {
    cluster.muster(&["node", "n1", "--output", "json"]).json().remove(0)
}

const GOLDEN: &str = "\
/dev/shm 1008.00 GiB, memory that may be locked LOCK, open files FILES
GPU driver 550.54.15, for CUDA up to 12.4

GPU  MODEL                  MEMORY     PCI           NUMA  NEXT TO  UUID   STATE
0    NVIDIA H100 80GB HBM3  79.65 GiB  0000:02:00.0  0     mlx5_0   GPU-0  well
1    NVIDIA H100 80GB HBM3  79.65 GiB  0000:12:00.0  0     mlx5_1   GPU-1  well
2    NVIDIA H100 80GB HBM3  79.65 GiB  0000:22:00.0  0     mlx5_2   GPU-2  well
3    NVIDIA H100 80GB HBM3  79.65 GiB  0000:32:00.0  0     mlx5_3   GPU-3  well
4    NVIDIA H100 80GB HBM3  79.65 GiB  0000:42:00.0  1     mlx5_4   GPU-4  well
5    NVIDIA H100 80GB HBM3  79.65 GiB  0000:52:00.0  1     mlx5_5   GPU-5  well
6    NVIDIA H100 80GB HBM3  79.65 GiB  0000:62:00.0  1     mlx5_6   GPU-6  well
7    NVIDIA H100 80GB HBM3  79.65 GiB  0000:72:00.0  1     mlx5_7   GPU-7  well

PORT      LINK        STATE            RATE             PCI           NUMA  INTERFACE
mlx5_0:1  InfiniBand  ACTIVE (LinkUp)  400 Gb/s 4X NDR  0000:01:00.0  0     ib0
mlx5_1:1  InfiniBand  ACTIVE (LinkUp)  400 Gb/s 4X NDR  0000:11:00.0  0     ib1
mlx5_2:1  InfiniBand  ACTIVE (LinkUp)  400 Gb/s 4X NDR  0000:21:00.0  0     ib2
mlx5_3:1  InfiniBand  DOWN (Disabled)  10 Gb/s 4X SDR   0000:31:00.0  0     ib3
mlx5_4:1  InfiniBand  ACTIVE (LinkUp)  400 Gb/s 4X NDR  0000:41:00.0  1     ib4
mlx5_5:1  RoCE        ACTIVE (LinkUp)  400 Gb/s 4X NDR  0000:51:00.0  1     ib5
mlx5_6:1  InfiniBand  ACTIVE (LinkUp)  200 Gb/s 2X NDR  0000:61:00.0  1     ib6
mlx5_7:1  InfiniBand  ACTIVE (LinkUp)  400 Gb/s 4X NDR  0000:71:00.0  1     ib7
mlx5_8:1  InfiniBand  ACTIVE (LinkUp)  200 Gb/s 4X HDR  0000:81:00.0  0     ib8

NUMA  CPUS   MEMORY
0     0-31   1008.00 GiB
1     32-63  1008.00 GiB
";

#[test]
fn ports_that_programs_cannot_open_are_not_used_and_a_gid_of_the_user_is_looked_at() {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let machine = FakeMachine::make(cluster.dir.path(), [Rail::Roce; 8], ["0-31", "32-63"]);
    machine.set_verbs_except(&[1, 2]);
    let worker = cluster.spawn_worker_with("n1", "n1", &machine.flags());
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    let why = "uverbs1 cannot be opened: No such file or directory (os error 2); load ib_uverbs, or give the container \
               /dev/infiniband";
    let shown = cluster.muster(&["node", "n1"]).ok();
    assert!(shown.contains("not used: cannot be used by programs: ") && shown.contains(why), "{shown}");
    let flags = ["--nproc-per-node", "1", "--gpus-per-proc", "1", "--env", "NCCL_IB_GID_INDEX=7"];
    let id = cluster.submit(&flags, "exec sleep 1000");
    cluster.wait_for(&id, "RUNNING");
    let found = derived(&cluster, &id);
    let ports = "=mlx5_0:1,mlx5_3:1,mlx5_4:1,mlx5_5:1,mlx5_6:1,mlx5_7:1";
    assert_eq!((found[0].0.as_str(), found[0].1.as_str()), ("NCCL_IB_HCA", ports), "{found:?}");
    assert!(found[0].3.contains(why), "{found:?}");
    let last = found.last().unwrap();
    let words = "warning: mlx5_0:1 has no GID 7, and NCCL connects by no other; leave it out";
    assert!(last.0 == "NCCL_IB_GID_INDEX" && last.3.starts_with(words), "{found:?}");
    assert_eq!((last.1.as_str(), last.2.as_str()), ("7", "VARIABLE_SOURCE_JOB"), "it is left");
    assert!(cluster.workers[0].log().contains(words), "{}", cluster.workers[0].log());
    let text = cluster.muster(&["job", &id, "--env"]).ok();
    assert!(text.contains(words), "{text}");
}

#[test]
fn a_machine_shows_what_it_has_and_what_is_next_to_what() {
    let (cluster, _machine) = cluster(MIXED, ["0-31", "32-63"]);
    let shown = cluster.muster(&["node", "n1"]).ok();
    let at = shown.find("/dev/shm").unwrap_or_else(|| panic!("{shown}"));
    // What this very machine allows differs between machines.
    let words = |name: &str| {
        let rest = shown.split(name).nth(1).unwrap().trim_start();
        rest.split([',', '\n']).next().unwrap().to_owned()
    };
    let golden = GOLDEN.replace("LOCK", &words("may be locked")).replace("FILES", &words("open files"));
    assert_eq!(shown[at..], golden);
    assert_eq!(node(&cluster)["inventory"]["fabricPorts"][3]["state"], "PORT_STATE_DOWN");
}

/// Value, who set it, and why.
fn derived(cluster: &Cluster, id: &str) -> Vec<(String, String, String, String)> {
    let shown = cluster.muster(&["job", id, "--env", "--output", "json"]).json().remove(0);
    let all = shown["environments"][0]["surroundings"]["variables"].as_array().cloned().unwrap_or_default();
    let text = |variable: &Value, name: &str| variable[name].as_str().unwrap().to_owned();
    let of = |v: &Value| (text(v, "name"), text(v, "value"), text(v, "source"), text(v, "reason"));
    all.iter().map(of).collect()
}

#[test]
fn ranks_find_the_ports_that_work_and_a_user_is_never_overridden() {
    let (cluster, _machine) = cluster(MIXED, ["0-31", "32-63"]);
    let script = "env | grep -E '^(NCCL|GLOO)_' | sort; exec sleep 1000";
    let flags = ["--nproc-per-node", "1", "--gpus-per-proc", "1"];
    let id = cluster.submit(&flags, script);
    cluster.wait_for(&id, "RUNNING");
    let ports = "=mlx5_0:1,mlx5_1:1,mlx5_2:1,mlx5_4:1,mlx5_6:1,mlx5_7:1";
    let found = derived(&cluster, &id);
    let here = "lo has this node's address 127.0.0.1, at which the others reach it";
    let why = "6 of 9 ports are active and for training; mlx5_3:1 is DOWN; mlx5_8:1 is not next to a GPU: it is there for \
               storage or management; mlx5_5:1 is Ethernet (RoCE), and the others are InfiniBand: they cannot reach each other";
    let expected = [
        ("NCCL_IB_HCA", ports, "VARIABLE_SOURCE_NODE", why),
        ("NCCL_SOCKET_IFNAME", "=lo", "VARIABLE_SOURCE_NODE", here),
        ("GLOO_SOCKET_IFNAME", "lo", "VARIABLE_SOURCE_NODE", here),
    ];
    let expected = expected.map(|(a, b, c, d)| (a.to_owned(), b.to_owned(), c.to_owned(), d.to_owned()));
    assert_eq!(found, expected);
    let seen = eventually("its output", || {
        let seen = cluster.output(&id, 0);
        if seen.lines().count() == 3 { Ok(seen) } else { Err(seen) }
    });
    assert_eq!(seen, format!("GLOO_SOCKET_IFNAME=lo\nNCCL_IB_HCA={ports}\nNCCL_SOCKET_IFNAME==lo\n"));
    let text = cluster.muster(&["job", &id, "--env"]).ok();
    assert!(text.contains("VARIABLE") && text.contains("mlx5_3:1 is DOWN"), "{text}");

    let own = [&flags[..], &["--env", "NCCL_IB_HCA=mlx5_3", "--env", "NCCL_DEBUG=INFO"]].concat();
    let id = cluster.submit(&own, script);
    cluster.wait_for(&id, "RUNNING");
    let seen = eventually("its output", || {
        let seen = cluster.output(&id, 0);
        if seen.lines().count() == 4 { Ok(seen) } else { Err(seen) }
    });
    assert!(seen.contains("NCCL_IB_HCA=mlx5_3\n") && seen.contains("NCCL_DEBUG=INFO\n"), "{seen}");
    let (_, value, source, why) = derived(&cluster, &id).remove(0);
    assert_eq!((value.as_str(), source.as_str()), ("mlx5_3", "VARIABLE_SOURCE_JOB"));
    assert!(why.starts_with(&format!("set by the user, left as it is; derived was {ports}")), "{why}");
}

#[test]
fn each_rank_has_a_gpu_and_the_processors_next_to_it() {
    let all = processors();
    let [first, .., last] = all.as_slice() else {
        return skip("ranks bound to processors", "this machine lets us use one processor alone");
    };
    let (first, last) = (first.to_string(), last.to_string());
    let (cluster, _machine) = cluster([Rail::Well; 8], [&first, &last]);
    let script =
        "echo $CUDA_VISIBLE_DEVICES $(grep Cpus_allowed_list /proc/self/status | cut -f2); exec sleep 1000";
    // The first takes a part of the first NUMA node, the second needs four that are together.
    let jobs: Vec<String> = ["3", "4"]
        .iter()
        .map(|procs| {
            let id = cluster.submit(&["--nproc-per-node", procs, "--gpus-per-proc", "1"], script);
            cluster.wait_for(&id, "RUNNING");
            id
        })
        .collect();
    let table = [(&jobs[0], [0, 1, 2].as_slice(), &first), (&jobs[1], &[4, 5, 6, 7], &last)];
    for (id, gpus, cpu) in table {
        for (rank, gpu) in (0..).zip(gpus) {
            let expected = format!("{gpu} {cpu}\n");
            eventually("the rank's words", || {
                let seen = cluster.output(id, rank);
                if seen == expected { Ok(()) } else { Err(format!("{seen} instead of {expected}")) }
            });
        }
    }
    let waiting = cluster.submit(&["--nproc-per-node", "2", "--gpus-per-proc", "1"], "true");
    let reason = "waiting: 0 of 1 nodes; n1 refused: 1 of 8 GPUs free, 2 needed";
    assert_eq!(cluster.wait_for(&waiting, "QUEUED")["reason"], reason);
    let bound = cluster.muster(&["job", &jobs[1], "--env"]).ok();
    assert!(bound.contains("NUMA node 1, to which its GPUs are attached"), "{bound}");
    cluster.muster(&["cancel", &jobs[0]]).ok();
    cluster.wait_for(&waiting, "SUCCEEDED");
}

/// What ibstat says of each port: state, rate in Gb/s and link layer.
fn ibstat(program: &Path, machine: &FakeMachine) -> Outcome {
    // Bound over the real one where nobody else sees it.
    let script = "mount --rbind \"$1\" /sys/class && exec \"$2\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(machine.sys.join("class")).arg(program);
    Outcome::of(&mut command)
}

#[test]
fn ibstat_sees_the_same_ports() {
    let Some(program) = ibstat_path() else {
        return skip("the inventory beside ibstat's", "`cargo xtask setup` has brought no ibstat");
    };
    let (cluster, machine) = cluster(MIXED, ["0-31", "32-63"]);
    let outcome = ibstat(&program, &machine);
    if outcome.stderr.contains("unshare") || outcome.stderr.contains("mount") {
        return skip("the inventory beside ibstat's", "this machine lets us mount nothing");
    }
    let text = outcome.ok();
    let mut theirs: Vec<(String, String, String, String)> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("CA '") {
            theirs.push((
                name.trim_end_matches('\'').to_owned(),
                String::new(),
                String::new(),
                String::new(),
            ));
        }
        let (Some(last), Some((key, value))) = (theirs.last_mut(), line.split_once(": ")) else { continue };
        match key {
            "State" => last.1 = value.to_uppercase(),
            "Rate" => last.2 = value.to_owned(),
            "Link layer" => last.3 = value.to_uppercase(),
            _ => {}
        }
    }
    let node = node(&cluster);
    let ours: Vec<(String, String, String, String)> =
        (node["inventory"]["fabricPorts"].as_array().unwrap().iter())
            .map(|port| {
                let text = |name: &str| port[name].as_str().unwrap().to_owned();
                let gbps = port["rateMbps"].as_u64().unwrap() / 1000;
                let state = text("state").trim_start_matches("PORT_STATE_").to_owned();
                (
                    text("device"),
                    state,
                    gbps.to_string(),
                    text("linkLayer").trim_start_matches("LINK_LAYER_").to_owned(),
                )
            })
            .collect();
    theirs.sort();
    assert_eq!(ours.len(), 9);
    assert_eq!(ours, theirs, "{text}");
}
