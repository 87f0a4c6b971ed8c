//! Data directories: nobody but their daemon's user reads or writes them, and a rank's logs are its user's.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use muster_tests::{Cluster, Daemon, Outcome, Settings, address_of, binary, eventually, skip};
use nix::unistd::{Uid, User};

/// Everything below a directory.
fn walk(dir: &Path, see: &mut impl FnMut(&Path, &fs::Metadata)) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        // The daemons go on making and removing files.
        let Ok(meta) = fs::symlink_metadata(entry.path()) else { continue };
        see(&entry.path(), &meta);
        if meta.is_dir() {
            walk(&entry.path(), see);
        }
    }
}

#[test]
fn whatever_the_umask_others_read_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let open = ["sh", "-c", "umask 000; exec \"$0\" \"$@\""].map(str::to_owned);
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, node, link) = (path("data/c"), path("data/n"), path("link"));
    std::os::unix::fs::symlink(dir.path().join("data"), &link).unwrap();
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--http-listen", "off", "--data-dir", &data];
    let coordinator = Daemon::start_behind(&open, dir.path(), "coordinator", &args);
    let url = format!("http://{}", address_of(&coordinator));
    let linked = format!("{link}/n");
    let args = ["worker", "--coordinator", &url, "--name", "n1", "--data-dir", &linked];
    let worker = Daemon::start_behind(&open, dir.path(), "worker", &args);
    let muster = |args: &[&str]| {
        Outcome::of(Command::new(binary("muster")).args(args).env("MUSTER_COORDINATOR", &url))
    };
    eventually("the node", || {
        let nodes = muster(&["nodes"]).ok();
        if nodes.contains("ready") { Ok(()) } else { Err((nodes, worker.log())) }
    });
    muster(&["submit", "--follow", "--", "sh", "-c", "umask; echo out; touch made"]).ok();
    let mut seen = Vec::new();
    for dir in [&data, &node] {
        walk(Path::new(dir), &mut |path, meta| {
            let mode = meta.mode() & 0o777;
            // Ranks of other users pass through directories to what is theirs.
            let allowed = if meta.is_dir() && Uid::effective().is_root() { 0o711 } else { 0o700 };
            // What a rank made; and what is in a directory through which nobody else passes.
            let by_rank = path.ends_with("made") || path.starts_with(format!("{node}/run"));
            assert!(meta.is_symlink() || by_rank || mode & !allowed == 0, "{mode:o} {}", path.display());
            seen.push(path.to_owned());
        });
    }
    let kept = ["store.redb", "audit.jsonl", "muster.sock", "stdout.log", "shim.log", "worker.lock"];
    for name in kept {
        assert!(seen.iter().any(|path| path.ends_with(name)), "{name} is not among {seen:#?}");
    }
    let made = seen.iter().find(|path| path.ends_with("made")).unwrap();
    assert_eq!(fs::metadata(made).unwrap().mode() & 0o777, 0o666, "ranks have the daemon's umask");
    assert!(!worker.log().contains("others can put"), "{}", worker.log());
}

#[test]
fn a_directory_that_others_may_write_starts_no_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::set_permissions(&data, Permissions::from_mode(0o777)).unwrap();
    for daemon in [
        &["coordinator", "--listen", "127.0.0.1:0", "--http-listen", "off"][..],
        &["worker", "--coordinator", "http://127.0.0.1:1", "--name", "n1"],
    ] {
        let refused = Outcome::of(Command::new(binary("muster")).args(daemon).arg("--data-dir").arg(&data));
        assert_eq!(refused.code, 1, "{refused:?}");
        assert!(refused.stderr.contains("others may write to the data directory"), "{refused:?}");
        assert_eq!(fs::read_dir(&data).unwrap().count(), 0, "nothing is made there");
    }
}

#[test]
fn a_ranks_logs_belong_to_its_user() {
    if !Uid::effective().is_root() {
        return skip("logs of other users", "only root can start their ranks");
    }
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    fs::set_permissions(cluster.dir.path(), Permissions::from_mode(0o711)).unwrap();
    let id = cluster.submit(&["--run-as", "nobody"], "echo said");
    cluster.wait_for(&id, "SUCCEEDED");
    let nobody = User::from_name("nobody").unwrap().unwrap();
    let logs = cluster.dir.path().join(format!("n1/logs/{id}/attempt_1/0"));
    for name in ["stdout.log", "stderr.log"] {
        let meta = fs::metadata(logs.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (nobody.uid.as_raw(), 0o600), "{name}");
    }
    assert_eq!(cluster.output(&id, 0), "said\n");
    let root = fs::metadata(&logs).unwrap();
    assert_eq!((root.uid(), root.mode() & 0o777), (0, 0o711), "and nothing there is theirs to replace");
}
