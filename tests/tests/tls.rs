//! Encrypted connections, with the real binaries and the real grpcurl: what works, what is refused and how, and what becomes
//! of certificates that change.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use muster_tests::{
    Daemon, Nodes, Outcome, Place, address_of, binary, eventually, grpcurl_path, is_running, skip,
    torchrun_python,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// What the command line answers on a directory of its own, with nothing of the caller's surroundings.
fn muster(args: &[&str]) -> Outcome {
    let mut command = Command::new(binary("muster"));
    command.args(args).env_remove("MUSTER_COORDINATOR").env_remove("MUSTER_CA").stdin(Stdio::null());
    Outcome::of(&mut command)
}

fn write_secret(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Makes an authority and a certificate, and gives where its certificate is.
fn authority(dir: &Path, hosts: &[&str]) -> PathBuf {
    let flags = hosts.iter().flat_map(|host| ["--host", host]);
    let args: Vec<&str> = ["pki", "init", "--dir", dir.to_str().unwrap()].into_iter().chain(flags).collect();
    let said = muster(&args).ok();
    assert!(said.contains("--tls-dir") && said.contains("--ca"), "{said}");
    dir.join("ca.crt")
}

/// Starts a coordinator, and gives its `address:port`.
fn coordinator(dir: &Path, listen: &str, flags: &[&str]) -> (Daemon, String) {
    let name = format!("coordinator-{}", std::fs::read_dir(dir).unwrap().count());
    let data_dir = dir.join(format!("{name}-data"));
    let args =
        ["coordinator", "--listen", listen, "--http-listen", "off", "--data-dir", data_dir.to_str().unwrap()];
    let daemon = Daemon::start(dir, &name, &[&args, flags].concat());
    let address = address_of(&daemon);
    (daemon, address)
}

/// A coordinator that encrypts.
struct Bed {
    dir: tempfile::TempDir,
    ca: PathBuf,
    encrypted: Daemon,
    /// Its `address:port`.
    address: String,
    /// Files with a token for everything, and with one by which nodes join.
    token: String,
    join: String,
}

impl Bed {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let ca = authority(&tls, &["gpu.example"]);
        let (encrypted, address) =
            coordinator(dir.path(), "127.0.0.1:0", &[&["--tls-dir", tls.to_str().unwrap()], flags].concat());
        // Its own data directory is the only one there yet.
        let mut names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let data_dir = names.find(|path| path.join("muster.sock").exists()).unwrap();
        let socket = format!("unix:{}", data_dir.join("muster.sock").display());
        let [token, join] =
            [("token", &["admin"][..]), ("join", &["node", "--uses", "9"])].map(|(name, role)| {
                let made =
                    muster(&[&["token", "create", "--coordinator", &socket, "--role"], role].concat()).ok();
                let path = dir.path().join(name);
                write_secret(&path, &made);
                path.to_str().unwrap().to_owned()
            });
        Self { dir, ca, encrypted, address, token, join }
    }

    /// Makes a token and gives the file with it.
    fn token(&self, flags: &[&str], name: &str) -> String {
        let text = self.muster(&[&["token", "create"], flags].concat()).ok();
        let path = self.dir.path().join(name);
        write_secret(&path, &text);
        path.to_str().unwrap().to_owned()
    }

    /// Starts a worker.
    fn worker(&self) -> Daemon {
        let (url, data_dir) = (format!("https://{}", self.address), self.dir.path().join("n1"));
        let args = ["worker", "--name", "n1", "--coordinator", &url, "--ca", self.ca.to_str().unwrap()];
        let more = ["--data-dir", data_dir.to_str().unwrap(), "--join-token-file", &self.join];
        Daemon::start(self.dir.path(), "n1", &[&args[..], &more].concat())
    }

    /// Calls the coordinator that encrypts, with its authority.
    fn muster(&self, args: &[&str]) -> Outcome {
        self.muster_trusting(&self.ca, args)
    }

    fn muster_trusting(&self, ca: &Path, args: &[&str]) -> Outcome {
        let url = format!("https://{}", self.address);
        let shown = ["--coordinator", &url, "--ca", ca.to_str().unwrap(), "--token-file", &self.token];
        muster(&[&shown, args].concat())
    }
}

