//! GPUs as the driver's library tells of them: the real loading of it and the real questions, with a library of our own in
//! the place of NVIDIA's, for there is no GPU here.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use muster_tests::{Cluster, Daemon, Outcome, Place, Settings, eventually, lines};
use serde_json::Value;

fn library(dir: &Path) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fake/nvml.c");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(dir.join("libnvidia-ml.so.1")).arg(source);
    Outcome::of(&mut cc).ok();
    format!("LD_LIBRARY_PATH={}", dir.display())
}

/// A cluster of one node whose driver says what is written with [`Machine::say`].
struct Machine {
    cluster: Cluster,
}

impl Machine {
    fn start(gpus: &str) -> Self {
        let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
        let mut this = Self { cluster };
        this.say(gpus);
        let dir = this.cluster.dir.path().to_owned();
        let state = format!("FAKE_NVML={}", dir.join("gpus").display());
        let prefix = ["env".to_owned(), library(&dir), state];
        let (url, data) = (this.cluster.url(), dir.join("n1").display().to_string());
        let args = ["worker", "--coordinator", &url, "--name", "n1", "--data-dir", &data];
        let args = [&args[..], &["--health-interval", "50ms"]].concat();
        this.cluster.workers.push(Daemon::start_behind(&prefix, &dir, "n1", &args));
        this.cluster.wait_for_nodes(1);
        this
    }

    /// What the driver says from now on.
    fn say(&self, text: &str) {
        let dir = self.cluster.dir.path();
        // Renamed, so that nobody reads half of it.
        std::fs::write(dir.join("gpus.new"), text).unwrap();
        std::fs::rename(dir.join("gpus.new"), dir.join("gpus")).unwrap();
    }
}

#[test]
fn the_drivers_library_is_loaded_and_what_it_says_is_believed() {
    let machine = Machine::start("well 0\nwell 0\nwell 0\n");
    let cluster = &machine.cluster;
    let node = || cluster.muster(&["node", "n1", "--output", "json"]).json().remove(0);
    let found = node()["inventory"].clone();
    assert_eq!(
        (&found["driverVersion"], &found["cudaVersion"]),
        (&"570.1".into(), &"12.8".into()),
        "{found}"
    );
    let second = serde_json::json!({
        "index": 1,
        "uuid": "GPU-fake-1",
        "model": "NVIDIA Fake",
        "memoryBytes": (80_u64 << 30).to_string(),
        "pciAddress": "0000:1b:00.0",
    });
    let fields = |gpu: &Value| {
        let known = gpu
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, value)| value.as_str() != Some("") && !value.is_array());
        known.map(|(key, value)| (key.clone(), value.clone())).collect::<serde_json::Map<_, _>>()
    };
    assert_eq!(found["gpus"].as_array().unwrap().len(), 3);
    assert_eq!(Value::Object(fields(&found["gpus"][1])), second);

    // Jobs name the model by words of its name, and what is not there is said.
    for flags in [["--gpu-model", "fake"], ["--node-selector", "gpu-model=nvidia FAKE"]] {
        let id = cluster.submit(&[&flags[..], &["--nproc-per-node", "auto"]].concat(), "true");
        assert_eq!(cluster.wait_for(&id, "SUCCEEDED")["worldSize"], 3);
    }
    let id = cluster.submit(&["--gpu-model", "H100", "--gpus-per-proc", "1"], "true");
    cluster.wait_for(&id, "QUEUED");
    let why = cluster.muster(&["explain", &id]).ok();
    let words = "no node has GPUs \"H100\", known are NVIDIA Fake; n1 refused: its GPUs are \"NVIDIA Fake\", not \"H100\"";
    assert!(why.contains(words), "{why}");
    cluster.muster(&["cancel", &id]).ok();

    // One is lost, another has memory that cannot be trusted; what is left is given out.
    machine.say("well 0\nlost 0\nwell 2\n");
    let faults = eventually("the faults", || {
        let node = node();
        let all = node["inventory"]["gpus"].as_array().cloned().unwrap_or_default();
        let fault = |gpu: &Value| gpu["fault"].as_str().unwrap_or_default().to_owned();
        let faults: Vec<String> = all.iter().map(fault).filter(|fault| !fault.is_empty()).collect();
        if faults.len() == 2 { Ok(faults) } else { Err(node) }
    });
    assert!(faults[0].starts_with("the driver cannot speak to it: "), "{faults:?}");
    assert!(faults[1].starts_with("2 memory errors that could not be corrected; reset it"), "{faults:?}");
    let id = cluster.submit(&["--gpus-per-proc", "1"], "echo $CUDA_VISIBLE_DEVICES");
    cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!(cluster.output(&id, 0), "0\n");
}

