//! The images of deploy/docker, built by buildah and run. What is built inside them is built outside here: no registry is asked.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use muster_tests::{
    Buildah, Cluster, Netns, Outcome, Settings, binary, eventually, grpcurl_path, is_running, processes_with,
    skip,
};

/// What the coordinator's image may weigh.
const BYTES_MAX: u64 = 30_000_000;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// As `cargo xtask test` builds it: with musl, as the Dockerfile does, or else with a static glibc.
fn static_muster() -> Option<PathBuf> {
    let target = binary("muster").parent().unwrap().parent().unwrap().to_owned();
    let built = |name: &&str| target.join(format!("x86_64-unknown-linux-{name}/image/muster"));
    ["musl", "gnu"].iter().map(built).find(|path| path.is_file())
}

#[test]
fn hadolint_has_nothing_to_say() {
    let hadolint = root().join(".deps/bin/hadolint");
    if !hadolint.is_file() {
        return skip("the Dockerfile's style", "`cargo xtask setup --tools` has brought no hadolint");
    }
    let outcome = Outcome::of(Command::new(hadolint).arg(root().join("deploy/docker/Dockerfile")));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""), "{outcome:?}");
}

#[test]
fn the_coordinator_is_small_and_serves_without_root() {
    let buildah = match Buildah::new() {
        Ok(buildah) => buildah,
        Err(why) => return skip("the coordinator's image", &why),
    };
    let Some(muster) = static_muster() else {
        return skip("the coordinator's image", "`cargo xtask test` has built no static muster");
    };
    let image = buildah.build("coordinator", "static", &muster, &[]);
    let bytes = buildah.bytes(&image);
    assert!(bytes <= BYTES_MAX, "the image has {bytes} bytes");

    // As the image is, on a host whose ports are all free.
    let Some(netns) = Netns::new(1) else {
        return skip("the coordinator's image", "this machine lets us make no network namespaces");
    };
    let container = buildah.start(&image, &[], Some((&netns, 0)));
    let status = std::fs::read_to_string(format!("/proc/{}/status", container.first)).unwrap();
    let field = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(field("Uid:").ends_with("65532"), "{status}");
    assert!(field("NSpid:").ends_with("\t1"), "it is the first process of its namespace: {status}");

    // No flag is needed.
    let probe: Vec<String> =
        serde_json::from_value(buildah.config(&image)["Healthcheck"]["Test"].clone()).unwrap();
    let probe: Vec<&str> = probe.iter().map(String::as_str).collect();
    assert_eq!(probe[0], "CMD");
    eventually("the consent of the image's own probe", || {
        let outcome = container.exec(&probe[1..]);
        if outcome.code == 0 { Ok(()) } else { Err(outcome) }
    });
    eventually("a coordinator that leads", || {
        let outcome = container.exec(&["muster", "nodes", "--output", "json"]);
        if outcome.code == 0 { Ok(()) } else { Err(outcome) }
    });
    if let Some(grpcurl) = grpcurl_path() {
        let prefix = netns.prefix(0);
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(grpcurl).args(["-plaintext", "127.0.0.1:7070", "list"]);
        assert!(Outcome::of(&mut command).ok().contains("muster.v1.JobService"));
    }
    let first = container.first;
    assert_eq!(container.stop(), Some(0), "SIGTERM ends it, though it is process 1");
    assert!(!is_running(first));
}

#[test]
fn the_worker_runs_jobs_on_whatever_it_is_built_on() {
    let buildah = match Buildah::new() {
        Ok(buildah) => buildah,
        Err(why) => return skip("the worker's image", &why),
    };
    let base = format!("WORKER_BASE={}", buildah.base());
    let image = buildah.build("worker", "dynamic", &binary("muster"), &["--build-arg", &base]);
    // The image's user, who has no name here.
    let cluster = Cluster::start(Settings { workers: 0, loopback_users: "65532", ..Settings::default() });
    let url = cluster.url();
    let container = buildah.start(&image, &["--coordinator", &url, "--name", "boxed"], None);
    let script = "echo rank $RANK of $WORLD_SIZE runs beside $(cat /proc/1/comm)";
    let outcome = cluster.muster(&["submit", "--nproc-per-node", "2", "--follow", "--", "sh", "-c", script]);
    assert!(outcome.stdout.contains("rank 0 of 2 runs beside muster"), "{outcome:?}\n{}", container.log());

    let mark = format!("sleep 98{}", container.first);
    let outcome = cluster.muster(&["submit", "--", "sh", "-c", &format!("exec {mark}")]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    eventually("the rank", || if processes_with(&mark).is_empty() { Err(container.log()) } else { Ok(()) });
    assert_eq!(container.stop(), Some(0), "SIGTERM ends it, though it is process 1");
    assert!(processes_with(&mark).is_empty(), "its ranks have ended with it");
    let jobs = cluster.muster(&["jobs", "--output", "json"]).json();
    let waits =
        jobs.iter().find(|job| job["state"] == "JOB_STATE_QUEUED" || job["state"] == "JOB_STATE_RESTARTING");
    assert!(waits.is_some(), "the job waits for another node: {jobs:?}");
}