#[test]
fn a_job_runs_over_encrypted_connections() {
    let bed = Bed::start();
    let _worker = bed.worker();
    let id = bed.muster(&["submit", "--nproc-per-node", "2", "--", "sh", "-c", "echo rank $RANK"]).ok();
    let id = id.trim();
    let job = eventually("the job's end", || {
        let job = bed.muster(&["job", id, "--output", "json"]).json().remove(0);
        if job["state"] == "JOB_STATE_SUCCEEDED" { Ok(job) } else { Err(job) }
    });
    assert_eq!(job["placement"][0]["nodeName"], "n1");
    assert_eq!(bed.muster(&["logs", id, "--rank", "1", "--stream", "stdout"]).ok(), "rank 1\n");

    if grpcurl_path().is_none() {
        return skip("grpcurl over TLS", "it is not in .deps/bin; `cargo xtask test` brings it");
    }
    let grpcurl = |flags: &[&str]| {
        let mut command = Command::new(grpcurl_path().unwrap());
        let token = std::fs::read_to_string(&bed.token).unwrap();
        command.args(["-H", &format!("authorization: Bearer {}", token.trim())]);
        Outcome::of(command.args(flags).args([&bed.address, "muster.v1.NodeService/ListNodes"]))
    };
    let nodes = grpcurl(&["-cacert", bed.ca.to_str().unwrap()]).json().remove(0);
    assert_eq!(nodes["nodes"][0]["name"], "n1", "{nodes}");
    let refused = grpcurl(&["-plaintext", "-max-time", "20"]);
    assert!(refused.code != 0 && refused.stderr.contains("speaks TLS"), "{refused:?}");
    // Its own roots know nothing of ours.
    let refused = grpcurl(&[]);
    assert!(refused.code != 0 && refused.stderr.contains("certificate"), "{refused:?}");
}

