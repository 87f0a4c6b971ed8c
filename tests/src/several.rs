//! Several coordinators on etcd, and workers that know them all.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::bed::{BEATS, Beat, beats};
use crate::cluster::Daemon;
use crate::netns::{Netns, address};
use crate::tools::{Outcome, binary};
use crate::{Etcd, eventually, free_port};

/// A cluster. Everything of it is killed when it is dropped.
#[derive(Debug)]
pub struct Several {
    /// Everything the daemons write.
    pub dir: tempfile::TempDir,
    /// Where they keep what is durable.
    pub etcd: Etcd,
    /// Those that run.
    pub coordinators: Vec<Option<Daemon>>,
    /// n1 and so on.
    pub workers: Vec<Daemon>,
    /// The hosts, if each coordinator has one; workers and the members of etcd share the first.
    pub netns: Option<Netns>,
    addresses: Vec<String>,
    lives: usize,
    /// Further flags of each coordinator.
    pub flags: Vec<String>,
    /// Where connections are encrypted, what the command line and workers are told of whom to trust and what to show.
    shown: Vec<(&'static str, String)>,
}

/// Flags of coordinators whose nodes are lost soon.
pub const FAST: [&str; 4] = ["--lease", "5s", "--heartbeat", "250ms"];

impl Several {
    /// Starts so many members, coordinators and workers; none where there is no etcd.
    pub fn start(members: usize, coordinators: usize, workers: usize) -> Option<Self> {
        Some(Self::on(Etcd::start(members)?, None, coordinators, workers, &FAST))
    }

    /// The same with TLS, tokens, and nodes that have certificates.
    pub fn start_encrypted(members: usize, coordinators: usize, workers: usize) -> Option<Self> {
        let mut several = Self::new(Etcd::start(members)?, None, coordinators, &FAST);
        let [tls, ca] = ["tls", "tls/ca.crt"].map(|name| several.path(name));
        let init = ["pki", "init", "--dir", &tls, "--host", "127.0.0.1"];
        Outcome::of(Command::new(binary("muster")).args(init)).ok();
        several.flags.extend(["--tls-dir".to_owned(), tls]);
        several.shown.push(("MUSTER_CA", ca));
        for index in 0..coordinators {
            several.start_coordinator(index);
        }
        let kinds = [
            ("MUSTER_TOKEN_FILE", "token", &["--role", "admin"][..]),
            ("MUSTER_JOIN_TOKEN_FILE", "join", &["--role", "node", "--uses", "9"]),
        ];
        for (variable, name, flags) in kinds {
            let text = eventually("a token", || several.by_a_socket(&[&["token", "create"], flags].concat()));
            std::fs::write(several.path(name), text).unwrap();
            several.shown.push((variable, several.path(name)));
        }
        several.start_workers(workers);
        Some(several)
    }

