//! Names with several addresses, and names that stand for loopback on their own host: what ranks
//! are told is an address at which the store of rank 0 serves for every node.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use muster_tests::{
    Daemon, Netns, Nodes, Outcome, address_of, binary, deployed, eventually, free_port, netns_address,
    netns_address_v6, python, skip,
};
use serde_json::Value;

/// Two hosts of both families, or a word that there are none.
fn two_hosts() -> Option<Netns> {
    let hosts = Netns::new(2).filter(Netns::add_v6);
    if hosts.is_none() {
        skip("hosts of both families", "no network namespaces with IPv6 can be made here");
    }
    hosts
}

/// A file in the place of /etc/hosts.
fn hosts_file(dir: &Path, name: &str, lines: &[&str]) -> PathBuf {
    let path = dir.join(name);
    let text: Vec<&str> = ["127.0.0.1 localhost", "::1 localhost"].iter().chain(lines).copied().collect();
    std::fs::write(&path, text.join("\n") + "\n").unwrap();
    path
}

/// Each rank says which address it was told, once its store has taken a connection there.
const CONNECT: &str = "exec 3<>/dev/tcp/$MASTER_ADDR/$MASTER_PORT && echo reached $MASTER_ADDR";

/// The files of one case: what the name `head` stands for on the first host, and on the other.
type Case<'a> = (&'a [&'a str], &'a [&'a str]);

const CASES: [Case<'static>; 4] = [
    // As Debian's installer writes it.
    (&["127.0.1.1 head"], &["10.77.0.1 head"]),
    (&["::1 head"], &["fd77::1 head"]),
    (&["127.0.1.1 head", "::1 head"], &["10.77.0.1 head", "fd77::1 head"]),
    // The other knows of one family alone, and not of the one that comes first here.
    (&["fd77::1 head", "10.77.0.1 head"], &["10.77.0.1 head"]),
];

/// A run of one rank on each host; gives what the ranks said, host by host.
fn run_on_both(hosts: &Netns, case: Case<'_>, flags: [&[&str]; 2]) -> Vec<Outcome> {
    let dir = tempfile::tempdir().unwrap();
    let files = [hosts_file(dir.path(), "h0", case.0), hosts_file(dir.path(), "h1", case.1)];
    let start = |host: usize| {
        let prefix = hosts.prefix_with_hosts(host, &files[host]);
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(binary("muster")).args(["run", "--nnodes", "2"]).args(flags[host]);
        command.args(["--no-python", "bash", "-c", CONNECT]).current_dir(dir.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    Nodes(vec![start(0), start(1)]).ends()
}

fn reached(case: Case<'_>, ends: &[Outcome]) -> Vec<String> {
    assert!(ends.iter().all(|end| end.code == 0), "{case:?}: {ends:?}");
    let addresses = ends.iter().map(|end| end.stdout.trim().strip_prefix("reached ").map(str::to_owned));
    addresses.collect::<Option<_>>().unwrap_or_else(|| panic!("{case:?}: {ends:?}"))
}

#[test]
fn the_place_where_nodes_meet_serves_at_all_addresses_of_its_name() {
    let Some(hosts) = two_hosts() else { return };
    for case in CASES {
        let port = free_port();
        let first = ["--node-rank", "0", "--master-addr", "head", "--master-port", &port];
        let other = ["--node-rank", "1", "--master-addr", "head", "--master-port", &port];
        // Ranks resolve the name themselves, as under torchrun.
        assert_eq!(reached(case, &run_on_both(&hosts, case, [&first, &other])), ["head", "head"], "{case:?}");

        let endpoint = format!("head:{}", free_port());
        let flags = ["--rdzv-backend", "c10d", "--rdzv-endpoint", &endpoint, "--rdzv-id", "r"];
        let told = reached(case, &run_on_both(&hosts, case, [&flags, &flags]));
        let of_hosts: Vec<String> = (0..2).flat_map(|h| [netns_address(h), netns_address_v6(h)]).collect();
        assert!(told[0] == told[1] && of_hosts.contains(&told[0]), "{case:?}: {told:?}");
    }
}

/// A coordinator on the first host that listens on every address, and a daemon on each.
struct Cluster<'a> {
    hosts: &'a Netns,
    dir: tempfile::TempDir,
    files: [PathBuf; 2],
    urls: [String; 2],
    coordinator: Daemon,
    workers: Vec<Daemon>,
}

impl<'a> Cluster<'a> {
    /// `urls` are those by which daemons call the coordinator, without the port.
    fn start(hosts: &'a Netns, case: Case<'_>, urls: [&str; 2]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = [hosts_file(dir.path(), "h0", case.0), hosts_file(dir.path(), "h1", case.1)];
        let at = dir.path().join("coordinator").display().to_string();
        let args =
            ["coordinator", "--listen", "[::]:0", "--insecure", "--data-dir", &at, "--http-listen", "off"];
        let coordinator =
            Daemon::start_behind(&hosts.prefix_with_hosts(0, &files[0]), dir.path(), "coordinator", &args);
        let listening = address_of(&coordinator);
        let (_, port) = listening.rsplit_once(':').unwrap();
        let urls = urls.map(|url| format!("{url}:{port}"));
        let mut this = Self { hosts, dir, files, urls, coordinator, workers: Vec::new() };
        this.workers = vec![this.worker(0, &[]), this.worker(1, &[])];
        this.wait_for(|nodes| nodes.len() == 2);
        this
    }

    fn worker(&self, host: usize, flags: &[&str]) -> Daemon {
        let (name, dir) = (format!("n{host}"), self.dir.path());
        let at = dir.join(&name).display().to_string();
        let args = [
            "worker",
            "--coordinator",
            &self.urls[host],
            "--name",
            &name,
            "--data-dir",
            &at,
            "--http-listen",
        ];
        let prefix = self.hosts.prefix_with_hosts(host, &self.files[host]);
        Daemon::start_behind(&prefix, dir, &name, &[&args[..], &["off"], flags].concat())
    }

    /// Starts a worker again that says that it is at 127.0.0.1.
    fn restart_at_loopback(&mut self, host: usize) {
        self.workers[host].kill();
        self.workers[host] = self.worker(host, &["--address", "127.0.0.1"]);
        self.wait_for(|nodes| nodes.iter().all(|node| node["address"] == "127.0.0.1"));
    }

    fn wait_for(&self, is_it: impl Fn(&[Value]) -> bool) {
        eventually("the nodes", || {
            let mut nodes = self.muster(&["nodes", "--output", "json"]).json();
            nodes.retain(|node| node["state"] == "NODE_STATE_READY");
            if is_it(&nodes) { Ok(()) } else { Err((nodes, self.logs())) }
        });
    }

    fn muster(&self, args: &[&str]) -> Outcome {
        let prefix = self.hosts.prefix(0);
        let url = format!("unix:{}", self.dir.path().join("coordinator/muster.sock").display());
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(binary("muster")).env("MUSTER_COORDINATOR", url);
        Outcome::of(command.args(args))
    }

    fn logs(&self) -> Vec<String> {
        self.workers.iter().chain([&self.coordinator]).map(Daemon::log).collect()
    }

    /// A job of a rank on each node; gives how it ended, and what its ranks said.
    fn job(&self) -> (Value, String) {
        let id = self.muster(&["submit", "--nnodes", "2", "--", "bash", "-c", CONNECT]).ok();
        let id = id.trim();
        let job = eventually("the end of the job", || {
            let job = self.muster(&["job", id, "--output", "json"]).json().remove(0);
            let ended = ["JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"].map(Into::into).contains(&job["state"]);
            if ended { Ok(job) } else { Err((job, self.logs())) }
        });
        (job, self.muster(&["logs", id]).stdout)
    }
}

#[test]
fn ranks_are_told_an_address_that_every_node_reaches() {
    let Some(hosts) = two_hosts() else { return };
    for case in CASES {
        let cluster = Cluster::start(&hosts, case, ["http://head", "http://head"]);
        let (job, said) = cluster.job();
        assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{case:?}: {job} {:?}", cluster.logs());
        assert_eq!(said.matches("reached ").count(), 2, "{case:?}: {said}");
        assert!(!said.contains(" 127.") && !said.contains(" ::1"), "{case:?}: {said}");
        // A coordinator on [::] is called at an address that it has itself, of either family.
        let other = cluster.workers[1].log();
        assert!(!other.contains("stands between"), "{case:?}: {other}");
        let first = cluster.workers[0].log();
        let is_loopback = case.0[0].starts_with("127.") || case.0[0].starts_with("::1");
        assert_eq!(first.contains("the name stands for loopback here"), is_loopback, "{case:?}: {first}");
    }
}

#[test]
fn a_node_that_calls_by_loopback_is_not_the_first_of_nodes_elsewhere() {
    let Some(hosts) = two_hosts() else { return };
    hosts.remove_v4(1);
    let names: Case<'_> = (&[], &["fd77::1 head"]);
    let cluster = Cluster::start(&hosts, names, ["http://127.0.0.1", "http://head"]);
    let (job, said) = cluster.job();
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED", "{job} {:?}", cluster.logs());
    assert_eq!(said.matches("reached fd77::2").count(), 2, "{said}");
}

#[test]
fn a_first_node_that_nobody_reaches_is_said_and_not_waited_for() {
    let Some(hosts) = two_hosts() else { return };
    // Both say that they are at loopback, as nodes behind tunnels do.
    let names: Case<'_> = (&[], &["10.77.0.1 head"]);
    let mut cluster = Cluster::start(&hosts, names, ["http://127.0.0.1", "http://head"]);
    cluster.restart_at_loopback(1);
    let (job, _) = cluster.job();
    let reason = job["reason"].as_str().unwrap();
    let words = "the first node's address is 127.0.0.1, which is loopback";
    assert!(reason.contains(words) && reason.contains("--address"), "{job}");
    drop(cluster);

    // One has told its address of IPv4, and the other has no way there.
    let names: Case<'_> = (&["10.77.0.1 head"], &["fd77::1 head"]);
    hosts.remove_v4(1);
    let cluster = Cluster::start(&hosts, names, ["http://head", "http://head"]);
    let (job, _) = cluster.job();
    let reason = job["reason"].as_str().unwrap();
    assert!(reason.contains("the first node's address is 10.77.0.1, to which this node"), "{job}");
}

#[test]
fn every_address_is_that_of_the_families_that_the_kernel_has() {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("no_ipv6.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fake/no_ipv6.c");
    let mut cc = Command::new("cc");
    Outcome::of(cc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library).arg(source)).ok();
    let prefix = ["env".to_owned(), format!("LD_PRELOAD={}", library.display())];
    let start = |name: &str, listen: &str| {
        let data_dir = dir.path().join(name).display().to_string();
        let args = ["coordinator", "--listen", listen, "--insecure", "--data-dir", &data_dir];
        let more = ["--http-listen", listen, "--health-listen", listen];
        Daemon::start_behind(&prefix, dir.path(), name, &[&args[..], &more].concat())
    };
    let coordinator = start("every", "[::]:0");
    let address = address_of(&coordinator);
    assert!(address.starts_with("0.0.0.0:"), "{address}");
    eventually("the warning", || {
        let log = coordinator.log();
        let said = ["\"http_listening\":\"0.0.0.0:", "this machine has no IPv6", "address=0.0.0.0:"];
        if said.iter().all(|words| log.contains(words)) { Ok(()) } else { Err(log) }
    });
    // One that was named is not another.
    let mut refused = start("one", "[::1]:0");
    assert_eq!(refused.wait(), 1, "{}", refused.log());
    assert!(refused.log().contains("failed to listen on [::1]:0"), "{}", refused.log());
}

#[test]
fn the_plug_in_for_torchrun_offers_an_address_that_others_reach() {
    let Some(hosts) = two_hosts() else { return };
    let dir = tempfile::tempdir().unwrap();
    let module = deployed("torchrun/muster_torchrun/address.py");
    // Without torch: the module alone.
    let code = "import runpy, sys; f = runpy.run_path(sys.argv[1]); \
                print(f['own_address'](sys.argv[2], f['endpoints'](sys.argv[3])[0]))";
    let told = |lines: &[&str], local: &str, endpoint: &str| {
        let prefix = hosts.prefix_with_hosts(1, &hosts_file(dir.path(), "hosts", lines));
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).args([python(), "-c", code]).arg(&module).args([local, endpoint]);
        Outcome::of(&mut command)
    };
    assert!(hosts.add_default_route(1));
    let table: [(&[&str], &str, &str, &str); 7] = [
        (&["10.77.0.1 head"], "", "head", "10.77.0.2"),
        (&["fd77::1 head"], "", "head:7071", "fd77::2"),
        (&["127.0.1.1 head"], "", "head", "10.77.0.2"),
        (&["::1 head", "fd77::1 head"], "", "http://head/", "fd77::2"),
        (&[], "", "127.0.0.1", "127.0.0.1"),
        (&["127.0.1.1 here", "10.77.0.1 head"], "here", "head", "10.77.0.2"),
        (&[], "10.77.0.2", "nowhere", "10.77.0.2"),
    ];
    for (lines, local, endpoint, expected) in table {
        assert_eq!(told(lines, local, endpoint).ok().trim(), expected, "{lines:?} {local} {endpoint}");
    }
    let refused = told(&[], "", "http://ann:geheim@head:7070");
    assert!(refused.code != 0 && refused.stderr.contains("names no user and no password"), "{refused:?}");
    assert!(!refused.stderr.lines().any(|line| line.starts_with("ValueError") && line.contains("geheim")));
}