#[test]
fn parts_of_gpus_are_gpus_by_their_names() {
    let machine = Machine::start("mig 2\nwell 0\n");
    let cluster = &machine.cluster;
    let gpus = || {
        let node = cluster.muster(&["node", "n1", "--output", "json"]).json().remove(0);
        node["inventory"]["gpus"].as_array().cloned().unwrap_or_default()
    };
    let told: Vec<_> =
        gpus().iter().map(|gpu| format!("{} {} {}", gpu["index"], gpu["uuid"], gpu["model"])).collect();
    let expected = [
        r#"100 "MIG-fake-0-0" "NVIDIA Fake MIG 1g.10gb""#,
        r#"101 "MIG-fake-0-1" "NVIDIA Fake MIG 1g.10gb""#,
        r#"1 "GPU-fake-1" "NVIDIA Fake""#,
    ];
    assert_eq!(told, expected);
    assert_eq!(
        (&gpus()[0]["memoryBytes"], &gpus()[0]["pciAddress"]),
        (&"10737418240".into(), &"0000:1a:00.0".into())
    );
    // As many ranks as there are, each with its own, which CUDA knows by its name.
    let id = cluster.submit(&["--nproc-per-node", "auto"], "echo $CUDA_VISIBLE_DEVICES");
    assert_eq!(cluster.wait_for(&id, "SUCCEEDED")["worldSize"], 3);
    let mut seen: Vec<String> = (0..3).map(|rank| cluster.output(&id, rank).trim().to_owned()).collect();
    seen.sort();
    assert_eq!(seen, ["GPU-fake-1", "MIG-fake-0-0", "MIG-fake-0-1"]);

    machine.say("mig 0\nwell 0\n");
    let fault = eventually("the fault", || {
        let gpus = gpus();
        let fault = gpus[0]["fault"].as_str().unwrap_or_default().to_owned();
        if gpus.len() == 2 && !fault.is_empty() { Ok(fault) } else { Err(gpus) }
    });
    assert!(fault.starts_with("it is to be divided (MIG) and has no parts; make some"), "{fault}");
    let health = eventually("the verdict", || {
        let health = cluster.muster(&["node", "n1", "--output", "json"]).json().remove(0)["health"].take();
        if health["verdict"] == "HEALTH_VERDICT_DEGRADED" { Ok(health) } else { Err(health) }
    });
    assert!(!health.to_string().contains("is gone"), "what was divided otherwise is there: {health}");
}

#[test]
fn a_run_counts_the_parts_of_gpus_that_it_is_given() {
    let place = Place::new();
    let script = place.script("echo $LOCAL_RANK $CUDA_VISIBLE_DEVICES");
    let run = |visible: &str, flags: &[&str]| {
        let args = [flags, &["--no-python", &script]].concat();
        let outcome = Outcome::of(place.command(&args).env("CUDA_VISIBLE_DEVICES", visible));
        assert_eq!(outcome.code, 0, "{outcome:?}");
        lines(&outcome.stdout).into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let parts = "MIG-7a, MIG-GPU-8f/1/0";
    for kind in ["auto", "gpu"] {
        assert_eq!(run(parts, &["--nproc-per-node", kind]), ["0 MIG-7a", "1 MIG-GPU-8f/1/0"], "{kind}");
    }
    assert_eq!(run("MIG-7a", &["--nproc-per-node", "auto"]), ["0 MIG-7a"]);
    let one = ["--nproc-per-node", "2", "--virtual-local-rank"];
    assert_eq!(run("MIG-a,MIG-b", &one), ["0 MIG-a", "0 MIG-b"]);
    // More ranks than parts share them as torchrun has it, and whole GPUs are left as they are.
    assert_eq!(run("MIG-a,MIG-b", &["--nproc-per-node", "3"])[2], "2 MIG-a,MIG-b");
    assert_eq!(run("0,1", &["--nproc-per-node", "2"]), ["0 0,1", "1 0,1"]);
}
