//! Jobs belong to who submitted them: what others see of them and may do, with the real binaries.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use muster_tests::{Cluster, Daemon, Outcome, Settings, address_of, binary, eventually, skip};
use nix::unistd::{Uid, User};
use serde_json::Value;

/// What the command line ends with where it is refused.
const DENIED: i32 = 5;
const SECRET: &str = "s3cret-7f1c";

fn muster(args: &[&str]) -> Outcome {
    let mut command = Command::new(binary("muster"));
    command.args(args).env_remove("MUSTER_COORDINATOR").env_remove("MUSTER_CA").stdin(Stdio::null());
    Outcome::of(&mut command)
}

/// A coordinator that asks who calls, and a worker.
struct Bed {
    dir: tempfile::TempDir,
    coordinator: Daemon,
    worker: Option<Daemon>,
    url: String,
}

impl Bed {
    fn start(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tls = path(dir.path(), "tls");
        muster(&["pki", "init", "--dir", &tls, "--host", "localhost"]).ok();
        let data_dir = path(dir.path(), "coordinator");
        let args = ["coordinator", "--listen", "127.0.0.1:0", "--http-listen", "off", "--tls-dir", &tls];
        let all = [&args[..], &["--data-dir", &data_dir], flags].concat();
        let coordinator = Daemon::start(dir.path(), "log", &all);
        let url = format!("https://{}", address_of(&coordinator));
        let mut bed = Self { dir, coordinator, worker: None, url };
        for (name, role) in [
            ("ann", "submitter"),
            ("bob", "submitter"),
            ("eve", "viewer"),
            ("ops", "operator"),
            ("join", "node"),
        ] {
            let socket = format!("unix:{data_dir}/muster.sock");
            let made = ["token", "create", "--coordinator", &socket, "--role", role, "--name", name];
            fs::write(bed.path(name), muster(&made).ok()).unwrap();
        }
        let (ca, join, data_dir) = (bed.path("tls/ca.crt"), bed.path("join"), bed.path("n1"));
        let args = ["worker", "--name", "n1", "--coordinator", &bed.url, "--ca", &ca];
        let more = ["--join-token-file", &join, "--data-dir", &data_dir];
        bed.worker = Some(Daemon::start(bed.dir.path(), "log-n1", &[&args[..], &more].concat()));
        bed
    }

    fn path(&self, name: &str) -> String {
        path(self.dir.path(), name)
    }

    /// What somebody's command line does.
    fn by(&self, who: &str, args: &[&str]) -> Outcome {
        let (ca, token) = (self.path("tls/ca.crt"), self.path(who));
        muster(&[&["--coordinator", &self.url, "--ca", &ca, "--token-file", &token], args].concat())
    }

    fn submit(&self, who: &str, flags: &[&str], script: &str) -> String {
        let all = [&["submit"][..], flags, &["--", "sh", "-c", script]].concat();
        self.by(who, &all).ok().trim().to_owned()
    }

    /// The job as somebody sees it, once it is in a state.
    fn job(&self, who: &str, id: &str, state: &str) -> Value {
        eventually("the job's state", || {
            let job = self.by(who, &["job", id, "--output", "json"]).json().remove(0);
            if job["state"] == format!("JOB_STATE_{state}") { Ok(job) } else { Err(job) }
        })
    }
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_owned()
}

fn denied(outcome: &Outcome, words: &str) {
    assert!(outcome.code == DENIED && outcome.stderr.contains(words), "{words}: {outcome:?}");
}

