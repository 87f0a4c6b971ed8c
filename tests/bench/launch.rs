//! A program that does nothing under `muster run` and under torchrun, in one run, in turn: how soon its ranks run, how soon the
//! command is over when they are, and what it costs. The last line is JSON.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::median;

/// Rounds counted; one more before them.
const ROUNDS: usize = 15;
/// Nodes, each a command of its own on this machine, and ranks of each.
const SHAPES: [(usize, usize); 2] = [(1, 2), (2, 1)];
/// Time between looks at the memory of a command.
const SAMPLE: Duration = Duration::from_millis(1);

/// What each rank is: it prints when it ran, and ends.
pub(crate) fn stamp() {
    println!("{}", now_ms());
}

/// Of the clock that all processes share.
fn now_ms() -> f64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as f64 * 1e3 + now.tv_nsec() as f64 / 1e6
}

/// Runs the bench.
pub(crate) fn run(root: &Path) {
    let python = root.join(".deps/python/bin/python3");
    assert!(python.is_file(), "Python's torch is not there; run this as `cargo xtask bench launch`");
    let mut all: BTreeMap<(String, &str), Vec<BTreeMap<&str, f64>>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        for (nodes, procs) in SHAPES {
            for side in ["muster", "torchrun"] {
                let measured = measure(side, &python, nodes, procs);
                let shape = format!("{nodes}x{procs}");
                println!(
                    "{}",
                    json!({ "bench": "launch", "side": side, "shape": shape, "round": round, "measured": measured })
                );
                if round > 0 {
                    all.entry((shape, side)).or_default().push(measured);
                }
            }
        }
    }
    println!("\n{:<34}{:>12}{:>12}{:>10}", "median", "muster", "torchrun", "ratio");
    let mut last: BTreeMap<String, Value> = BTreeMap::new();
    for (nodes, procs) in SHAPES {
        let shape = format!("{nodes}x{procs}");
        let of = |side: &'static str| &all[&(shape.clone(), side)];
        for name in of("muster")[0].keys() {
            let [ours, theirs] =
                ["muster", "torchrun"].map(|side| median(of(side).iter().map(|round| round[name])));
            let (title, ratio) = (format!("{shape} {name}"), ours / theirs);
            println!("{title:<34}{ours:>12.1}{theirs:>12.1}{ratio:>9.3}x");
            last.insert(title, json!({ "muster": ours, "torchrun": theirs, "ratio": ratio }));
        }
    }
    println!("{}", json!({ "bench": "launch", "rounds": ROUNDS, "medians": last }));
}

fn measure(side: &str, python: &Path, nodes: usize, procs: usize) -> BTreeMap<&'static str, f64> {
    let port = muster_tests::free_port();
    let cpu_before = cpu_ms();
    let began = now_ms();
    let commands: Vec<Child> =
        (0..nodes).map(|node| command(side, python, nodes, procs, node, &port).spawn().unwrap()).collect();
    let ends: Vec<(String, f64, f64)> = commands.into_iter().map(follow).collect();
    let stamps: Vec<f64> =
        ends.iter().flat_map(|(said, ..)| said.lines().map(|line| line.parse().unwrap())).collect();
    assert_eq!(stamps.len(), nodes * procs, "{side}: {ends:?}");
    let last = stamps.into_iter().fold(0.0, f64::max);
    let over = ends.iter().map(|(_, at, _)| *at).fold(0.0, f64::max);
    BTreeMap::from([
        ("until all ranks run, ms", last - began),
        ("until the command is over, ms", over - last),
        ("processor time, ms", cpu_ms() - cpu_before),
        ("memory of a command, MiB", ends.iter().map(|(.., mib)| *mib).fold(0.0, f64::max)),
    ])
}

fn command(side: &str, python: &Path, nodes: usize, procs: usize, node: usize, port: &str) -> Command {
    let mut command = if side == "muster" {
        let mut command = Command::new(muster_tests::binary("muster"));
        command.arg("run");
        command
    } else {
        let mut command = Command::new(python);
        command.args(["-m", "torch.distributed.run"]);
        command
    };
    command.args([
        format!("--nnodes={nodes}"),
        format!("--nproc-per-node={procs}"),
        format!("--node-rank={node}"),
    ]);
    command.args(["--master-port", port, "--no-python"]).arg(std::env::current_exe().unwrap()).arg("stamp");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// What a command's ranks said, when it was over, and the most memory it had, as far as that was seen.
fn follow(mut child: Child) -> (String, f64, f64) {
    let status = format!("/proc/{}/status", child.id());
    let mut mib: f64 = 0.0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let highest = text.lines().find_map(|line| {
            line.strip_prefix("VmHWM:")?.trim().trim_end_matches("kB").trim().parse::<f64>().ok()
        });
        mib = mib.max(highest.unwrap_or(0.0) / 1024.0);
        std::thread::sleep(SAMPLE);
    }
    let at = now_ms();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    (said, at, mib)
}

/// Of all commands that were waited for, with whatever they had waited for.
fn cpu_ms() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let ms = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 * 1e3 + time.tv_usec() as f64 / 1e3;
    ms(usage.user_time()) + ms(usage.system_time())
}
