//! Off loopback: three hosts, encrypted connections, nodes with certificates and people with tokens; and whoever has none,
//! or another's, or an old one, is refused in words.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use muster_tests::{
    Daemon, Netns, Outcome, address_of, binary, eventually, grpcurl_path, netns_address as address, skip,
};
use serde_json::Value;

/// Life of the nodes' certificates: short, so that they are renewed and end while the test looks.
const LIFE: &str = "10s";

/// A coordinator on the first host, with its authority.
struct Secure {
    dir: tempfile::TempDir,
    hosts: Netns,
    coordinator: Daemon,
    /// Its address and port.
    at: String,
}

/// None, and said so, if it cannot be tried here.
fn start() -> Option<Secure> {
    let hosts = Netns::new(3);
    if hosts.is_none() || grpcurl_path().is_none() {
        skip("hosts with TLS", "no network namespaces can be made here, or grpcurl is not in .deps/bin");
        return None;
    }
    let (dir, hosts) = (tempfile::tempdir().unwrap(), hosts.unwrap());
    let tls = path(dir.path(), "tls");
    Outcome::of(Command::new(binary("muster")).args(["pki", "init", "--dir", &tls, "--host", &address(0)]))
        .ok();
    let coordinator = coordinator(&hosts, dir.path(), "coordinator", &tls, &format!("{}:0", address(0)));
    let at = address_of(&coordinator);
    Some(Secure { dir, hosts, coordinator, at })
}

fn coordinator(hosts: &Netns, dir: &Path, name: &str, tls: &str, listen: &str) -> Daemon {
    let data_dir = path(dir, name);
    let args = ["coordinator", "--listen", listen, "--data-dir", &data_dir, "--tls-dir", tls];
    let more =
        ["--http-listen", "off", "--node-cert-lifetime", LIFE, "--lease", "5s", "--heartbeat", "200ms"];
    // One log for each life.
    let log = format!("{name}-{}", std::fs::read_dir(dir).unwrap().count());
    Daemon::start_behind(&hosts.prefix(0), dir, &log, &[&args[..], &more].concat())
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_owned()
}

impl Secure {
    fn path(&self, name: &str) -> String {
        path(self.dir.path(), name)
    }

    fn run(&self, host: usize, program: &Path, args: &[&str]) -> Outcome {
        let prefix = self.hosts.prefix(host);
        Outcome::of(Command::new(&prefix[0]).args(&prefix[1..]).arg(program).args(args))
    }

    /// By the Unix socket of the coordinator that keeps its state there.
    fn by_socket(&self, data_dir: &str, args: &[&str]) -> Outcome {
        let url = format!("unix:{}/muster.sock", self.path(data_dir));
        self.run(0, &binary("muster"), &[args, &["--coordinator", &url]].concat())
    }

    fn here(&self, args: &[&str]) -> Outcome {
        self.by_socket("coordinator", args)
    }

    /// Makes a token and gives the file with it.
    fn token(&self, file: &str, flags: &[&str]) -> String {
        let text = self.here(&[&["token", "create"], flags].concat()).ok();
        std::fs::write(self.path(file), text).unwrap();
        self.path(file)
    }

    /// grpcurl from the third host, as the bearer of the token in a file.
    fn call(&self, token_file: &str, request: &str, method: &str) -> Outcome {
        let token = std::fs::read_to_string(self.path(token_file)).unwrap();
        self.grpcurl(&["-H", &format!("authorization: Bearer {}", token.trim()), "-d", request], method)
    }

    fn grpcurl(&self, options: &[&str], method: &str) -> Outcome {
        let ca = self.path("tls/ca.crt");
        let args = [&["-cacert", &ca], options, &[&self.at, method]].concat();
        self.run(2, &grpcurl_path().unwrap(), &args)
    }

