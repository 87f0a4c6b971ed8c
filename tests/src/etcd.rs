//! etcd as processes that cannot outlive the test, one member or several.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tools::{Outcome, brought};
use crate::{eventually, free_port};

/// A program of etcd, from the directory that `MUSTER_ETCD_DIR` names (for another version), as `cargo xtask test` brings
/// it, or as it is installed, if it is there.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|dir| dir.join(name));
    let named = std::env::var_os("MUSTER_ETCD_DIR").map(|dir| PathBuf::from(dir).join(name));
    let brought = brought(&format!("etcd/usr/bin/{name}"));
    named.into_iter().chain(brought).chain(installed).find(|path| path.is_file())
}

/// Whether there is an etcd to test with.
pub fn has_etcd() -> bool {
    program("etcd").is_some() && program("etcdctl").is_some()
}

/// Some members of one etcd. Dropped, they are killed; and they end when the test does.
#[derive(Debug)]
pub struct Etcd {
    dir: tempfile::TempDir,
    members: Vec<Member>,
    flags: Vec<String>,
}

#[derive(Debug)]
struct Member {
    prefix: Vec<String>,
    client: String,
    peer: String,
    child: Option<Child>,
}

impl Etcd {
    /// Starts so many members and waits until they serve; none where there is no etcd.
    pub fn start(members: usize) -> Option<Self> {
        Self::start_with(members, &[])
    }

    /// The same with further flags for each member.
    pub fn start_with(members: usize, flags: &[&str]) -> Option<Self> {
        Self::start_on(vec![(Vec::new(), "127.0.0.1".to_owned()); members], flags)
    }

    /// The same, each member behind a command and with an address.
    pub fn start_on(hosts: Vec<(Vec<String>, String)>, flags: &[&str]) -> Option<Self> {
        has_etcd().then(|| {
            let member = |(prefix, ip): (Vec<String>, String)| Member {
                prefix,
                client: format!("{ip}:{}", free_port()),
                peer: format!("{ip}:{}", free_port()),
                child: None,
            };
            let members: Vec<Member> = hosts.into_iter().map(member).collect();
            let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
            let mut etcd = Self { dir: tempfile::tempdir().unwrap(), members, flags };
            for index in 0..etcd.members.len() {
                etcd.spawn(index);
            }
            // All of them, not a quorum: a test may kill one at once.
            for index in 0..etcd.members.len() {
                etcd.wait_for(&etcd.members[index].client);
            }
            etcd
        })
    }

    fn spawn(&mut self, index: usize) {
        let cluster: Vec<String> = self
            .members
            .iter()
            .enumerate()
            .map(|(index, member)| format!("m{index}=http://{}", member.peer))
            .collect();
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("m{index}.log")))
            .unwrap();
        let member = &self.members[index];
        let words = member.prefix.iter().map(String::as_str);
        let (etcd, name) = (program("etcd").unwrap(), format!("m{index}"));
        let words: Vec<&str> = words.chain(["setpriv", "--pdeathsig", "KILL"]).collect();
        let [client, peer] = [&member.client, &member.peer].map(|address| format!("http://{address}"));
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(etcd).args(["--name", &name, "--data-dir"]);
        command.arg(self.dir.path().join(&name)).args(["--initial-cluster", &cluster.join(",")]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(&self.flags).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.members[index].child = Some(command.spawn().unwrap());
    }

    /// Waits until a quorum serves.
    pub fn wait(&self) {
        self.wait_for(&self.clients());
    }

    fn wait_for(&self, clients: &str) {
        let ask = ["get", "nothing", "--command-timeout", "1s"];
        eventually("etcd", || {
            let outcome = Outcome::of(self.ctl_command(clients).args(ask).stdin(Stdio::null()));
            if outcome.code == 0 { Ok(()) } else { Err((outcome, self.last_words())) }
        });
    }

    /// The end of each member's log.
    fn last_words(&self) -> Vec<String> {
        let log = |index| std::fs::read_to_string(self.path(&format!("m{index}.log"))).unwrap_or_default();
        let last = |text: String| text.lines().last().map(str::to_owned);
        (0..self.members.len()).filter_map(|index| last(log(index))).collect()
    }

    /// Reads every value that a key has had until now, the oldest first, as far as history is not
    /// compacted.
    pub fn history(&self, key: &str) -> Vec<String> {
        let file = self.dir.path().join("history");
        let output = std::fs::File::create(&file).unwrap();
        let ctl = self.ctl_command(&self.clients());
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(ctl.get_program()).args(ctl.get_args());
        command.args(["watch", key, "--rev", "1"]).stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let newest = self.ctl(&["get", key, "--print-value-only"]).ok();
        let values = eventually("the newest value", || {
            let text = std::fs::read_to_string(&file).unwrap();
            // Of each change a line says what it is, one of which key, and one the value.
            let lines: Vec<&str> = text.lines().collect();
            let values: Vec<String> =
                lines.chunks(3).filter_map(|of| Some((*of.get(2)?).to_owned())).collect();
            // A newer one may have come since: what has ended is cleared away, and that is written,
            // too.
            if values.iter().any(|value| value == newest.trim()) {
                Ok(values)
            } else {
                Err(values.last().cloned())
            }
        });
        child.kill().unwrap();
        child.wait().unwrap();
        values
    }

    /// Runs etcdctl against all members.
    pub fn ctl(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.ctl_command(&self.clients()).args(args).stdin(Stdio::null()))
    }

    fn ctl_command(&self, clients: &str) -> Command {
        let prefix = self.members[0].prefix.clone();
        let mut words = prefix.iter().map(String::as_str).chain(["env", "ETCDCTL_API=3"]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg(program("etcdctl").unwrap());
        command.args(["--endpoints", clients]);
        command
    }

    fn clients(&self) -> String {
        let clients: Vec<&str> = self.members.iter().map(|member| member.client.as_str()).collect();
        clients.join(",")
    }

    /// What `--store` takes.
    pub fn url(&self) -> String {
        format!("etcd://{}", self.clients())
    }

    /// Members, dead ones included.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Signals a member.
    pub fn signal(&self, index: usize, signal: Signal) {
        let pid = self.members[index].child.as_ref().unwrap().id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    /// Kills a member, and waits until it is gone.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.members[index].child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts a member that was killed.
    pub fn restart(&mut self, index: usize) {
        self.kill(index);
        self.spawn(index);
    }

    /// Goes back to a snapshot that `etcdctl snapshot save` has made; one member only.
    pub fn restore(&mut self, snapshot: &str) {
        self.kill(0);
        let data = self.dir.path().join("m0");
        std::fs::remove_dir_all(&data).unwrap();
        let peer = format!("http://{}", self.members[0].peer);
        let cluster = format!("m0={peer}");
        let to = ["--data-dir", data.to_str().unwrap(), "--name", "m0", "--initial-cluster", &cluster];
        let peer = ["--initial-advertise-peer-urls", peer.as_str()];
        self.ctl(&[&["snapshot", "restore", snapshot][..], &to, &peer].concat()).ok();
        self.spawn(0);
        self.wait();
    }

    /// Where it keeps its files.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
        }
    }
}
