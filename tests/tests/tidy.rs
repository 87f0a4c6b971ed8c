//! House rules that no compiler checks.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Longest source file, in lines; beyond it a file has two stories.
const LINES_MAX: usize = 420;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Direct dependencies of each workspace crate, without those for tests and builds.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        all.filter(|d| d["kind"].is_null()).map(|d| d["name"].as_str().unwrap().to_owned()).collect()
    };
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(|package| (package["name"].as_str().unwrap().to_owned(), of(package))).collect()
}

/// Everything a crate needs within the workspace, itself included.
fn closure(all: &BTreeMap<String, BTreeSet<String>>, start: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![start.to_owned()];
    while let Some(name) = open.pop() {
        if seen.insert(name.clone()) {
            open.extend(all.get(&name).into_iter().flatten().cloned());
        }
    }
    seen
}

#[test]
fn only_those_import_who_may() {
    let all = dependencies();
    let users = |library: &str| -> Vec<&str> {
        all.iter().filter(|(_, needs)| needs.contains(library)).map(|(name, _)| name.as_str()).collect()
    };
    assert_eq!(users("redb"), ["muster-store"]);
    // The load generator measures etcd alone, beside what we make of it.
    assert_eq!(users("etcd-client"), ["muster-reconnect", "muster-store"]);
    for library in ["tch", "torch-sys"] {
        let allowed = ["c10d-sys", "muster-ddp", "muster-trainer"];
        assert!(users(library).iter().all(|user| allowed.contains(user)), "{library}: {:?}", users(library));
    }
    let store = closure(&all, "muster-tcpstore");
    let of_ours: Vec<&String> = store.iter().filter(|name| name.starts_with("muster-")).collect();
    // The list of its decoders is in no build that is shipped.
    assert_eq!(
        of_ours,
        ["muster-decoders", "muster-tcpstore"],
        "the store of the ranks knows nothing of Muster"
    );
    assert!(!store.contains("tch") && !store.contains("tonic"), "it speaks torch's protocol, without torch");
    for forbidden in ["tokio", "tonic", "prost", "muster-proto"] {
        assert!(!closure(&all, "muster-core").contains(forbidden), "the core knows no {forbidden}");
    }
    for daemon in ["muster-coordinator", "muster-worker", "muster-cli"] {
        let needs = closure(&all, daemon);
        assert!(!needs.contains("tch") && !needs.contains("muster-ddp"), "{daemon} never links libtorch");
    }
    assert!(!closure(&all, "muster-worker").contains("muster-coordinator"), "the worker knows only the API");
    assert!(
        !all["muster-tests"].iter().any(|name| name.starts_with("muster-")),
        "tests link no code under test"
    );
}

fn sources() -> Vec<(String, String)> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
        .current_dir(root())
        .output()
        .unwrap();
    let names = String::from_utf8(listed.stdout).unwrap();
    let read = |name: &str| Some((name.to_owned(), std::fs::read_to_string(root().join(name)).ok()?));
    names.lines().filter_map(read).collect()
}

#[test]
fn every_file_keeps_the_house_rules() {
    let mut broken = Vec::new();
    let sources = sources();
    assert!(sources.len() > 50, "the sources were found: {}", sources.len());
    for (name, text) in &sources {
        let mut rule = |ok: bool, what: &str| {
            if !ok {
                broken.push(format!("{name}: {what}"));
            }
        };
        rule(text.starts_with("//!"), "opens with what it owns");
        rule(text.lines().count() <= LINES_MAX, "is too long");
        rule(text.lines().all(|line| line.chars().count() <= 140), "has a line that is too long");
        let unsafe_is_allowed = name.starts_with("worker/src/launch/") || name.contains("c10d-sys/");
        let block = ["unsafe", " {"].concat();
        let says_unsafe = text.lines().any(|l| l.trim_start().starts_with("unsafe ") || l.contains(&block));
        rule(unsafe_is_allowed || !says_unsafe, "has unsafe code");
        let marks = ["TO", "DO"].concat();
        rule(!text.contains(&marks), "has work left over");
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