#[test]
fn runs_meet_at_a_coordinator_that_encrypts() {
    let bed = Bed::start();
    let url = format!("https://{}", bed.address);
    let submitter = bed.token(&["--role", "submitter"], "submitter");
    let secrets = [("MUSTER_CA", bed.ca.to_str().unwrap()), ("MUSTER_TOKEN_FILE", &submitter)];
    let join = ("MUSTER_JOIN_TOKEN_FILE", bed.join.as_str());
    let ends = |mut commands: Vec<Command>| {
        let start = |command: &mut Command| {
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        Nodes(commands.iter_mut().map(start).collect()).ends()
    };
    let meet =
        ["--nnodes=2", "--rdzv-backend=muster", "--rdzv-endpoint", &url, "--rdzv-id=r1", "--no-python"];
    let check = |ends: Vec<Outcome>| {
        let mut ranks: Vec<String> = ends.into_iter().map(|end| end.ok().trim().to_owned()).collect();
        ranks.sort();
        assert_eq!(ranks, ["0 of 2", "1 of 2"]);
    };

    let place = Place::new();
    let script = place.script("echo $RANK of $WORLD_SIZE; env | grep TOKEN_FILE || true");
    let command = |env: &[(&str, &str)]| {
        let mut command = place.command(&[&meet[..], &[&script]].concat());
        command.envs(env.iter().copied());
        command
    };
    check(ends((0..2).map(|_| command(&[&secrets[..], &[join]].concat())).collect()));
    for (env, words) in [
        (&secrets[..], "--join-token-file"),
        (&[secrets[0], join], "--token-file or MUSTER_TOKEN_FILE"),
        (&[secrets[1], join], "--ca or MUSTER_CA"),
    ] {
        let end = ends(vec![command(env)]).remove(0);
        assert!(end.code != 0 && end.stderr.contains(words), "{words}: {end:?}");
    }
    place.nothing_is_left();

    let Some(python) = torchrun_python("stock torchrun over TLS") else { return };
    let stock = |env: &[(&str, &str)]| {
        let mut command = Command::new(&python);
        command
            .args(["-m", "torch.distributed.run"])
            .args(meet)
            .arg(place.script("echo $RANK of $WORLD_SIZE"));
        command.current_dir(place.path("")).envs(env.iter().copied());
        command
    };
    check(ends((0..2).map(|_| stock(&secrets)).collect()));
    let end = ends(vec![stock(&secrets[..1])]).remove(0);
    assert!(end.code != 0 && end.stderr.contains("MUSTER_TOKEN_FILE"), "{end:?}");
}

#[test]
fn a_token_says_as_whom_ranks_run() {
    let bed = Bed::start();
    let of_ann = bed.token(&["--role", "submitter", "--name", "ann", "--run-as", "ann"], "ann");
    let of_ci = bed.token(&["--role", "operator", "--name", "ci"], "ci");
    let submit = |token: &str, flags: &[&str]| {
        let url = format!("https://{}", bed.address);
        let shown =
            ["submit", "--coordinator", &url, "--ca", bed.ca.to_str().unwrap(), "--token-file", token];
        muster(&[&shown[..], flags, &["--", "true"]].concat())
    };
    let run_as =
        |id: &str| bed.muster(&["job", id.trim(), "--output", "json"]).json()[0]["spec"]["runAs"].clone();
    assert_eq!(run_as(&submit(&of_ann, &[]).ok()), "ann");
    assert_eq!(run_as(&submit(&of_ann, &["--run-as", "ann"]).ok()), "ann");
    assert_eq!(run_as(&submit(&of_ci, &[]).ok()), Value::Null);
    assert_eq!(run_as(&submit(&bed.token, &["--run-as", "bob"]).ok()), "bob");
    for (token, words) in
        [(&of_ann, "token:ann runs ranks as ann, not as bob"), (&of_ci, "may not have ranks run as bob")]
    {
        let refused = submit(token, &["--run-as", "bob"]);
        assert!(refused.code == 5 && refused.stderr.contains(words), "{refused:?}");
    }
    let refused = bed.muster(&["token", "create", "--role", "viewer", "--run-as", "ann"]);
    assert!(refused.code != 0 && refused.stderr.contains("viewers and nodes submit nothing"), "{refused:?}");
    let listed = bed.muster(&["token", "list"]).ok();
    assert!(listed.contains("RUNS AS") && listed.contains("ann"), "{listed}");
}

#[test]
fn what_does_not_fit_is_said_in_words() {
    let bed = Bed::start();
    let other = authority(&bed.dir.path().join("other"), &[]);
    let (ca, other) = (bed.ca.to_str().unwrap(), other.to_str().unwrap());
    let no_ca = bed.dir.path().join("tls/tls.key");
    let tls = bed.dir.path().join("tls");
    let (_plain, plain) = coordinator(bed.dir.path(), "127.0.0.1:0", &[]);
    // The certificate does not have this address.
    let (_elsewhere, elsewhere) =
        coordinator(bed.dir.path(), "127.0.0.2:0", &["--tls-dir", tls.to_str().unwrap()]);
    let encrypted = &bed.address;
    let table = [
        (format!("https://{encrypted}"), Some(other), 3, "is not of the authority given by --ca"),
        (format!("https://{elsewhere}"), Some(ca), 3, "is not for the name \"127.0.0.2\" but for"),
        (format!("http://{encrypted}"), Some(ca), 5, "this port speaks TLS: call it by https://"),
        (format!("https://{plain}"), Some(ca), 3, "it does not speak TLS: call it by http://"),
        (format!("https://{encrypted}"), None, 2, "https:// needs --ca or MUSTER_CA"),
        (format!("https://{encrypted}"), no_ca.to_str(), 2, "it holds no certificate in PEM"),
        (format!("https://{encrypted}"), Some("/nowhere"), 2, "/nowhere: No such file"),
    ];
    for (url, ca, code, words) in table {
        let mut args = vec!["nodes", "--coordinator", &url];
        args.extend(ca.map(|ca| ["--ca", ca]).iter().flatten());
        let refused = muster(&args);
        assert!(refused.code == code && refused.stderr.contains(words), "{url} {ca:?}: {refused:?}");
        // Its daemon says the same, and waits where that can help.
        if code != 2 {
            let dir = bed.dir.path().join("n1");
            let worker =
                [&["worker", "--name", "n1", "--data-dir", dir.to_str().unwrap()], &args[1..]].concat();
            let name = format!("worker-{}", std::fs::read_dir(bed.dir.path()).unwrap().count());
            let worker = Daemon::start(bed.dir.path(), &name, &worker);
            eventually(words, || {
                let log = worker.log().replace("\\\"", "\"");
                if log.contains(words) { Ok(()) } else { Err(log) }
            });
        }
    }
    muster(&["nodes", "--coordinator", &format!("http://{plain}")]).ok();
}

#[test]
fn what_is_not_safe_is_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let tls = dir.path().join("tls");
    let start = |flags: &[&str]| {
        let args = ["coordinator", "--store", "memory", "--http-listen", "off", "--data-dir"];
        muster(&[&args, &[data_dir.to_str().unwrap()][..], flags].concat())
    };
    let refused = start(&["--listen", "0.0.0.0:0"]);
    assert!(refused.code == 1, "{refused:?}");
    for words in ["muster pki init --dir", "--tls-dir", "--insecure"] {
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
    let flags = ["--tls-dir", tls.to_str().unwrap()];
    let refused = start(&flags);
    assert!(refused.code == 1 && refused.stderr.contains("ca.crt: "), "{refused:?}");
    authority(&tls, &[]);
    let other = dir.path().join("other");
    authority(&other, &[]);
    std::fs::copy(other.join("tls.key"), tls.join("tls.key")).unwrap();
    let refused = start(&flags);
    assert!(refused.code == 1 && refused.stderr.contains("tls.crt and tls.key: "), "{refused:?}");
}

#[test]
fn new_certificates_are_taken_up_and_broken_ones_are_not() {
    let bed = Bed::start();
    let (tls, new) = (bed.dir.path().join("tls"), bed.dir.path().join("new"));
    let new_ca = authority(&new, &["gpu.example"]);
    let works = |ca: &Path| bed.muster_trusting(ca, &["nodes"]).code == 0;
    assert!(works(&bed.ca) && !works(&new_ca));
    let old_ca = bed.dir.path().join("old.crt");
    std::fs::copy(&bed.ca, &old_ca).unwrap();

    std::fs::write(tls.join("tls.crt"), "half of it").unwrap();
    eventually("the warning", || {
        let log = bed.encrypted.log();
        if log.contains("the new certificates cannot be used; the old ones stay") { Ok(()) } else { Err(log) }
    });
    assert!(works(&old_ca));

    for name in ["ca.crt", "tls.crt", "tls.key"] {
        std::fs::copy(new.join(name), tls.join(name)).unwrap();
    }
    eventually("the new certificate", || if works(&new_ca) { Ok(()) } else { Err(bed.encrypted.log()) });
    assert!(!works(&old_ca));
}

#[test]
fn who_connects_and_says_nothing_holds_nobody_up() {
    let bed = Bed::start();
    let mut silent: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(&bed.address).unwrap()).collect();
    // The first bytes of a handshake that never goes on.
    for stream in silent.iter_mut().step_by(2) {
        stream.write_all(&[22, 3, 1]).unwrap();
    }
    bed.muster(&["nodes"]).ok();
    // They are ended, and none was before the others were served.
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0);
    }
    bed.muster(&["nodes"]).ok();
}

