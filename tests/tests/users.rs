//! Ranks of a daemon that is root run as whom they are to: what they may do, what they find, and who may say so.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use muster_tests::{Cluster, Daemon, Outcome, Settings, binary, skip};
use nix::unistd::{Uid, User};

/// One that every user may run, which that of whoever runs the tests need not be.
const PYTHON: &str = "/usr/bin/python3";
/// The only user that every machine has and that is not the system's own.
const USER: &str = "nobody";

/// A cluster whose ranks reach what is theirs; none, and said so, where nobody can be somebody else.
fn cluster() -> Option<Cluster> {
    if !Uid::effective().is_root() {
        skip("ranks of other users", "only root can start them");
        return None;
    }
    let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    std::fs::set_permissions(cluster.dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    Some(cluster)
}

fn with_worker(cluster: &mut Cluster, flags: &[&str]) {
    let worker = cluster.spawn_worker_with("n1", "n1", flags);
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
}

/// Says who it is, while its neighbour waits to be ended; reports a point, leaves a file where it starts, and fails in words.
const PROGRAM: &str = r#"
import json, os, socket, time
if os.environ["RANK"] == "1":
    time.sleep(1000)
print(os.getresuid(), os.getresgid(), sorted(os.getgroups()), os.getcwd())
print(*(os.environ[name] for name in ("HOME", "USER", "LOGNAME")))
print(open("/proc/self/status").read().split("CapEff:")[1].split()[0])
open("left", "w").close()
for path in (os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"]), os.path.dirname(os.environ["MUSTER_TELEMETRY"])):
    try:
        open(path + "/mine", "w")
        print("could write to", path)
    except PermissionError:
        pass
telemetry = socket.socket(socket.AF_UNIX)
telemetry.connect(os.environ["MUSTER_TELEMETRY"])
telemetry.sendall(json.dumps({"step": 3, "values": {"loss": 1.5}}).encode() + b"\n")
telemetry.close()
json.dump({"message": "it fails as it should"}, open(os.environ["TORCHELASTIC_ERROR_FILE"], "w"))
raise SystemExit(3)
"#;

#[test]
fn ranks_are_who_they_are_to_be_and_nobody_else() {
    let Some(mut cluster) = cluster() else { return };
    if !std::path::Path::new(PYTHON).exists() {
        return skip("what ranks of another user may do", "there is no Python of the system's");
    }
    with_worker(&mut cluster, &[]);
    let user = User::from_name(USER).unwrap().unwrap();
    let groups = Outcome::of(Command::new("id").args(["-G", USER])).ok();
    let groups: Vec<&str> = groups.split_whitespace().collect();
    let submit = ["submit", "--run-as", USER, "--nproc-per-node", "2", "--", PYTHON, "-c", PROGRAM];
    let id = cluster.muster(&submit).ok().trim().to_owned();
    let job = cluster.wait_for(&id, "FAILED");
    assert!(job["reason"].as_str().unwrap().contains("it fails as it should"), "{job}");
    assert_eq!((&job["spec"]["runAs"], &job["latestStep"]), (&USER.into(), &"3".into()), "{job}");
    let said = cluster.output(&id, 0);
    let lines: Vec<&str> = said.lines().collect();
    let (uid, gid) = (user.uid, user.gid);
    let cwd = cluster.dir.path().join(format!("n1/logs/{id}/attempt_1/0/work"));
    let who = format!(
        "({uid}, {uid}, {uid}) ({gid}, {gid}, {gid}) [{}] {}",
        groups.join(", "),
        cwd.canonicalize().unwrap().display()
    );
    let env = format!("{} {USER} {USER}", user.dir.display());
    assert_eq!(lines, [who.as_str(), &env, "0000000000000000"], "{said}");
    assert!(cwd.join("left").exists());
    let shown = cluster.muster(&["job", &id]).ok();
    assert!(shown.contains(&format!("runs as     {USER}")), "{shown}");
}

/// Returns the capabilities that Kubernetes' manifests give to a daemon that is root.
fn manifest_capabilities() -> Vec<String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let manifest = root.join("deploy/kubernetes/components/tls/kustomization.yaml");
    let manifest = std::fs::read_to_string(manifest).unwrap();
    let added = manifest.split("add: [").nth(1).and_then(|rest| rest.split(']').next()).unwrap();
    added.split(", ").map(|name| format!("+{}", name.to_lowercase())).collect()
}

#[test]
fn a_daemon_with_the_powers_that_kubernetes_gives_keeps_its_secrets_from_its_ranks() {
    let Some(mut cluster) = cluster() else { return };
    let powers = format!("--bounding-set=-all,{}", manifest_capabilities().join(","));
    let prefix = ["setpriv", &powers, "--inh-caps=-all", "--no-new-privs"].map(str::to_owned);
    let data_dir = cluster.dir.path().join("n1");
    let secret = cluster.dir.path().join("token");
    std::fs::write(&secret, "secret").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o400)).unwrap();
    let (url, data) = (cluster.url(), data_dir.to_str().unwrap());
    let args = [
        "worker",
        "--coordinator",
        &url,
        "--name",
        "n1",
        "--data-dir",
        data,
        "--run-as",
        USER,
        "--http-listen",
        "off",
    ];
    cluster.workers.push(Daemon::start_behind(&prefix, cluster.dir.path(), "n1", &args));
    cluster.wait_for_nodes(1);
    let script = format!(
        "id -un; cat {} /proc/$PPID/environ; ls {data}; echo left > file; grep CapEff /proc/self/status",
        secret.display()
    );
    let id = cluster.submit(&[], &script);
    cluster.wait_for(&id, "SUCCEEDED");
    let said = cluster.output(&id, 0);
    assert_eq!(said.lines().collect::<Vec<_>>(), [USER, "CapEff:\t0000000000000000"], "{said}");
    let refused = cluster.muster(&["logs", &id, "--stream", "stderr"]);
    let refused = refused.stdout + &refused.stderr;
    assert_eq!(refused.matches("Permission denied").count(), 3, "{refused}");
    // One that does not end by itself is ended.
    let id = cluster.submit(&["--stop-grace", "100ms"], "trap '' TERM; while true; do sleep 1; done");
    cluster.wait_for(&id, "RUNNING");
    cluster.muster(&["cancel", &id]).ok();
    cluster.wait_for(&id, "CANCELLED");
}

