//! Python programs that know nothing of Muster, with the real torch.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use muster_tests::{
    Cluster, Nodes, Outcome, Place, Settings, files, free_port, lines, run_dir, skip, torch_python,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// As every tutorial has it.
const DDP: &str = r#"
import argparse, os
import torch, torch.distributed as dist, torch.nn as nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

@record
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fail_at", type=int)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(args.steps):
        if step == args.fail_at and rank == 1 and attempt == 0:
            raise ValueError(f"bad batch at step {step}")
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    total = sum(parameter.sum() for parameter in model.parameters())
    # In one write: the ranks share the terminal.
    print(f"{attempt} {rank}/{dist.get_world_size()} {total.item():.6f}\n", end="")
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"#;

/// A place with the program, if there is a torch to run it.
fn place(what: &str) -> Option<Place> {
    if torch_python().is_none() {
        skip(what, "there is no Python with torch; `cargo xtask bench` brings one");
        return None;
    }
    let place = Place::new();
    std::fs::create_dir(place.path("pkg")).unwrap();
    std::fs::write(place.path("ddp.py"), DDP).unwrap();
    std::fs::write(place.path("pkg/train.py"), DDP).unwrap();
    Some(place)
}

fn command(place: &Place, args: &[&str]) -> std::process::Command {
    let mut command = place.command(args);
    // torch keeps its cache, wherever it is.
    command.env("PYTHON_EXEC", torch_python().unwrap()).env("TORCHINDUCTOR_CACHE_DIR", place.path("cache"));
    command
}

fn run(place: &Place, args: &[&str]) -> Outcome {
    let outcome = Outcome::of(&mut command(place, args));
    place.nothing_is_left();
    outcome
}

/// The same with another program in the place of DDP.
fn run_program(place: &Place, flags: &[&str], program: &str) -> Outcome {
    std::fs::write(place.path("program.py"), program).unwrap();
    run(place, &[flags, &["program.py"]].concat())
}

/// What the ranks printed: all of one attempt, and with the same weights.
fn check(said: &str, attempt: u32, world: usize) {
    let said = lines(said);
    let weights = said.first().and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
    let expected: Vec<String> =
        (0..world).map(|rank| format!("{attempt} {rank}/{world} {weights}")).collect();
    assert_eq!(said, expected);
}

#[test]
fn ddp_trains_unchanged() {
    let Some(place) = place("DDP in Python") else { return };
    let alone = run(&place, &["--standalone", "--nproc-per-node", "2", "ddp.py", "--steps", "5"]);
    assert_eq!(alone.code, 0, "{alone:?}");
    check(&alone.stdout, 0, 2);
    let module = run(&place, &["--nproc-per-node=2", "-m", "pkg.train"]);
    assert_eq!(module.code, 0, "{module:?}");
    check(&module.stdout, 0, 2);
    let path = place.path("ddp.py").display().to_string();
    let by_path = run(&place, &["--run-path", &path, "--steps=1"]);
    assert_eq!(by_path.code, 0, "{by_path:?}");
    check(&by_path.stdout, 0, 1);
}

