//! The first job of `deploy/README.md`, as far as it goes without GPUs: over Gloo, on two nodes.

use muster_tests::{Cluster, Settings, deployed, skip, torch_python};

#[test]
fn the_first_job_checks_and_measures() {
    let Some(python) = torch_python() else {
        return skip(
            "deploy/nccl_check.py",
            "no Python with torch is here; cargo xtask setup --python brings one",
        );
    };
    let cluster = Cluster::start(Settings::default());
    // Not canonical: a virtual environment is known by where its link is.
    let python = std::path::absolute(python).unwrap();
    let script = deployed("nccl_check.py").canonicalize().unwrap();
    let submit = |more: &[&str]| {
        let flags = ["submit", "--nnodes", "2", "--nproc-per-node", "2", "--", python.to_str().unwrap()];
        let script = [script.to_str().unwrap(), "--max-bytes", "65536", "--repeat", "2"];
        cluster.muster(&[&flags[..], &script, more].concat()).ok().trim().to_owned()
    };
    let id = submit(&[]);
    cluster.wait_for(&id, "SUCCEEDED");
    let said = cluster.output(&id, 0);
    assert!(said.starts_with("4 ranks over gloo"), "{said}");
    assert!(said.ends_with("every sum is right\n"), "{said}");
    // 1, 4, 16 and 64 KiB.
    let points = cluster.muster(&["metrics", &id, "--output", "json"]).json();
    assert_eq!(points.len(), 4, "{points:?}");

    let slow = submit(&["--min-gbytes", "1000000"]);
    let job = cluster.wait_for(&slow, "FAILED");
    assert_eq!(job["exit"]["code"], 1, "{job}");
}