#[test]
fn a_node_has_a_user_for_its_ranks_and_refuses_what_is_not_for_jobs() {
    let Some(mut cluster) = cluster() else { return };
    // A node may name one that is the system's own; a job may not.
    with_worker(&mut cluster, &["--run-as", "daemon"]);
    let id = cluster.submit(&[], "id -un; trap '' TERM; kill -0 $PPID && exit 1; exit 0");
    cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!(cluster.output(&id, 0).lines().next(), Some("daemon"), "and it cannot signal its shim");
    for (user, words) in
        [("root", "the system's own"), ("bin", "the system's own"), ("no.one", "no such user")]
    {
        let id = cluster.submit(&["--run-as", user], "true");
        let reason = cluster.wait_for(&id, "FAILED")["reason"].clone();
        assert!(reason.as_str().unwrap().contains(words), "{user}: {reason}");
    }
    let refused = cluster.muster(&["submit", "--run-as", "a/b", "--", "true"]);
    assert!(
        refused.code != 0 && refused.stderr.contains("run_as: name of a user contains '/'"),
        "{refused:?}"
    );
    let data_dir = cluster.dir.path().join("n2");
    let args = ["worker", "--coordinator", &cluster.url(), "--data-dir", data_dir.to_str().unwrap()];
    let refused = Outcome::of(Command::new(binary("muster")).args(args).args(["--run-as", "no.one"]));
    assert!(refused.code == 1 && refused.stderr.contains("no such user"), "{refused:?}");
    // Somebody who may not go where his logs are.
    std::fs::set_permissions(cluster.dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let id = cluster.submit(&["--run-as", USER], "true");
    let reason = cluster.wait_for(&id, "FAILED")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("cannot pass through"), "{reason}");
}
