//! A coordinator and workers as processes that cannot outlive the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::netns::{Netns, address};
use crate::tools::{Outcome, binary};
use crate::{eventually, faketime_path, grpcurl};

/// How a cluster differs from the default.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Workers, named n1, n2, ….
    pub workers: usize,
    /// The lease, as `--lease` takes it; heartbeats are a fifth of a second. Empty: both as the coordinator has them.
    pub lease: &'static str,
    /// Each daemon on a host of its own: the coordinator on the first, n1 on the next and so on. Only where
    /// [`Netns::new`] can.
    pub netns: bool,
    /// Clocks that [`Cluster::set_clock`] can set. Only where there is [`faketime_path`].
    pub clocks: Option<Clocks>,
    /// What the daemons write is kept in memory, where there is room however full the disk of this machine is: health
    /// judges it.
    pub in_memory: bool,
    /// What `--loopback-users` takes; nothing by default.
    pub loopback_users: &'static str,
}

/// Which clocks of a host can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clocks {
    /// The one on the wall alone, as by a person or by NTP.
    Wall,
    /// All of them, as when a machine wakes up.
    All,
}

impl Settings {
    /// What most tests need; as a constant, for those of others.
    pub const DEFAULT: Self =
        Self { workers: 2, lease: "5s", netns: false, clocks: None, in_memory: false, loopback_users: "" };
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// One daemon. Dropped, it is killed; and it ends by itself when the test does.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts the binary under test with these arguments, logging into `dir`.
    pub fn start(dir: &Path, name: &str, args: &[&str]) -> Self {
        Self::start_behind(&[], dir, name, args)
    }