    /// A worker of this name on a host, on the directory of that name, with a join token that is named in the environment.
    fn worker(&self, host: usize, name: &str, data_dir: &str, join: Option<&str>) -> Daemon {
        let mut prefix = self.hosts.prefix(host);
        prefix.extend(
            join.map(|file| ["env".to_owned(), format!("MUSTER_JOIN_TOKEN_FILE={file}")])
                .into_iter()
                .flatten(),
        );
        let (url, data_dir) = (format!("https://{}", self.at), self.path(data_dir));
        let args = [
            "worker",
            "--coordinator",
            &url,
            "--name",
            name,
            "--data-dir",
            &data_dir,
            "--http-listen",
            "off",
        ];
        let log = format!("{name}-{}", std::fs::read_dir(self.dir.path()).unwrap().count());
        Daemon::start_behind(&prefix, self.dir.path(), &log, &args)
    }

    /// What a worker that cannot stay says at its end.
    fn refused(&self, name: &str, data_dir: &str, join: Option<&str>) -> String {
        let mut worker = self.worker(1, name, data_dir, join);
        assert_eq!(worker.wait(), 1, "{}", worker.log());
        worker.log().lines().last().unwrap_or_default().to_owned()
    }

    fn wait_for_nodes(&self, count: usize) {
        eventually("the nodes", || {
            let nodes = self.here(&["nodes", "--output", "json"]).json();
            let ready = nodes.iter().filter(|node| node["state"] == "NODE_STATE_READY").count();
            if ready == count { Ok(()) } else { Err(nodes) }
        });
    }

    /// Copies the certificate of a node, as a thief would, into a directory of his own, and also where grpcurl can show it.
    fn steal(&self, from: &str, to: &str) -> PathBuf {
        let dir = self.dir.path().join(to);
        std::fs::create_dir_all(dir.join("tls")).unwrap();
        let text = std::fs::read_to_string(self.dir.path().join(from).join("tls/node.json")).unwrap();
        let held: Value = serde_json::from_str(&text).unwrap();
        for (name, key) in [("crt", "certificate"), ("key", "key")] {
            std::fs::write(dir.join(name), held[key].as_str().unwrap()).unwrap();
        }
        std::fs::write(dir.join("tls/node.json"), text).unwrap();
        dir
    }