/// Ranks and nodes come to one port under static, and each to its own under c10d.
#[test]
fn ddp_trains_unchanged_on_several_nodes() {
    let Some(place) = place("DDP in Python on two nodes") else { return };
    let port = free_port();
    let endpoint = format!("localhost:{port}");
    let places: [&[&str]; 2] =
        [&["--master-port", &port], &["--rdzv-backend=c10d", "--rdzv-endpoint", &endpoint]];
    for meeting in places {
        let start = |rank: &&str| {
            let args = ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=1", "--node-rank", rank];
            let program = ["ddp.py", "--fail_at", "1"];
            let mut command = command(&place, &[&args[..], meeting, &program].concat());
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let ends = Nodes(["0", "1"].iter().map(start).collect()).ends();
        assert!(ends.iter().all(|end| end.code == 0), "{ends:?}");
        let said: String = ends.iter().map(|end| end.stdout.as_str()).collect();
        check(&said, 1, 4);
        place.nothing_is_left();
    }
}

#[test]
fn a_crash_is_told_with_its_traceback_and_started_again() {
    let Some(place) = place("a crash in Python") else { return };
    let args = ["--nproc-per-node", "2", "--max-restarts", "1", "ddp.py", "--fail_at", "1"];
    let again = run(&place, &args);
    assert_eq!(again.code, 0, "{again:?}");
    check(&again.stdout, 1, 2);
    assert!(
        again.stderr.contains("exit code 1: ValueError: bad batch at step 1; restart 1 of 1"),
        "{again:?}"
    );
    let logs = place.path("logs");
    let args =
        ["--nproc-per-node", "2", "-r", "3", "--log-dir", logs.to_str().unwrap(), "ddp.py", "--fail_at", "1"];
    let failed = run(&place, &args);
    assert_eq!(failed.code, 1, "{failed:?}");
    assert!(failed.stderr.contains("in main\n      raise ValueError"), "{failed:?}");
    let error = files(&run_dir(&logs)).remove("attempt_0/1/error.json").unwrap();
    assert!(error.contains("bad batch at step 1") && error.contains("py_callstack"), "{error}");
}

#[test]
fn a_cluster_runs_it_as_it_is() {
    let Some(place) = place("Python on a cluster") else { return };
    let cluster = Cluster::start(Settings { workers: 2, ..Settings::default() });
    let (python, dir) = (torch_python().unwrap(), place.path(""));
    let submit = |args: &[&str]| {
        let flags = ["submit", "--follow", "--nnodes", "2", "--python", python.to_str().unwrap()];
        let mut command = cluster.command(&[&flags[..], args].concat());
        Outcome::of(command.current_dir(&dir).env("OUTSIDE", "brought along"))
    };
    let outcome = submit(&["--", "ddp.py", "--steps", "2"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.stdout.starts_with("0 0/2 "), "{outcome:?}");

    std::fs::write(place.path("where.py"), "import os; print(os.getcwd(), os.environ['OUTSIDE'])").unwrap();
    let outcome = submit(&["--env", "OUTSIDE", "--", "where.py"]);
    let dir = dir.canonicalize().unwrap();
    assert_eq!(outcome.stdout, format!("{} brought along\n", dir.display()), "{outcome:?}");

    // Nothing runs anywhere before each node has looked.
    let nothing = submit(&["--", "nothing.py"]);
    assert_eq!(nothing.code, 1, "{nothing:?}");
    assert!(nothing.stderr.contains("nothing.py cannot be read: No such file or directory"), "{nothing:?}");
    let nowhere = submit(&["--working-dir", "/no/such/dir", "--", "ddp.py"]);
    assert!(nowhere.stderr.contains("working_dir /no/such/dir cannot be used"), "{nowhere:?}");
    let python =
        Outcome::of(&mut cluster.command(&["submit", "--follow", "--python", "/no/python", "--", "/x.py"]));
    assert!(python.stderr.contains("program /no/python is not there; install it on this node"), "{python:?}");
}

#[test]
fn ranks_that_hang_in_a_collective_end_when_they_are_told_to() {
    let Some(place) = place("ranks that hang") else { return };
    let program = r#"
import os, signal, time
import torch, torch.distributed as dist
signal.signal(signal.SIGTERM, signal.SIG_IGN)
dist.init_process_group("gloo")
os.write(1, b"ready\n")
if dist.get_rank() == 0:
    time.sleep(1000)
dist.all_reduce(torch.ones(1))
"#;
    std::fs::write(place.path("program.py"), program).unwrap();
    let args = ["--nproc-per-node", "2", "--stop-grace", "500ms", "program.py"];
    let mut hangs = command(&place, &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(hangs.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!([said.next().unwrap(), said.next().unwrap()], ["ready", "ready"]);
    kill(Pid::from_raw(hangs.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(hangs.wait().unwrap().code(), Some(1));
    let mut told = String::new();
    hangs.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert!(told.contains("SIGTERM: the ranks get it too"), "{told}");
    place.nothing_is_left();
}

#[test]
fn what_ranks_fork_ends_with_them() {
    let Some(place) = place("ranks that fork") else { return };
    // As a data loader whose workers are never joined, and one that leaves its session as well.
    let program = r#"
import multiprocessing, os, sys, tempfile, time
import torch
# What it leaves there is its own, as it is killed before it can take it away.
tempfile.tempdir = os.getcwd()
from torch.utils.data import DataLoader, TensorDataset

def sleep():
    os.setsid()
    time.sleep(1000)

if __name__ == "__main__":
    loader = DataLoader(TensorDataset(torch.arange(64.0)), batch_size=8, num_workers=2, persistent_workers=True)
    total = sum(batch[0].sum().item() for batch in loader)
    multiprocessing.get_context("fork").Process(target=sleep, daemon=False).start()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    os.write(1, f"{total}\n".encode())
    os._exit(int(os.environ["RANK"]) * 3)
"#;
    let outcome = run_program(&place, &["--nproc-per-node", "2"], program);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("first to fail: rank 1 of 2"), "{outcome:?}");
    assert_eq!(outcome.stdout.lines().next(), Some("2016.0"), "{outcome:?}");
}

/// Of a hundred bytes each.
const LINES: usize = 1_000_000;

#[test]
fn a_hundred_megabytes_of_output_are_all_there() {
    let Some(place) = place("ranks that print much") else { return };
    let program = format!(
        "import sys\nfor i in range({LINES}):\n    sys.stdout.write(f'{{i:099}}\\n')\n    sys.stderr.write('.' if i % 100 else '\\n')\n"
    );
    let shown = run_program(&place, &[], &program);
    assert_eq!((shown.code, shown.stdout.len(), shown.stderr.len()), (0, LINES * 100, LINES));
    let logs = place.path("logs");
    let teed = run_program(&place, &["--log-dir", logs.to_str().unwrap(), "-t", "1", "-r", "2"], &program);
    assert_eq!(teed.code, 0);
    let last = format!("[default0]:{:099}", LINES - 1);
    assert_eq!((teed.stdout.lines().count(), teed.stdout.lines().last()), (LINES, Some(last.as_str())));
    let found = files(&run_dir(&logs));
    assert_eq!(found["attempt_0/0/stdout.log"], shown.stdout);
    assert_eq!(found["attempt_0/0/stderr.log"].len(), LINES);
}

#[test]
fn a_program_writes_for_tensorboard() {
    let Some(place) = place("TensorBoard") else { return };
    let program = r#"
import os, sys
from torch.utils.tensorboard import SummaryWriter
if os.environ["RANK"] == "0":
    with SummaryWriter("runs/one") as writer:
        for step in range(1, 51):
            writer.add_scalar("loss", 1 / step, step)
            writer.add_scalar("lr", 0.1, step)
            if step == 25:
                writer.flush()
"#;
    let outcome = run_program(&place, &["--nproc-per-node", "2"], program);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let runs = place.path("runs/one");
    assert_eq!(runs.read_dir().unwrap().count(), 1, "as under torchrun, and nothing else");

    // On a cluster its curves are the job's, once each, and nothing of the run before.
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    std::fs::write(place.path("train.py"), program).unwrap();
    let flags =
        ["submit", "--nproc-per-node", "2", "--tensorboard-dir", "runs", "--follow", "--output", "json"];
    let python = ["--python", torch_python().unwrap().to_str().unwrap(), "--", "train.py"].map(str::to_owned);
    let mut command = cluster.command(&flags);
    let job = Outcome::of(command.args(python).current_dir(place.path(""))).json().remove(0);
    assert_eq!((&job["state"], &job["latestStep"]), (&"JOB_STATE_SUCCEEDED".into(), &"50".into()), "{job}");
    let points = cluster.muster(&["metrics", job["id"].as_str().unwrap(), "--output", "json"]).json();
    let found: Vec<_> = points.iter().map(|point| (point["step"].clone(), point["values"].clone())).collect();
    let expected = (1..=50u32).map(|step| {
        let loss: f64 = (1.0 / step as f32).to_string().parse().unwrap();
        (step.to_string().into(), serde_json::json!({ "loss": loss, "lr": 0.1 }))
    });
    assert_eq!(found, expected.collect::<Vec<_>>());
}
