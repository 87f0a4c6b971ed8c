//! The store of the ranks beside torch's own libuv server, in one run, in turn: how long ranks take to meet, operations
//! per second, memory. The last line is JSON. Torch's server is spared the name server, on which it waits by itself; see
//! the script that starts it.

mod client;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::median;
use client::Client;

/// Rounds counted; one more before them.
const ROUNDS: usize = 5;
/// Ranks that meet, and how often, one group after the other: the median counts.
const SIZES: [(usize, usize); 3] = [(4, 11), (64, 3), (512, 1)];
/// Beyond so many, ranks do not read each other's addresses one by one, as Gloo has them: that measures patience.
const EXCHANGE_SIZE_MAX: usize = 64;
/// Connections that ask at once.
const CONNECTIONS: usize = 8;
/// Requests of each.
const REQUESTS: usize = 10_000;
/// A rank's address, as long as Gloo's, in bytes.
const ADDRESS: [u8; 200] = [7; 200];

/// One server in a process of its own.
struct Subject {
    child: Child,
    address: SocketAddr,
}

impl Subject {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        // Torch's prints its port alone.
        let port = line.trim().rsplit(':').next().unwrap();
        Self { address: SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().unwrap())), child }
    }

    /// Time on a CPU since its start, in microseconds: with the clients on the same cores, what a request costs the
    /// server itself.
    fn cpu_us(&self) -> f64 {
        const TICKS_PER_SECOND: f64 = 100.0;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        // Of user and system, after the state and ten others.
        let ticks = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum::<f64>();
        ticks * 1e6 / TICKS_PER_SECOND
    }

    /// Resident memory, in MiB.
    fn mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

/// Runs the bench.
pub(crate) fn run(root: &Path) {
    let python = root.join(".deps/python/bin/python3");
    assert!(python.is_file(), "Python's torch is not there; run this as `cargo xtask bench store`");
    let ours = muster_tests::binary("examples/serve");
    let mut all: BTreeMap<&str, Vec<BTreeMap<String, f64>>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        for side in ["muster", "torch"] {
            let command = || match side {
                "muster" => Command::new(&ours),
                _ => torch(&python, root),
            };
            let measured = measure(command, &python, root);
            println!("{}", json!({ "bench": "store", "side": side, "round": round, "measured": measured }));
            if round > 0 {
                all.entry(side).or_default().push(measured);
            }
        }
    }
    let medians = |side: &str| -> BTreeMap<String, f64> {
        let names = all[side][0].keys();
        names.map(|name| (name.clone(), median(all[side].iter().map(|round| round[name])))).collect()
    };
    let (ours, theirs) = (medians("muster"), medians("torch"));
    println!("\n{:<34}{:>12}{:>12}{:>10}", "median", "muster", "torch", "ratio");
    let mut last: BTreeMap<&str, Value> = BTreeMap::new();
    for (name, value) in &ours {
        let (their, ratio) = (theirs[name], value / theirs[name]);
        println!("{name:<34}{value:>12.1}{their:>12.1}{ratio:>9.2}x");
        last.insert(name, json!({ "muster": value, "torch": their, "ratio": ratio }));
    }
    println!("{}", json!({ "bench": "store", "rounds": ROUNDS, "medians": last }));
}

fn torch(python: &Path, root: &Path) -> Command {
    let mut command = Command::new(python);
    command.arg(root.join("worker/tcpstore/tests/conformance/server.py"));
    command
}

/// Everything about one server, each measure on a fresh one.
fn measure(command: impl Fn() -> Command, python: &Path, root: &Path) -> BTreeMap<String, f64> {
    let mut measured = BTreeMap::new();
    let mut note = |name: &str, value: f64| _ = measured.insert(name.to_owned(), value);
    let subject = Subject::start(command());
    note("4 of torch's clients meet, ms", meet_in_python(python, root, subject.address));
    drop(subject);
    for (size, times) in SIZES {
        let subject = Subject::start(command());
        let before = subject.mib();
        // Kept, so that memory is looked at while all are there.
        let (ms, _ranks): (Vec<f64>, Vec<_>) =
            (0..times).map(|turn| meet(subject.address, size, turn)).unzip();
        note(&format!("{size} ranks meet, ms"), median(ms.into_iter()));
        if size == 512 {
            note("memory for 512 ranks, MiB", subject.mib() - before);
            note("memory, MiB", subject.mib());
        }
    }
    let subject = Subject::start(command());
    for (name, request) in REQUEST_KINDS {
        let before = subject.cpu_us();
        note(&format!("{name}/s, 8 connections"), per_second(subject.address, request));
        let requests = (CONNECTIONS * REQUESTS) as f64;
        note(&format!("{name}, us of CPU"), (subject.cpu_us() - before) / requests);
    }
    measured
}

/// From the first connection to the last rank past the barrier, in milliseconds.
fn meet(address: SocketAddr, size: usize, turn: usize) -> (f64, Vec<Client>) {
    let start = Arc::new(Barrier::new(size + 1));
    let rank = |number: usize| {
        let start = start.clone();
        move || {
            start.wait();
            let mut client = Client::join(address);
            client.set(&format!("/{turn}/default_pg/0//cpu//0/{number}"), &ADDRESS);
            let others = if size <= EXCHANGE_SIZE_MAX { 0..size } else { 0..1 };
            for other in others {
                assert_eq!(client.get(&format!("/{turn}/default_pg/0//cpu//0/{other}")), ADDRESS);
            }
            client.barrier(&format!("/{turn}/barrier"), size);
            client
        }
    };
    // A few hundred threads with the usual stacks would be a gigabyte of addresses.
    let spawn = |number| thread::Builder::new().stack_size(128 << 10).spawn(rank(number)).unwrap();
    let ranks: Vec<_> = (0..size).map(spawn).collect();
    start.wait();
    let began = Instant::now();
    let clients: Vec<Client> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    (began.elapsed().as_secs_f64() * 1000.0, clients)
}

fn meet_in_python(python: &Path, root: &Path, address: SocketAddr) -> f64 {
    let script: PathBuf = root.join("tests/bench/store/meet.py");
    let output = Command::new(python).arg(script).arg(address.port().to_string()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    text.trim().parse().unwrap_or_else(|_| panic!("torch's clients did not meet: {error}"))
}

type Ask = fn(&mut Client, usize);

const REQUEST_KINDS: [(&str, Ask); 3] = [
    // Sets have no replies; now and then one looks whether they are done.
    ("set", |client, number| {
        client.set(&format!("/key/{}", number % 100), &ADDRESS);
        if number % 100 == 99 {
            client.wait("/key/0");
        }
    }),
    ("get", |client, number| _ = client.get(&format!("/key/{}", number % 100))),
    ("add", |client, _| _ = client.add("/counter", 1)),
];

fn per_second(address: SocketAddr, ask: Ask) -> f64 {
    let start = Arc::new(Barrier::new(CONNECTIONS + 1));
    let spawn = |_| {
        let start = start.clone();
        thread::spawn(move || {
            let mut client = Client::join(address);
            start.wait();
            for number in 0..REQUESTS {
                ask(&mut client, number);
            }
        })
    };
    let clients: Vec<_> = (0..CONNECTIONS).map(spawn).collect();
    start.wait();
    let began = Instant::now();
    for client in clients {
        client.join().unwrap();
    }
    (CONNECTIONS * REQUESTS) as f64 / began.elapsed().as_secs_f64()
}