#[test]
fn others_see_that_a_job_runs_and_not_what_and_cannot_end_it() {
    let bed = Bed::start(&["--owner-queue-jobs-max", "2"]);
    let env = format!("KEY={SECRET}");
    let script = format!("echo out-{SECRET}; echo err-{SECRET} >&2; exit 3");
    let failed = bed.submit("ann", &["--env", &env, "--request-id", "r1"], &script);
    let whole = bed.job("ann", &failed, "FAILED");
    assert_eq!((&whole["owner"], &whole["spec"]["env"]["KEY"]), (&"ann".into(), &SECRET.into()), "{whole}");
    assert!(whole["reason"].as_str().unwrap().contains(SECRET), "{whole}");
    for who in ["bob", "eve"] {
        let seen = bed.job(who, &failed, "FAILED");
        assert!(!seen.to_string().contains(SECRET), "{seen}");
        assert_eq!(
            (&seen["redacted"], &seen["spec"]["env"]["KEY"], &seen["spec"]["command"]),
            (&true.into(), &"[redacted]".into(), &serde_json::json!(["[redacted]"])),
            "{seen}"
        );
        let reason = seen["reason"].as_str().unwrap();
        assert!(reason.contains("ended with exit code 3: [redacted]"), "{seen}");
        for args in [["jobs", "-a"], ["explain", &failed]] {
            let shown = bed.by(who, &args).ok();
            assert!(shown.contains(&failed) && !shown.contains(SECRET), "{shown}");
        }
        for command in ["job", "explain"] {
            let shown = bed.by(who, &[command, &failed]).ok();
            assert!(shown.contains("are shown to ann, its owner, and operators alone"), "{shown}");
        }
        denied(&bed.by(who, &["logs", &failed]), "belongs to ann, and only ann or an operator");
    }
    assert!(bed.by("ops", &["logs", &failed]).ok().contains(&format!("out-{SECRET}")));

    // What a node says of a program that is not there names it.
    let program = format!("/no/{SECRET}/train");
    let missing = bed.by("ann", &["submit", "--", &program]).ok().trim().to_owned();
    assert!(bed.job("ann", &missing, "FAILED").to_string().contains("is not there"));
    let seen = bed.job("bob", &missing, "FAILED");
    assert_eq!(seen["reason"], "node n1: [redacted]");
    assert!(!seen.to_string().contains(SECRET), "{seen}");

    let running = bed.submit("ann", &[], "exec sleep 1000");
    bed.job("ann", &running, "RUNNING");
    denied(
        &bed.by("bob", &["cancel", &running]),
        "belongs to ann, and only ann or an operator may change it",
    );
    denied(&bed.by("eve", &["cancel", &running]), "the role submitter");
    let ids = |who: &str, flags: &[&str]| -> Vec<String> {
        let listed = bed.by(who, &[&["jobs", "-a", "--output", "json"], flags].concat()).json();
        listed.iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    };
    let anns = vec![running.clone(), missing, failed.clone()];
    assert_eq!((ids("ann", &["--mine"]), ids("bob", &["--owner", "ann"])), (anns.clone(), anns));
    assert_eq!(ids("bob", &["--mine"]), Vec::<String>::new());

    // The same request of somebody else is another one.
    let bobs = bed.submit("bob", &["--env", &env, "--request-id", "r1"], &script);
    assert_ne!(bobs, failed);
    assert_eq!(bed.submit("ann", &["--env", &env, "--request-id", "r1"], &script), failed);
    assert_eq!(ids("bob", &["--mine"]), [bobs.as_str()]);

    denied(&bed.by("bob", &["submit", "--priority", "101", "--", "true"]), "priority 101 is above 100");
    bed.submit("bob", &["--priority", "100", "--nnodes", "2"], "true");
    // The other one that waits is that of the request: ann's has the node for itself.
    let full = bed.by("bob", &["submit", "--nnodes", "2", "--", "true"]);
    assert!(full.code != 0 && full.stderr.contains("2 jobs of bob are waiting already"), "{full:?}");
    bed.submit("ops", &["--nnodes", "2", "--priority", "2000"], "true");

    let ended = bed.by("ann", &["cancel", &running, "--reason", "wrong data"]).ok();
    assert!(ended.contains("cancelled by ann: wrong data"), "{ended}");
    let ended = bed.job("eve", &running, "CANCELLED");
    assert_eq!((&ended["cancelledBy"], &ended["redacted"]), (&"ann".into(), &true.into()), "{ended}");
    bed.by("ops", &["drain", "n1", "--reason", "kernel"]).ok();
    let node = bed.by("eve", &["node", "n1"]).ok();
    assert!(node.contains("drained by ops (kernel)"), "{node}");
    bed.by("ops", &["uncordon", "n1"]).ok();
    assert!(bed.by("eve", &["node", "n1"]).ok().contains("given back by ops"));
    drop(bed.coordinator);
}

#[test]
fn a_user_of_the_machine_who_is_let_in_has_jobs_of_their_own() {
    let nobody = "65534";
    let as_nobody = |args: &[&str]| {
        let who = ["--reuid", nobody, "--regid", nobody, "--clear-groups"];
        Outcome::of(Command::new("setpriv").args(who).arg(binary("muster")).args(args))
    };
    if !Uid::effective().is_root() || as_nobody(&["--version"]).code != 0 {
        return skip("jobs of other users", "only root can call as one, and they must reach the binary");
    }
    let cluster = Cluster::start(Settings { workers: 1, loopback_users: nobody, ..Settings::default() });
    let name = User::from_uid(Uid::from_raw(65534)).unwrap().map_or("uid:65534".to_owned(), |user| user.name);
    let url = cluster.url();
    let call = |args: &[&str]| as_nobody(&[&["--coordinator", &url], args].concat());
    let roots = cluster.submit(&["--nnodes", "2"], &format!("echo {SECRET}"));
    assert_eq!(cluster.job(&roots)["owner"], "root");
    denied(&call(&["cancel", &roots]), "belongs to root");
    let seen = call(&["job", &roots]).ok();
    assert!(seen.contains("owner       root") && !seen.contains(SECRET), "{seen}");
    denied(&call(&["cordon", "n1"]), "call as root or as the user who runs the coordinator");
    denied(&call(&["token", "create", "--role", "admin"]), &format!("user:{name} may submit jobs here"));
    denied(&call(&["submit", "--run-as", "daemon", "--", "true"]), "runs ranks as");
    let own = call(&["submit", "--nnodes", "2", "--", "true"]).ok();
    assert_eq!(cluster.job(own.trim())["owner"], name.as_str());
    let ended = call(&["cancel", own.trim()]).ok();
    assert!(ended.contains(&format!("cancelled by {name}")), "{ended}");
    let ended = cluster.muster(&["cancel", &roots]).ok();
    assert!(ended.contains("cancelled by root"), "{ended}");
}