    /// Calls Join for a node with a stolen certificate.
    fn join_with(&self, thief: &Path, node: &str) -> Outcome {
        let [cert, key] = ["crt", "key"].map(|name| path(thief, name));
        let request = format!(r#"{{"nodeName":"{node}","address":"10.77.0.2","incarnation":"x"}}"#);
        self.grpcurl(&["-cert", &cert, "-key", &key, "-d", &request], "muster.v1.WorkerService/Join")
    }
}

fn check(outcome: &Outcome, code: i32, words: &str) {
    assert!(
        outcome.code == code && outcome.stderr.contains(words),
        "expected {code}, {words:?}: {outcome:?}"
    );
}

const DENIED: i32 = 64 + 7;
const SUBMIT: &str = "muster.v1.JobService/SubmitJob";
const HELLO: &str = r#"{"spec":{"command":["true"]}}"#;

#[test]
fn three_hosts_train_and_nobody_else_gets_in() {
    let Some(mut secure) = start() else { return };
    let join = secure.token("join", &["--role", "node", "--uses", "3"]);
    let workers: Vec<Daemon> = (0..3)
        .map(|host| secure.worker(host, &format!("n{}", host + 1), &format!("w{host}"), Some(&join)))
        .collect();
    secure.wait_for_nodes(3);
    secure.token("ci", &["--role", "submitter", "--name", "ci"]);

    let done = secure.path("done");
    let script = format!("env; until [ -e {done} ]; do sleep 0.1; done");
    let request =
        serde_json::json!({"spec": {"command": ["sh", "-c", script], "minNodes": 3, "procsPerNode": 2}});
    let job = secure.call("ci", &request.to_string(), SUBMIT).json().remove(0)["job"].take();
    let of_job = format!(r#"{{"jobId":{}}}"#, job["id"]);
    let job = |state: &str| {
        eventually(state, || {
            let job =
                secure.call("ci", &of_job, "muster.v1.JobService/GetJob").json().remove(0)["job"].take();
            if job["state"] == *state { Ok(job) } else { Err(job) }
        })
    };
    job("JOB_STATE_RUNNING");
    // Each has come anew with a later certificate.
    for worker in &workers {
        eventually("a renewed certificate", || {
            let log = worker.log();
            let joined = log.rsplit("the certificate was renewed").next().unwrap_or_default();
            let again = log.contains("the certificate was renewed") && joined.contains("joined");
            if again { Ok(()) } else { Err(log) }
        });
    }
    std::fs::write(&done, "").unwrap();
    let ended = job("JOB_STATE_SUCCEEDED");
    assert_eq!(
        (&ended["worldSize"], &ended["generation"]),
        (&6.into(), &1.into()),
        "no rank was dropped: {ended}"
    );
    let id = ended["id"].as_str().unwrap();
    let environment = secure.here(&["logs", id]).ok();
    assert!(environment.contains("MASTER_ADDR=10.77.0."), "{environment}");
    assert!(!environment.contains("TOKEN_FILE"), "ranks are not told where secrets are: {environment}");

    // What was made survives the coordinator.
    let (tls, at) = (secure.path("tls"), secure.at.clone());
    secure.coordinator.kill();
    secure.coordinator = coordinator(&secure.hosts, secure.dir.path(), "coordinator", &tls, &at);
    address_of(&secure.coordinator);
    secure.wait_for_nodes(3);
    secure.call("ci", HELLO, SUBMIT).ok();
}

#[test]
fn whoever_has_no_right_is_told_what_he_lacks() {
    let Some(secure) = start() else { return };
    secure.token("viewer", &["--role", "viewer", "--name", "eve"]);
    secure.token("gone", &["--role", "admin", "--name", "gone"]);
    let join = secure.token("join", &["--role", "node"]);
    secure.here(&["token", "revoke", "gone"]).ok();

    let reads = "muster.v1.JobService/ListJobs";
    secure.call("viewer", "{}", reads).ok();
    check(&secure.call("viewer", HELLO, SUBMIT), DENIED, "needs a token of the role submitter or above");
    check(&secure.call("join", "{}", reads), 1, "PermissionDenied");
    let cancel = "muster.v1.JobService/CancelJob";
    check(&secure.call("viewer", r#"{"job_id": "k3v9x2ma"}"#, cancel), DENIED, "the role submitter");
    std::fs::write(secure.path("wrong"), "muster.eve.0000").unwrap();
    for file in ["gone", "wrong"] {
        let refused = secure.run(
            2,
            &binary("muster"),
            &[
                "jobs",
                "--coordinator",
                &format!("https://{}", secure.at),
                "--ca",
                &secure.path("tls/ca.crt"),
                "--token-file",
                &secure.path(file),
            ],
        );
        check(&refused, 5, "is not known, was revoked or has expired");
    }
    let listed = secure.grpcurl(&[], "list");
    assert!(listed.code != 0 && listed.stderr.contains("this needs a token"), "{listed:?}");
    let url = format!("https://{}", secure.at);
    let nobody = secure.run(
        2,
        &binary("muster"),
        &["jobs", "--coordinator", &url, "--ca", &secure.path("tls/ca.crt")],
    );
    check(&nobody, 5, "pass --token-file or MUSTER_TOKEN_FILE");
    let health = ["healthcheck", "--coordinator", &url, "--ca", &secure.path("tls/ca.crt")];
    secure.run(2, &binary("muster"), &health).ok();

    // A node with a token for another coordinator, with none, with a used one.
    let token = std::fs::read_to_string(&join).unwrap();
    let (front, _) = token.trim().rsplit_once('.').unwrap();
    std::fs::write(secure.path("other"), format!("{front}.{}", "00".repeat(32))).unwrap();
    let refused = secure.refused("n1", "w-other", Some(&secure.path("other")));
    assert!(refused.contains("the join token names another authority"), "{refused}");
    let bare = secure.refused("n1", "w-bare", None);
    assert!(bare.contains("--ca or MUSTER_CA"), "{bare}");
    let _n1 = secure.worker(1, "n1", "w1", Some(&join));
    secure.wait_for_nodes(1);
    let used = secure.refused("n2", "w2", Some(&join));
    assert!(used.contains("has been used already"), "{used}");
    let log = secure.coordinator.log();
    assert!(!log.contains(token.split('.').nth(2).unwrap()), "a secret is in the log");
    assert!(log.contains("audit") && log.contains("token:eve") && log.contains("PermissionDenied"), "{log}");
    for (method, object, outcome) in [
        ("/muster.v1.JobService/CancelJob", "job:k3v9x2ma", "PermissionDenied"),
        ("/muster.v1.TokenService/RevokeToken", "token:gone", "Ok"),
        ("/muster.v1.WorkerService/IssueCertificate", "node:n1", "Ok"),
        ("/muster.v1.WorkerService/IssueCertificate", "node:n2", "PermissionDenied"),
    ] {
        eventually("the audit's line", || {
            let text = std::fs::read_to_string(secure.path("coordinator/audit.jsonl")).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let is_it = |line: &Value| {
                (&line["method"], &line["object"], &line["outcome"])
                    == (&method.into(), &object.into(), &outcome.into())
            };
            lines.into_iter().find(is_it).map(drop).ok_or(text)
        });
    }
}

#[test]
fn a_certificate_of_another_time_or_node_or_authority_is_refused() {
    let Some(mut secure) = start() else { return };
    let join = secure.token("join", &["--role", "node", "--uses", "2"]);
    let mut n1 = secure.worker(1, "n1", "w1", Some(&join));
    let _n2 = secure.worker(2, "n2", "w2", Some(&join));
    secure.wait_for_nodes(2);

    // Another's, under a name of one's own.
    let thief = secure.steal("w1", "thief");
    check(&secure.join_with(&thief, "n9"), DENIED, "the certificate is that of node n1");
    // Its time ends, whatever the thief does.
    eventually("the end of the certificate", || {
        let refused = secure.join_with(&thief, "n9");
        if refused.stderr.contains("the certificate of node n1 has expired") { Ok(()) } else { Err(refused) }
    });

    // One that is good still, once it is known that it was stolen.
    let thief = secure.steal("w1", "thief");
    secure.here(&["token", "revoke", "node:n1"]).ok();
    check(&secure.join_with(&thief, "n1"), 1, "was revoked");
    assert_eq!(n1.wait(), 1, "{}", n1.log());
    assert!(n1.log().contains("was revoked"), "{}", n1.log());
    // The node itself comes back with a new token.
    let again = secure.token("again", &["--role", "node"]);
    let _n1 = secure.worker(1, "n1", "w1", Some(&again));
    secure.wait_for_nodes(2);
    check(&secure.join_with(&thief, "n1"), 1, "was revoked");

    // One of another cluster.
    let tls = secure.path("tls2");
    let args = ["pki", "init", "--dir", &tls, "--host", &address(0)];
    Outcome::of(Command::new(binary("muster")).args(args)).ok();
    let other = coordinator(&secure.hosts, secure.dir.path(), "other", &tls, &format!("{}:0", address(0)));
    address_of(&other);
    let text = secure.by_socket("other", &["token", "create", "--role", "node"]).ok();
    std::fs::write(secure.path("join2"), text).unwrap();
    let refused = secure.refused("n3", "w3", Some(&secure.path("join2")));
    assert!(refused.contains("the join token names another authority"), "{refused}");

    // With a certificate of that cluster's authority, under which the thief knows this cluster's.
    let at = std::mem::replace(&mut secure.at, address_of(&other));
    let _n3 = secure.worker(1, "n3", "w3", Some(&secure.path("join2")));
    let kept = secure.dir.path().join("w3/tls/node.json");
    let mut held: Value = eventually("the foreign certificate", || {
        std::fs::read(&kept)
            .map_err(|error| error.to_string())
            .map(|text| serde_json::from_slice(&text).unwrap())
    });
    secure.at = at;
    held["authority"] = std::fs::read_to_string(secure.path("tls/ca.crt")).unwrap().into();
    // Its daemon goes on trying.
    held["life"] = 86_400_000.into();
    std::fs::create_dir_all(secure.path("w4/tls")).unwrap();
    std::fs::write(secure.path("w4/tls/node.json"), held.to_string()).unwrap();
    let foreign = secure.worker(1, "n3", "w4", None);
    eventually("the refusal of a foreign certificate", || {
        let log = foreign.log();
        if log.contains("it refuses our certificate, which another authority has signed") {
            Ok(())
        } else {
            Err(log)
        }
    });
}
