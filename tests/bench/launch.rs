//! A program that does nothing under `muster run`, `muster submit`, Slurm's srun and torchrun, in one run, in turn: how soon its
//! ranks run, how soon the command is over when they are, and what it costs. The last line is JSON.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use muster_tests::{Cluster, Settings, Slurm};
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

/// What each rank is: it writes down when it ran, and ends.
pub(crate) fn stamp(dir: &Path) {
    let now = now_ms();
    std::fs::write(dir.join(std::process::id().to_string()), now.to_string()).unwrap();
}

/// Of the clock that all processes share.
fn now_ms() -> f64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as f64 * 1e3 + now.tv_nsec() as f64 / 1e6
}

/// Who starts it: ourselves without daemons, ourselves and Slurm with daemons that are there already, and torchrun.
const SIDES: [&str; 4] = ["muster run", "muster submit", "srun", "torchrun"];

/// What is there before a command is typed.
struct Bench {
    python: PathBuf,
    cluster: Cluster,
    slurm: Option<Slurm>,
}

type Measured = BTreeMap<&'static str, f64>;

/// Runs the bench.
pub(crate) fn run(root: &Path) {
    let python = root.join(".deps/python/bin/python3");
    assert!(python.is_file(), "Python's torch is not there; run this as `cargo xtask bench launch`");
    // As they are by default: no time is set for a test's sake.
    let cluster = Cluster::start(Settings { workers: 2, lease: "", ..Settings::default() });
    let bench = Bench { python, cluster, slurm: Slurm::start(2) };
    if bench.slurm.is_none() {
        muster_tests::skip("srun", "there is no Slurm; `cargo xtask setup --tools` brings one");
    }
    let sides: Vec<&'static str> =
        SIDES.into_iter().filter(|side| *side != "srun" || bench.slurm.is_some()).collect();
    let mut all: BTreeMap<(String, &str), Vec<Measured>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        for (nodes, procs) in SHAPES {
            // Nobody always comes after torchrun, which leaves little of anybody else's in the caches.
            for side in sides.iter().cycle().skip(round).take(sides.len()) {
                let measured = bench.measure(side, nodes, procs);
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
    let row = |title: &str, cells: Vec<String>| {
        let cells = cells.iter().fold(String::new(), |row, cell| format!("{row}{cell:>15}"));
        println!("{title:<34}{cells}");
    };
    println!();
    row("median", sides.iter().map(ToString::to_string).collect());
    let mut last: BTreeMap<String, Value> = BTreeMap::new();
    for (nodes, procs) in SHAPES {
        let shape = format!("{nodes}x{procs}");
        let of = |side: &'static str| &all[&(shape.clone(), side)];
        for name in of("muster run")[0].keys() {
            let medians: Vec<f64> =
                sides.iter().map(|side| median(of(side).iter().map(|round| round[name]))).collect();
            let title = format!("{shape} {name}");
            row(&title, medians.iter().map(|median| format!("{median:.1}")).collect());
            let medians: BTreeMap<&str, f64> = sides.iter().copied().zip(medians).collect();
            last.insert(title, json!(medians));
        }
    }
    println!("{}", json!({ "bench": "launch", "rounds": ROUNDS, "medians": last }));
}

impl Bench {
    fn measure(&self, side: &str, nodes: usize, procs: usize) -> Measured {
        let port = muster_tests::free_port();
        let stamps = tempfile::tempdir().unwrap();
        let mut commands = self.commands(side, nodes, procs, &port);
        for command in &mut commands {
            command.arg(std::env::current_exe().unwrap()).arg("stamp").arg(stamps.path());
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        }
        let cpu_before = cpu_ms();
        let began = now_ms();
        let commands: Vec<Child> = commands.iter_mut().map(|command| command.spawn().unwrap()).collect();
        let ends: Vec<(f64, f64)> = commands.into_iter().map(follow).collect();
        let stamp = |entry: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(entry.unwrap().path()).unwrap().parse::<f64>().unwrap()
        };
        let stamps: Vec<f64> = stamps.path().read_dir().unwrap().map(stamp).collect();
        assert_eq!(stamps.len(), nodes * procs, "{side}: {ends:?}");
        let last = stamps.into_iter().fold(0.0, f64::max);
        let over = ends.iter().map(|(at, _)| *at).fold(0.0, f64::max);
        BTreeMap::from([
            ("until all ranks run, ms", last - began),
            ("until the command is over, ms", over - last),
            ("processor time, ms", cpu_ms() - cpu_before),
            ("memory of a command, MiB", ends.iter().map(|(_, mib)| *mib).fold(0.0, f64::max)),
        ])
    }

    /// What is typed: on each node, or once where daemons are there.
    fn commands(&self, side: &str, nodes: usize, procs: usize, port: &str) -> Vec<Command> {
        let here = |node: usize| {
            let mut command = if side == "torchrun" {
                let mut command = Command::new(&self.python);
                command.args(["-m", "torch.distributed.run"]);
                command
            } else {
                let mut command = Command::new(muster_tests::binary("muster"));
                command.arg("run");
                command
            };
            command.args([
                format!("--nnodes={nodes}"),
                format!("--nproc-per-node={procs}"),
                format!("--node-rank={node}"),
            ]);
            command.args(["--master-port", port, "--no-python"]);
            command
        };
        match side {
            "srun" => {
                let mut command = self.slurm.as_ref().unwrap().command("srun");
                let ranks = nodes * procs;
                command.args([
                    format!("--nodes={nodes}"),
                    format!("--ntasks={ranks}"),
                    "--overlap".to_owned(),
                ]);
                vec![command]
            }
            "muster submit" => {
                let mut command = Command::new(muster_tests::binary("muster"));
                command.args(["submit", "--follow", "--coordinator", &self.cluster.url()]);
                command.args([
                    format!("--nnodes={nodes}"),
                    format!("--nproc-per-node={procs}"),
                    "--".to_owned(),
                ]);
                vec![command]
            }
            _ => (0..nodes).map(here).collect(),
        }
    }
}

/// When a command was over, and the most memory it had, as far as that was seen.
fn follow(mut child: Child) -> (f64, f64) {
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
    (now_ms(), mib)
}

/// Of all commands that were waited for, with whatever they had waited for.
fn cpu_ms() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let ms = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 * 1e3 + time.tv_usec() as f64 / 1e3;
    ms(usage.user_time()) + ms(usage.system_time())
}
