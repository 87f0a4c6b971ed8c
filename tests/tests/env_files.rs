//! Values that nodes have in files: they reach the ranks and nothing else.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use muster_tests::{Cluster, Settings, eventually};
use serde_json::Value;

const SECRET: &str = "s3cret-7f1c";

/// Every file below a directory that holds a text.
fn files_with(dir: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file()
                && fs::read(entry.path()).unwrap().windows(text.len()).any(|part| part == text.as_bytes())
            {
                found.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn a_value_from_a_file_is_in_the_ranks_environment_and_nowhere_else() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("key");
    fs::write(&file, format!("{SECRET}\n")).unwrap();
    let flag = format!("API_KEY={}", file.display());
    let script = r#"[ "$API_KEY" = "$(cat "$0")" ] && echo it is there; exec sleep 1000"#;
    let submit = ["submit", "--env-file", &flag, "--", "sh", "-c", script, file.to_str().unwrap()];
    let id = cluster.muster(&submit).ok().trim().to_owned();
    let job = cluster.wait_for(&id, "RUNNING");
    assert_eq!(job["spec"]["envFiles"]["API_KEY"], file.to_str().unwrap(), "{job}");
    eventually("the rank's word", || {
        let said = cluster.output(&id, 0);
        if said == "it is there\n" { Ok(()) } else { Err(said) }
    });
    let shown = cluster.muster(&["job", &id, "--env"]).ok();
    assert!(shown.contains(&format!("API_KEY from {}", file.display())), "{shown}");
    assert_eq!(
        files_with(cluster.dir.path(), SECRET),
        Vec::<PathBuf>::new(),
        "it is stored and logged nowhere"
    );
    cluster.muster(&["cancel", &id]).ok();

    for (held, words) in [(None, "No such file"), (Some(&b"a\0b"[..]), "a NUL byte")] {
        match held {
            Some(held) => fs::write(&file, held).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let id = cluster.submit(&["--env-file", &flag, "--max-restarts", "3"], "true");
        let job = cluster.wait_for(&id, "FAILED");
        let reason = job["reason"].as_str().unwrap();
        assert!(reason.contains("variable API_KEY is to come from") && reason.contains(words), "{job}");
        assert_eq!(
            (&job["generation"], &job["started"]),
            (&1.into(), &Value::Null),
            "nothing was started: {job}"
        );
    }
    let twice = cluster.muster(&["submit", "--env", "API_KEY=1", "--env-file", &flag, "--", "true"]);
    assert!(twice.code != 0 && twice.stderr.contains("is in env too"), "{twice:?}");
}
