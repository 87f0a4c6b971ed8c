//! GPUs as the driver's library tells of them: the real loading of it and the real questions, with a library of our own in
//! the place of NVIDIA's, for there is no GPU here.

use std::path::Path;
use std::process::Command;

use muster_tests::{Cluster, Daemon, Outcome, Settings, eventually};
use serde_json::Value;

fn library(dir: &Path) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fake/nvml.c");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(dir.join("libnvidia-ml.so.1")).arg(source);
    Outcome::of(&mut cc).ok();
    format!("LD_LIBRARY_PATH={}", dir.display())
}

#[test]
fn the_drivers_library_is_loaded_and_what_it_says_is_believed() {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let dir = cluster.dir.path().to_owned();
    let state = dir.join("gpus");
    let say = |text: &str| {
        // Renamed, so that nobody reads half of it.
        std::fs::write(dir.join("gpus.new"), text).unwrap();
        std::fs::rename(dir.join("gpus.new"), &state).unwrap();
    };
    say("well 0\nwell 0\nwell 0\n");
    let prefix = ["env".to_owned(), library(&dir), format!("FAKE_NVML={}", state.display())];
    let (url, data) = (cluster.url(), dir.join("n1").display().to_string());
    let args =
        ["worker", "--coordinator", &url, "--name", "n1", "--data-dir", &data, "--health-interval", "50ms"];
    cluster.workers.push(Daemon::start_behind(&prefix, &dir, "n1", &args));
    cluster.wait_for_nodes(1);
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
    say("well 0\nlost 0\nwell 2\n");
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
