//! The audit's file: which object was changed, by whom, and what came of it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use muster_tests::{Cluster, Settings, eventually, user};
use serde_json::Value;

/// The line about a method's call on an object, once it is there.
fn line(path: &Path, method: &str, object: &str) -> Value {
    eventually("the audit's line", || {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let is_it =
            |line: &Value| line["method"].as_str().unwrap().ends_with(method) && line["object"] == object;
        lines.into_iter().find(is_it).ok_or(text)
    })
}

#[test]
fn changes_are_recorded_with_their_objects_and_reads_are_not() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let file = cluster.dir.path().join("coordinator/audit.jsonl");
    let id = cluster.submit(&[], "exec sleep 1000");
    cluster.muster(&["job", &id]).ok();
    cluster.muster(&["cancel", &id, "--reason", "wrong data"]).ok();
    cluster.muster(&["cordon", "n1"]).ok();
    cluster.muster(&["uncordon", "n2"]);
    let (job, who) = (format!("job:{id}"), format!("user:{}", user()));
    for (method, object, outcome) in [
        ("SubmitJob", job.as_str(), "Ok"),
        ("CancelJob", &job, "Ok"),
        ("CordonNode", "node:n1", "Ok"),
        ("UncordonNode", "node:n2", "NotFound"),
    ] {
        let line = line(&file, method, object);
        assert_eq!((&line["outcome"], &line["who"]), (&outcome.into(), &who.clone().into()), "{line}");
        assert!(line["from"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    }
    assert!(!std::fs::read_to_string(&file).unwrap().contains("GetJob"));
}