#[test]
fn a_coordinator_that_is_frozen_beyond_the_lease_costs_no_rank() {
    let bed = Bed::start_with(&["--lease", "2s", "--heartbeat", "200ms"]);
    let worker = bed.worker();
    let mark = bed.dir.path().join("pid");
    let script = format!("echo $$ > {}; exec sleep 1000", mark.display());
    let id = bed.muster(&["submit", "--", "sh", "-c", &script]).ok();
    let pid: i32 = eventually("the rank", || {
        let text = std::fs::read_to_string(&mark).unwrap_or_default();
        text.trim().parse().map_err(|_| worker.log())
    });
    // It takes connections all the while, and never answers a handshake: the daemon has to see that it hangs.
    bed.encrypted.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(6));
    assert!(is_running(pid), "{}", worker.log());
    bed.encrypted.signal(Signal::SIGCONT);
    let job = eventually("the worker's return", || {
        let nodes = bed.muster(&["nodes", "--output", "json"]).json();
        let job = bed.muster(&["job", id.trim(), "--output", "json"]).json().remove(0);
        if nodes[0]["state"] == "NODE_STATE_READY" { Ok(job) } else { Err(nodes) }
    });
    assert!(is_running(pid), "{}", worker.log());
    assert_eq!((&job["state"], &job["generation"]), (&"JOB_STATE_RUNNING".into(), &1.into()));
    bed.muster(&["cancel", id.trim()]).ok();
    eventually("the rank's end", || if is_running(pid) { Err(pid) } else { Ok(()) });
}

