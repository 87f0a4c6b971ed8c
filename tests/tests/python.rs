//! Python programs that know nothing of Muster, with the real torch.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use muster_tests::{Cluster, Outcome, Place, Settings, files, lines, run_dir, skip, torch_python};

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

fn run(place: &Place, args: &[&str]) -> Outcome {
    let python = torch_python().unwrap();
    // torch keeps it, wherever it is.
    let cache = place.path("cache");
    let outcome =
        Outcome::of(place.command(args).env("PYTHON_EXEC", python).env("TORCHINDUCTOR_CACHE_DIR", cache));
    place.nothing_is_left();
    outcome
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
    assert!(failed.stderr.contains("in main\n    raise ValueError"), "{failed:?}");
    let error = files(&run_dir(&logs)).remove("attempt_0/1/error.json").unwrap();
    assert!(error.contains("bad batch at step 1") && error.contains("py_callstack"), "{error}");
}

#[test]
fn a_cluster_runs_it_as_it_is() {
    let Some(place) = place("Python on a cluster") else { return };
    let cluster = Cluster::start(Settings { workers: 2, ..Settings::default() });
    let dir = place.path("");
    let [python, dir] =
        [torch_python().unwrap(), dir].map(|path: std::path::PathBuf| path.display().to_string());
    let program = Path::new(&dir).join("ddp.py").display().to_string();
    let args = ["submit", "--follow", "--nnodes", "2", "--working-dir", &dir, "--", &python, "-u", &program];
    let outcome = cluster.muster(&args);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.stdout.starts_with("0 0/2 "), "{outcome:?}");
}
