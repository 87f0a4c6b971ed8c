//! Text of users, nodes and ranks reaches terminals and logs as text alone.

use muster_tests::{Cluster, Settings, eventually, python};

/// A line's end, a forged line, and what moves cursors or turns letters around, as `printf` takes it.
const HOSTILE: &str = "x\\nFORGED line\\r\\033[2J\\302\\233\\342\\200\\250\\342\\200\\256";

/// The same as bytes.
fn hostile() -> String {
    "x\nFORGED line\r\x1b[2J\u{9b}\u{2028}\u{202e}".to_owned()
}

/// Fails if a text has a control character besides line ends, or a line of its own that others wrote.
fn check(what: &str, text: &str) {
    let controls = |c: char| c != '\n' && (c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c));
    assert!(!text.contains(controls), "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("FORGED")), "{what}: {text}");
}

#[test]
fn nobody_writes_lines_on_anothers_terminal_or_into_a_log() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let reason = hostile();
    let point = r#"
import json, os, socket
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["MUSTER_TELEMETRY"])
s.sendall((json.dumps({"step": 1, "values": {"a\x1b[2J\u009b\u202e\nFORGED": 2.0}}) + "\n").encode())
"#;
    let point = format!("{} -c '{point}'", python());
    let script = format!("{point}; printf '{HOSTILE}'; printf '{HOSTILE}' >&2; exit 3");
    let failed = cluster.submit(&[], &script);
    cluster.wait_for(&failed, "FAILED");
    let running = cluster.submit(&[], "exec sleep 1000");
    cluster.wait_for(&running, "RUNNING");
    let cancelled = cluster.muster(&["cancel", &running, "--reason", &reason]).ok();
    assert!(cancelled.contains("x\\nFORGED line\\r\\x1b[2J\\u{9b}\\u{2028}\\u{202e}"), "{cancelled}");
    cluster.wait_for(&running, "CANCELLED");
    cluster.muster(&["cordon", "n1", "--reason", &reason]).ok();
    let followed = cluster.muster(&["submit", "--dry-run", "--", "true"]);
    check("submit --dry-run", &(followed.stdout + &followed.stderr));
    for id in [&failed, &running] {
        for command in [
            &["job", id][..],
            &["explain", id],
            &["logs", id],
            &["metrics", id],
            &["job", id, "--output", "json"],
            &["metrics", id, "--output", "json"],
            &["jobs"],
            &["jobs", "--output", "json"],
            &["node", "n1"],
            &["nodes"],
            &["nodes", "--output", "json"],
            &["cancel", &reason],
            &["node", &reason],
        ] {
            let outcome = cluster.muster(command);
            check(&command.join(" "), &(outcome.stdout + &outcome.stderr));
        }
    }
    assert_eq!(cluster.output(&failed, 0), hostile(), "one rank's output is shown as it is");
    eventually("the point is there", || {
        let metrics = cluster.muster(&["metrics", &failed]).ok();
        if metrics.contains("FORGED") { Ok(()) } else { Err(metrics) }
    });
    let metrics = cluster.muster(&["metrics", &failed]).ok();
    check("metrics", &metrics);
    let log = cluster.coordinator.log();
    assert!(log.contains("FORGED"), "reasons are logged: {log}");
    check("the coordinator's log", &log);
    for worker in &cluster.workers {
        check("the worker's log", &worker.log());
    }
}