    /// Starts it behind another command, such as one that runs it on a host of its own.
    pub fn start_behind(prefix: &[String], dir: &Path, name: &str, args: &[&str]) -> Self {
        let log = dir.join(format!("{name}.log"));
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = behind(prefix)
            .args(args)
            .arg("--exit-with-stdin")
            .env_remove("MUSTER_COORDINATOR")
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for its end and gives its exit code, or -1 for a signal.
    pub fn wait(&mut self) -> i32 {
        let status = eventually("the daemon's end", || self.child.try_wait().unwrap().ok_or("still running"));
        status.code().unwrap_or(-1)
    }

    /// Kills it without a chance to do anything, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A coordinator and its workers.
#[derive(Debug)]
pub struct Cluster {
    /// Everything the daemons write.
    pub dir: tempfile::TempDir,
    /// The coordinator.
    pub coordinator: Daemon,
    /// The workers, n1 first.
    pub workers: Vec<Daemon>,
    /// The coordinator's `address:port`.
    pub address: String,
    /// The hosts, if each daemon has one.
    pub netns: Option<Netns>,
    settings: Settings,
}

/// `muster`, to be run behind another command.
fn behind(prefix: &[String]) -> Command {
    match prefix {
        [] => Command::new(binary("muster")),
        [program, args @ ..] => {
            let mut command = Command::new(program);
            command.args(args).arg(binary("muster"));
            command
        }
    }
}

impl Cluster {
    /// Starts everything and waits until the workers have joined.
    pub fn start(settings: Settings) -> Self {
        let dir =
            if settings.in_memory { tempfile::tempdir_in("/dev/shm") } else { tempfile::tempdir() }.unwrap();
        let netns = settings.netns.then(|| Netns::new(settings.workers + 1).unwrap());
        let prefix = prefix(netns.as_ref(), dir.path(), &settings, 0);
        let listen = if netns.is_some() { format!("{}:0", address(0)) } else { "127.0.0.1:0".to_owned() };
        let coordinator = start_coordinator(&prefix, dir.path(), &listen, &settings);
        let address = address_of(&coordinator);
        let workers = settings.workers;
        let mut cluster = Self { dir, coordinator, workers: Vec::new(), address, netns, settings };
        for _ in 0..workers {
            cluster.add_worker();
        }
        cluster.wait_for_nodes(workers);
        cluster
    }

    /// Starts one more worker, without waiting for it.
    pub fn add_worker(&mut self) {
        let name = format!("n{}", self.workers.len() + 1);
        let worker = self.spawn_worker(&name, &name);
        self.workers.push(worker);
    }

    /// Starts a worker of this name on the directory of that one.
    pub fn spawn_worker(&self, name: &str, dir: &str) -> Daemon {
        self.spawn_worker_with(name, dir, &[])
    }

    /// As [`Self::spawn_worker`], with further flags.
    pub fn spawn_worker_with(&self, name: &str, dir: &str, flags: &[&str]) -> Daemon {
        let data_dir = self.dir.path().join(dir);
        let args = [
            "worker",
            "--coordinator",
            &self.url(),
            "--name",
            name,
            "--data-dir",
            data_dir.to_str().unwrap(),
        ];
        let host = name.trim_start_matches('n').parse().unwrap_or(1);
        Daemon::start_behind(&self.prefix(host), self.dir.path(), name, &[&args[..], flags].concat())
    }

    fn prefix(&self, host: usize) -> Vec<String> {
        prefix(self.netns.as_ref(), self.dir.path(), &self.settings, host)
    }

    /// Sets the clocks of a host off by so much, such as `-3600`: 0 is the coordinator, 1 the first node.
    pub fn set_clock(&self, host: usize, seconds: &str) {
        set_clock(self.dir.path(), host, seconds);
    }

    /// Waits until so many nodes are ready.
    pub fn wait_for_nodes(&self, count: usize) {
        eventually("the nodes", || {
            let nodes = self.muster(&["nodes", "--output", "json"]).json();
            let ready = nodes.iter().filter(|node| node["state"] == "NODE_STATE_READY").count();
            if ready == count { Ok(()) } else { Err(nodes) }
        });
    }

    /// Starts the coordinator again on the same directory and port; returns once it serves or has ended.
    pub fn restart_coordinator(&mut self) {
        self.coordinator = start_coordinator(&self.prefix(0), self.dir.path(), &self.address, &self.settings);
        let coordinator = &mut self.coordinator;
        eventually("the coordinator's start", || match coordinator.child.try_wait() {
            Ok(Some(_)) => Ok(()),
            _ => listening(coordinator).map(|_| ()),
        });
    }

    /// The coordinator's URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Runs the command line against this cluster.
    pub fn muster(&self, args: &[&str]) -> Outcome {
        Outcome::of(&mut self.command(args))
    }

    /// The same, not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = behind(&self.prefix(0));
        command.args(args).env("MUSTER_COORDINATOR", self.url()).stdin(Stdio::null());
        command
    }

    /// Submits a shell script with these flags and gives the job's id.
    pub fn submit(&self, flags: &[&str], script: &str) -> String {
        let args: Vec<&str> =
            ["submit"].iter().chain(flags).chain(&["--", "sh", "-c", script]).copied().collect();
        self.muster(&args).ok().trim().to_owned()
    }

    /// The job as JSON.
    pub fn job(&self, id: &str) -> Value {
        self.muster(&["job", id, "--output", "json"]).json().remove(0)
    }

    /// Waits until the job is in a state, such as `RUNNING`.
    pub fn wait_for(&self, id: &str, state: &str) -> Value {
        let state = format!("JOB_STATE_{state}");
        eventually(&state, || {
            let job = self.job(id);
            if job["state"] == *state { Ok(job) } else { Err(job) }
        })
    }

    /// What a rank wrote on standard output.
    pub fn output(&self, id: &str, rank: u32) -> String {
        self.muster(&["logs", id, "--rank", &rank.to_string(), "--stream", "stdout"]).ok()
    }

    /// Calls a method with the real grpcurl.
    pub fn grpcurl(&self, args: &[&str]) -> Outcome {
        grpcurl(&self.address, args)
    }
}

/// What a daemon of this host is put behind.
fn prefix(netns: Option<&Netns>, dir: &Path, settings: &Settings, host: usize) -> Vec<String> {
    let mut prefix = netns.map(|netns| netns.prefix(host)).unwrap_or_default();
    if let Some(clocks) = settings.clocks {
        if !clock_file(dir, host).exists() {
            set_clock(dir, host, "+0");
        }
        prefix.push("env".to_owned());
        prefix.push(format!("LD_PRELOAD={}", faketime_path().unwrap().display()));
        prefix.push(format!("FAKETIME_TIMESTAMP_FILE={}", clock_file(dir, host).display()));
        // Read at every look at the clock, so that a change takes effect at once.
        prefix.push("FAKETIME_NO_CACHE=1".to_owned());
        prefix.extend((clocks == Clocks::Wall).then(|| "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned()));
    }
    prefix
}

fn clock_file(dir: &Path, host: usize) -> PathBuf {
    dir.join(format!("clock-{host}"))
}

fn set_clock(dir: &Path, host: usize, seconds: &str) {
    let (file, new) = (clock_file(dir, host), dir.join(format!("clock-{host}.new")));
    std::fs::write(&new, format!("{seconds}\n")).unwrap();
    // Renamed, so that nobody reads half of it.
    std::fs::rename(new, file).unwrap();
}

/// The address at which a daemon serves metrics, as it says in the first JSON line of its log.
pub fn http_address(daemon: &Daemon) -> String {
    eventually("where metrics are served", || says(daemon, "http_listening"))
}

fn start_coordinator(prefix: &[String], dir: &Path, listen: &str, settings: &Settings) -> Daemon {
    let data_dir = dir.join("coordinator");
    let data_dir = data_dir.to_str().unwrap();
    // One log for each life, so that the address of this one is found.
    let name = format!("coordinator-{}", std::fs::read_dir(dir).unwrap().count());
    let lease = ["--lease", settings.lease, "--heartbeat", "200ms"];
    let lease = if settings.lease.is_empty() { &[][..] } else { &lease[..] };
    // On a host of its own there may be no loopback.
    let http = if settings.netns { "off" } else { "127.0.0.1:0" };
    let args = ["coordinator", "--listen", listen, "--http-listen", http, "--data-dir", data_dir];
    // Hosts have addresses of their own, which are not loopback's.
    let insecure = if settings.netns { &["--insecure"][..] } else { &[] };
    let users = ["--loopback-users", settings.loopback_users];
    let users = if settings.loopback_users.is_empty() { &[][..] } else { &users[..] };
    Daemon::start_behind(prefix, dir, &name, &[&args[..], lease, insecure, users].concat())
}

/// The `address:port` of a coordinator, once it has said it.
pub fn address_of(coordinator: &Daemon) -> String {
    eventually("the coordinator's address", || listening(coordinator))
}

fn listening(coordinator: &Daemon) -> Result<String, String> {
    says(coordinator, "listening")
}

fn says(daemon: &Daemon, key: &str) -> Result<String, String> {
    let log = daemon.log();
    let first = log.lines().find_map(|line| serde_json::from_str::<Value>(line).ok());
    first.and_then(|line| Some(line[key].as_str()?.to_owned())).ok_or(log)
}