#[test]
fn a_join_token_may_be_for_one_node_and_its_file_is_private() {
    let bed = Bed::start();
    let path = bed.dir.path().join("bound");
    let url = format!("https://{}", bed.address);
    let file = std::fs::File::create(&path).unwrap();
    file.set_permissions(Permissions::from_mode(0o644)).unwrap();
    let create = ["token", "create", "--role", "node", "--uses", "2", "--node", "n2"];
    let shown = ["--coordinator", &url, "--ca", bed.ca.to_str().unwrap(), "--token-file", &bed.token];
    let mut made = Command::new(binary("muster"));
    assert!(made.args(shown).args(create).stdout(file).status().unwrap().success());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "a shell lets everybody read what it makes");
    let worker = |name: &str| {
        let data_dir = bed.dir.path().join(name);
        let args = ["worker", "--name", name, "--coordinator", &url, "--http-listen", "off"];
        let more = ["--data-dir", data_dir.to_str().unwrap(), "--join-token-file", path.to_str().unwrap()];
        [&args[..], &more].concat().iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>()
    };
    let refused = Outcome::of(Command::new(binary("muster")).args(worker("n1")));
    let words = "this join token is for node n2, and not for node n1";
    assert!(refused.code != 0 && refused.stderr.contains(words), "{refused:?}");
    assert!(!refused.stderr.contains("may read or write the secret"), "{refused:?}");
    let args = worker("n2");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let _worker = Daemon::start(bed.dir.path(), "n2", &args);
    eventually("the node that it is for", || {
        let nodes = bed.muster(&["nodes"]).ok();
        if nodes.contains("n2") { Ok(()) } else { Err(nodes) }
    });
    let left = bed.muster(&["token", "list"]).ok();
    let row = left.lines().find(|line| line.contains(" n2")).unwrap_or_default();
    assert!(row.contains(" 1  "), "the refused attempt has spent nothing: {left}");
    // A token that everybody may read works, and is said.
    let open = Permissions::from_mode(0o644);
    std::fs::set_permissions(&bed.token, open).unwrap();
    let said = bed.muster(&["nodes"]);
    assert!(said.code == 0 && said.stderr.contains("may read or write the secret"), "{said:?}");
}
