//! How long ranks take to meet in `init_process_group`, from when the last of them has torch: with the store in the shim of
//! `muster run`, in the agent of torchrun, and in rank 0 itself. In one run, in turn. The last line is JSON.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::median;

/// Rounds counted; one more before them.
const ROUNDS: usize = 15;
const RANKS: usize = 2;
const SIDES: [&str; 3] = ["muster run", "torchrun", "rank 0 hosts"];

/// Runs the bench.
pub(crate) fn run(root: &Path) {
    let python = root.join(".deps/python/bin/python3");
    assert!(python.is_file(), "Python's torch is not there; run this as `cargo xtask bench init`");
    let program = root.join("tests/bench/init.py");
    let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        for side in SIDES {
            let ms = measure(side, &python, &program);
            println!("{}", json!({ "bench": "init", "side": side, "round": round, "ms": ms }));
            if round > 0 {
                all.entry(side).or_default().push(ms);
            }
        }
    }
    println!("\n{:<20}{:>12}{:>12}", "ms", "median", "longest");
    let mut last: BTreeMap<&str, Value> = BTreeMap::new();
    for side in SIDES {
        let (median, longest) =
            (median(all[side].iter().copied()), all[side].iter().copied().fold(0.0, f64::max));
        println!("{side:<20}{median:>12.1}{longest:>12.1}");
        last.insert(side, json!({ "median": median, "longest": longest }));
    }
    println!("{}", json!({ "bench": "init", "rounds": ROUNDS, "ranks": RANKS, "ms": last }));
}

fn measure(side: &str, python: &Path, program: &Path) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let port = muster_tests::free_port();
    let ranks: Vec<Child> = commands(side, python, &port)
        .into_iter()
        .map(|mut command| {
            command
                .arg(program)
                .arg(dir.path())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.env("OMP_NUM_THREADS", "1").spawn().unwrap()
        })
        .collect();
    for mut rank in ranks {
        assert!(rank.wait().unwrap().success(), "{side}");
    }
    let mut times = [0.0_f64; 2];
    for rank in 0..RANKS {
        let said = std::fs::read_to_string(dir.path().join(rank.to_string())).unwrap();
        for (time, word) in times.iter_mut().zip(said.split(' ')) {
            *time = time.max(word.parse().unwrap());
        }
    }
    (times[1] - times[0]) * 1e3
}

fn commands(side: &str, python: &Path, port: &str) -> Vec<Command> {
    let launcher = |mut command: Command| {
        command.args([format!("--nproc-per-node={RANKS}"), format!("--master-port={port}")]);
        command.env("PYTHON_EXEC", python);
        vec![command]
    };
    match side {
        "muster run" => {
            let mut command = Command::new(muster_tests::binary("muster"));
            command.arg("run");
            launcher(command)
        }
        "torchrun" => {
            let mut command = Command::new(python);
            command.args(["-m", "torch.distributed.run"]);
            launcher(command)
        }
        _ => {
            let rank = |rank: usize| {
                let mut command = Command::new(python);
                command.env("RANK", rank.to_string()).env("WORLD_SIZE", RANKS.to_string());
                command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port);
                command
            };
            (0..RANKS).map(rank).collect()
        }
    }
}
