//! Hosts of their own: network namespaces, each with an address, on one switch.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::is_running;
use crate::tools::ip_path;

static MADE: AtomicU32 = AtomicU32::new(0);

/// Some hosts. The first has 10.77.0.1, the next 10.77.0.2 and so on. They go when this is dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    hosts: usize,
}

/// Which way of a host's packets to the first host is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Both, and to everybody else.
    Full,
    /// What it sends.
    Up,
    /// What is sent to it.
    Down,
}

/// A link-layer address that nobody has: what is sent there is lost without a word.
const NOBODY: &str = "02:00:00:00:00:99";

impl Netns {
    /// None if this machine lets us make no namespaces, or has no `ip`.
    pub fn new(hosts: usize) -> Option<Self> {
        let nth = MADE.fetch_add(1, Ordering::Relaxed);
        if nth == 0 {
            remove_stale();
        }
        let name = format!("muster{}x{nth}", std::process::id());
        let this = Self { name, hosts };
        this.build().then_some(this)
    }

    fn build(&self) -> bool {
        let switch = self.switch();
        let mut ok = ip(&format!("netns add {switch}"))
            && ip(&format!("-n {switch} link add switch type bridge"))
            && ip(&format!("-n {switch} link set switch up"));
        for host in 0..self.hosts {
            let (of, address) = (self.host(host), address(host));
            ok = ok
                && ip(&format!("netns add {of}"))
                && ip(&format!("link add eth0 netns {of} type veth peer name port{host} netns {switch}"))
                && ip(&format!("-n {switch} link set port{host} master switch up"))
                && ip(&format!("-n {of} addr add {address}/24 dev eth0"))
                && ip(&format!("-n {of} link set eth0 up"))
                && ip(&format!("-n {of} link set lo up"));
        }
        ok
    }

    fn switch(&self) -> String {
        format!("{}s", self.name)
    }

    fn host(&self, host: usize) -> String {
        format!("{}h{host}", self.name)
    }

    /// What a command is put behind to run on a host.
    pub fn prefix(&self, host: usize) -> Vec<String> {
        [&ip_path().display().to_string(), "netns", "exec", &self.host(host)].map(str::to_owned).to_vec()
    }

    /// Gives every host an address of IPv6 as well: the first has fd77::1, the next fd77::2. False
    /// where there is no IPv6.
    pub fn add_v6(&self) -> bool {
        let add = |host: usize| {
            ip(&format!("-n {} addr add {}/64 dev eth0 nodad", self.host(host), address_v6(host)))
        };
        (0..self.hosts).all(add)
    }

    /// Whether hosts have addresses of IPv6.
    pub fn has_v6(&self) -> bool {
        let mut command = Command::new(ip_path());
        let shown =
            command.args(["-n", &self.host(0), "-6", "addr", "show", "dev", "eth0", "scope", "global"]);
        shown.output().is_ok_and(|output| !output.stdout.is_empty())
    }

    /// Gives a host a way to everywhere else, by the first.
    pub fn add_default_route(&self, host: usize) -> bool {
        ip(&format!("-n {} route add default via {}", self.host(host), address(0)))
    }

    /// Takes the address of IPv4 from a host.
    pub fn remove_v4(&self, host: usize) {
        assert!(ip(&format!("-n {} addr del {}/24 dev eth0", self.host(host), address(host))));
    }

    /// The same as `prefix`, with this file in the place of /etc/hosts: what names stand for on
    /// that host.
    pub fn prefix_with_hosts(&self, host: usize, file: &Path) -> Vec<String> {
        let mut words = self.prefix(host);
        let bind = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        words.extend(["sh", "-c", bind, &file.display().to_string()].map(str::to_owned));
        words
    }

    /// Cuts a host off.
    pub fn cut(&self, host: usize, cut: Cut) {
        let (first, of) = (self.host(0), self.host(host));
        let done = match cut {
            Cut::Full => ip(&format!("-n {} link set port{host} down", self.switch())),
            Cut::Up => {
                ip(&format!("-n {of} neigh replace {} lladdr {NOBODY} dev eth0 nud permanent", address(0)))
            }
            Cut::Down => ip(&format!(
                "-n {first} neigh replace {} lladdr {NOBODY} dev eth0 nud permanent",
                address(host)
            )),
        };
        assert!(done, "{cut:?} of host {host}");
    }

    /// Undoes a cut.
    pub fn mend(&self, host: usize, cut: Cut) {
        let (first, of) = (self.host(0), self.host(host));
        let done = match cut {
            Cut::Full => ip(&format!("-n {} link set port{host} up", self.switch())),
            Cut::Up => ip(&format!("-n {of} neigh del {} dev eth0", address(0))),
            Cut::Down => ip(&format!("-n {first} neigh del {} dev eth0", address(host))),
        };
        assert!(done, "the end of {cut:?} of host {host}");
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            ip(&format!("netns del {}", self.host(host)));
        }
        ip(&format!("netns del {}", self.switch()));
    }
}

/// Removes what tests left that were killed: their names have the ids of processes that are gone.
fn remove_stale() {
    let listed = Command::new(ip_path()).args(["netns", "list"]).output();
    let listed = listed.map(|output| output.stdout).unwrap_or_default();
    for line in String::from_utf8_lossy(&listed).lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let owner = name.strip_prefix("muster").and_then(|rest| rest.split_once('x')?.0.parse().ok());
        if owner.is_some_and(|pid| !is_running(pid)) {
            ip(&format!("netns del {name}"));
        }
    }
}

/// The address of a host.
pub fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

/// The same of IPv6.
pub fn address_v6(host: usize) -> String {
    format!("fd77::{}", host + 1)
}

fn ip(words: &str) -> bool {
    let mut command = Command::new(ip_path());
    let status = command.args(words.split(' ')).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