    /// What the coordinator that leads answers by its Unix socket.
    fn by_a_socket(&self, args: &[&str]) -> Result<String, String> {
        let sockets = (0..self.coordinators.len()).map(|index| self.path(&format!("c{index}/muster.sock")));
        let answers = sockets.map(|socket| self.muster_at(&format!("unix:{socket}"), args));
        let (mut good, bad): (Vec<_>, Vec<_>) = answers.partition(|outcome| outcome.code == 0);
        good.pop().map(|outcome| outcome.stdout).ok_or_else(|| format!("{bad:?}"))
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// The same with each coordinator on a host of its own; none where there can be none.
    pub fn start_on_hosts(coordinators: usize, workers: usize, flags: &[&str]) -> Option<Self> {
        let netns = Netns::new(coordinators + 1)?;
        let etcd = Etcd::start_on(vec![(netns.prefix(0), address(0))], &[])?;
        Some(Self::on(etcd, Some(netns), coordinators, workers, flags))
    }

    /// The same on an etcd that is there, with flags of the coordinators.
    pub fn on(etcd: Etcd, netns: Option<Netns>, coordinators: usize, workers: usize, flags: &[&str]) -> Self {
        let mut several = Self::new(etcd, netns, coordinators, flags);
        for index in 0..coordinators {
            several.start_coordinator(index);
        }
        several.leader();
        several.start_workers(workers);
        several
    }

    fn new(etcd: Etcd, netns: Option<Netns>, coordinators: usize, flags: &[&str]) -> Self {
        let host = |index: usize| match netns {
            Some(_) => address(index + 1),
            None => "127.0.0.1".to_owned(),
        };
        let addresses = (0..coordinators).map(|index| format!("{}:{}", host(index), free_port())).collect();
        Self {
            dir: tempfile::tempdir().unwrap(),
            etcd,
            coordinators: (0..coordinators).map(|_| None).collect(),
            workers: Vec::new(),
            netns,
            addresses,
            lives: 0,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            shown: Vec::new(),
        }
    }

    fn start_workers(&mut self, count: usize) {
        for index in 1..=count {
            let name = format!("n{index}");
            let worker = self.spawn_worker(&name);
            self.workers.push(worker);
        }
        self.wait_for_nodes(count);
    }

    /// Starts a coordinator on its directory and address.
    pub fn start_coordinator(&mut self, index: usize) {
        let (store, listen) = (self.etcd.url(), self.addresses[index].clone());
        let data_dir = self.dir.path().join(format!("c{index}"));
        let mut args = vec!["coordinator", "--listen", &listen, "--insecure", "--store", &store];
        args.extend(["--data-dir", data_dir.to_str().unwrap()]);
        args.extend(self.flags.iter().map(String::as_str));
        self.lives += 1;
        let name = format!("c{index}-{}", self.lives);
        let daemon = Daemon::start_behind(&self.prefix(index + 1), self.dir.path(), &name, &args);
        self.coordinators[index] = Some(daemon);
    }

    /// Starts a worker, without waiting for it.
    pub fn spawn_worker(&self, name: &str) -> Daemon {
        let data_dir = self.dir.path().join(name);
        let (url, data_dir) = (self.url(), data_dir.to_str().unwrap());
        let args = ["worker", "--coordinator", &url, "--name", name, "--data-dir", data_dir];
        let mut prefix = self.prefix(0);
        if !self.shown.is_empty() {
            prefix.push("env".to_owned());
            prefix.extend(self.shown.iter().map(|(variable, value)| format!("{variable}={value}")));
        }
        Daemon::start_behind(&prefix, self.dir.path(), name, &args)
    }

    fn prefix(&self, host: usize) -> Vec<String> {
        self.netns.as_ref().map(|netns| netns.prefix(host)).unwrap_or_default()
    }

    /// Kills a coordinator without a chance to do anything.
    pub fn kill_coordinator(&mut self, index: usize) {
        if let Some(mut daemon) = self.coordinators[index].take() {
            daemon.kill();
        }
    }

    /// All URLs, with commas.
    pub fn url(&self) -> String {
        let scheme = if self.shown.is_empty() { "http" } else { "https" };
        let urls: Vec<String> =
            self.addresses.iter().map(|address| format!("{scheme}://{address}")).collect();
        urls.join(",")
    }

    /// One coordinator's `address:port`.
    pub fn address(&self, index: usize) -> &str {
        &self.addresses[index]
    }

    /// Runs the command line; it knows every coordinator.
    pub fn muster(&self, args: &[&str]) -> Outcome {
        self.muster_at(&self.url(), args)
    }

    /// The same with these coordinators.
    pub fn muster_at(&self, url: &str, args: &[&str]) -> Outcome {
        let prefix = self.prefix(0);
        let mut words = prefix.iter().map(String::as_str).chain(["env"]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg(binary("muster")).args(args);
        command.envs(self.shown.iter().map(|(variable, value)| (variable, value)));
        Outcome::of(command.env("MUSTER_COORDINATOR", url).stdin(Stdio::null()))
    }

    /// The coordinator that answers as the leader, if there is one now.
    pub fn leader_now(&self) -> Option<usize> {
        let term = |index: usize| {
            let log = self.coordinators[index].as_ref()?.log();
            let (before, after) = log.rsplit_once(": leading term=")?;
            let number = after.split_whitespace().next()?.parse::<u64>().ok()?;
            let over = after.contains("stepped down") || after.contains("signalled; ending");
            (!before.is_empty() && !over).then_some((number, index))
        };
        // One that is frozen has not written that it is over.
        (0..self.coordinators.len()).filter_map(term).max().map(|(_, index)| index)
    }

    /// The numbers under which any coordinator has led, over all of their lives.
    pub fn terms(&self) -> Vec<u64> {
        let files = std::fs::read_dir(self.dir.path()).unwrap().flatten().map(|entry| entry.path());
        let logs = files.filter(|path| path.extension().is_some_and(|ext| ext == "log"));
        let text: String = logs.map(|path| std::fs::read_to_string(path).unwrap_or_default()).collect();
        let terms = text.split(": leading term=").skip(1);
        terms.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect()
    }

    /// Waits until the cluster has a leader that answers, and says which it is.
    pub fn leader(&self) -> usize {
        eventually("a leader", || {
            let outcome = self.muster(&["nodes", "--output", "json"]);
            let stale = outcome.stderr.contains("no longer be so");
            match self.leader_now() {
                Some(leader) if outcome.code == 0 && !stale => Ok(leader),
                leader => Err((leader, outcome)),
            }
        })
    }

    /// Waits until so many nodes are ready.
    pub fn wait_for_nodes(&self, count: usize) {
        eventually("the nodes", || {
            let outcome = self.muster(&["nodes", "--output", "json"]);
            if outcome.code != 0 || outcome.stderr.contains("no longer be so") {
                return Err(format!("{outcome:?}"));
            }
            let nodes = outcome.json();
            let ready = nodes.iter().filter(|node| node["state"] == "NODE_STATE_READY").count();
            if ready == count { Ok(()) } else { Err(format!("{nodes:?}")) }
        });
    }

    /// The job as JSON.
    pub fn job(&self, id: &str) -> Value {
        self.muster(&["job", id, "--output", "json"]).json().remove(0)
    }

    /// Waits until the job is in a state, such as `RUNNING`.
    pub fn wait_for(&self, id: &str, state: &str) -> Value {
        let state = format!("JOB_STATE_{state}");
        eventually(&state, || {
            let outcome = self.muster(&["job", id, "--output", "json"]);
            if outcome.code != 0 {
                return Err(format!("{outcome:?}"));
            }
            let job = outcome.json().remove(0);
            if job["state"] == *state { Ok(job) } else { Err(job.to_string()) }
        })
    }

    /// Submits a job of two nodes whose ranks beat.
    pub fn submit_beats(&self, flags: &[&str]) -> String {
        std::fs::create_dir_all(self.bed()).unwrap();
        let bed = format!("BED={}", self.bed().display());
        let args = ["submit", "--nnodes", "2", "--env", &bed, "--stop-grace", "2s"];
        let args: Vec<&str> = args.iter().chain(flags).chain(&["--", "sh", "-c", BEATS]).copied().collect();
        let id = self.muster(&args).ok().trim().to_owned();
        eventually("its ranks", || {
            let seen = self.beats();
            let ranks = (0..2).all(|rank| seen.iter().any(|beat| beat.rank == rank));
            if ranks { Ok(()) } else { Err(self.muster(&["job", &id])) }
        });
        id
    }

    /// Lets the ranks of that job end.
    pub fn end_beats(&self) {
        std::fs::write(self.bed().join("done"), "").unwrap();
    }

    /// Everything that they wrote.
    pub fn beats(&self) -> Vec<Beat> {
        beats(&self.bed())
    }

    fn bed(&self) -> PathBuf {
        self.dir.path().join("bed")
    }
}

impl Drop for Several {
    fn drop(&mut self) {
        // What the daemons said is the first thing that is looked for.
        if std::thread::panicking() {
            let logs = std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten();
            let mut logs: Vec<PathBuf> = logs.map(|entry| entry.path()).collect();
            logs.sort();
            for log in logs.iter().filter(|path| path.extension().is_some_and(|ext| ext == "log")) {
                println!("--- {}\n{}", log.display(), std::fs::read_to_string(log).unwrap_or_default());
            }
        }
    }
}
