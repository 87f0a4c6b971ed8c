//! `cargo xtask bench recovery`: how soon a job trains again after a fault, beside torchrun. Both sides run the same
//! ranks (Gloo, in Python) on two nodes of this machine, in turn; each time is from the first signal of the fault.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::subject::{Event, Shape, Subject, signal_all};
use crate::{load1, median, unix_now};

/// Rounds, unless `--rounds` says otherwise: torchrun takes a minute for some faults.
const ROUNDS: usize = 3;
/// A side that does not train by then counts as not recovered.
const CAP: Duration = Duration::from_mins(1);
/// Longest wait for the start.
const START_MAX: Duration = Duration::from_mins(2);
/// The job trains so long before the fault.
const SETTLE: Duration = Duration::from_secs(1);
const SAMPLE: Duration = Duration::from_millis(5);

const FIXED: Shape = Shape { nnodes: "2", nproc: "1" };
const FOUR: Shape = Shape { nproc: "2", ..FIXED };
const ELASTIC: Shape = Shape { nnodes: "1:2", ..FIXED };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL of one rank.
    Rank,
    /// SIGKILL of everything on a node, and nobody comes in its place.
    Node,
    /// The same, and a daemon of that name is there at once.
    NodeReplaced,
    /// SIGSTOP of everything on a node.
    NodeFrozen,
    /// SIGKILL of a node's daemon alone, which is started again at once.
    Daemon,
}

struct Case {
    name: &'static str,
    fault: Fault,
    shape: Shape,
    /// Muster's lease; empty for its default of 10 s.
    lease: &'static str,
    /// torchrun with the shortest times that it takes.
    tuned: bool,
}

const fn case(name: &'static str, fault: Fault, shape: Shape, tuned: bool) -> Case {
    Case { name, fault, shape, lease: if tuned { "1s" } else { "" }, tuned }
}

const CASES: [Case; 8] = [
    case("rank killed", Fault::Rank, FOUR, false),
    case("rank killed, tuned", Fault::Rank, FOUR, true),
    case("node killed", Fault::Node, ELASTIC, false),
    case("node killed, tuned", Fault::Node, ELASTIC, true),
    case("node replaced at once", Fault::NodeReplaced, FIXED, false),
    case("node frozen", Fault::NodeFrozen, ELASTIC, false),
    case("node frozen, tuned", Fault::NodeFrozen, ELASTIC, true),
    case("daemon killed", Fault::Daemon, FIXED, false),
];

/// What one run showed; a time is infinite if it did not come within [`CAP`].
#[derive(Clone, Copy, Debug)]
struct Recovered {
    /// To the first instruction of the last rank of the next generation; nothing is spawned where ranks are kept.
    spawned_ms: f64,
    /// To the end of its first collective.
    ready_ms: f64,
    /// To the new daemon's taking over the old one's ranks and joining.
    adopted_ms: f64,
    /// Longest time without a step, over the fault.
    pause_ms: f64,
    /// Ranks of the old generation that train on beside the new one.
    zombies: usize,
}

/// Runs the cases, or those whose name contains `--only`.
pub(crate) fn run(root: &Path, args: &[String]) {
    let option = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    let rounds = option("--rounds").map_or(ROUNDS, |rounds| rounds.parse().expect("--rounds takes a number"));
    let only = option("--only").map_or("", String::as_str);
    let python = root.join(".deps/python/bin/python3");
    let probe = root.join("tests/bench/probe.py");
    assert!(python.is_file(), "Python's torch is not there; run this as `cargo xtask bench`");
    // The first import reads a gigabyte from the disk; no side is to pay for that.
    let warm = Command::new(&python).args(["-c", "import torch.distributed.run"]).status();
    assert!(warm.is_ok_and(|status| status.success()), "{} cannot import torch", python.display());
    let cases: Vec<&Case> = CASES.iter().filter(|case| case.name.contains(only)).collect();
    let mut seen: Vec<[Vec<Recovered>; 2]> = cases.iter().map(|_| [Vec::new(), Vec::new()]).collect();
    for round in 1..=rounds {
        for (case, seen) in cases.iter().zip(&mut seen) {
            for (side, seen) in ["muster", "torchrun"].into_iter().zip(seen) {
                let subject = match side {
                    "muster" => Subject::muster(case.shape, case.lease, &python, &probe),
                    _ => Subject::torchrun(case.shape, case.tuned, &python, &probe),
                };
                let recovered = once(case, subject);
                eprintln!("round {round}, {}, {side}: {recovered:?}, load {}", case.name, load1());
                seen.push(recovered);
            }
        }
    }
    table(&cases, &seen);
    println!("\n{}", summary(&cases, &seen, rounds));
}

/// Starts the job, hurts it, and watches.
fn once(case: &Case, mut subject: Subject) -> Recovered {
    let began = Instant::now();
    let ranks = loop {
        let ranks = generation(&subject.events(), 0.0);
        // Tuned, torchrun may start with the first node alone.
        if let Some(ranks) = ranks.filter(|ranks| ranks.len() == case.shape.ranks()) {
            break ranks;
        }
        assert!(began.elapsed() < START_MAX, "the job did not start: {}", subject.last_words());
        std::thread::sleep(SAMPLE);
    };
    std::thread::sleep(SETTLE);
    let old: Vec<i32> = ranks.iter().map(|event| event.pid).collect();
    let node = subject.second_node();
    let hurt = unix_now();
    match case.fault {
        Fault::Rank => signal_all(&[last_of(&old, &node)], Signal::SIGKILL),
        Fault::Node | Fault::NodeReplaced => signal_all(&node, Signal::SIGKILL),
        Fault::NodeFrozen => signal_all(&node, Signal::SIGSTOP),
        Fault::Daemon => signal_all(&node[..1], Signal::SIGKILL),
    }
    if matches!(case.fault, Fault::NodeReplaced | Fault::Daemon) {
        subject.restart_daemon();
    }
    let ms = |time: f64| (time - hurt) * 1000.0;
    let mut recovered = Recovered {
        spawned_ms: f64::INFINITY,
        ready_ms: f64::INFINITY,
        adopted_ms: f64::INFINITY,
        pause_ms: f64::INFINITY,
        zombies: 0,
    };
    let began = Instant::now();
    while began.elapsed() < CAP {
        let events = subject.events();
        if subject.adoptions() > 0 {
            recovered.adopted_ms = ms(unix_now());
            assert!(old.iter().all(|pid| muster_tests::is_running(*pid)), "a rank was touched");
            // A step after it shows that they train on.
            std::thread::sleep(SETTLE);
            recovered.pause_ms = pause(&subject.events(), hurt);
            break;
        }
        if let Some(next) = generation(&events, hurt) {
            let spawned = events.iter().filter(|event| event.what == "spawned");
            let of_next = spawned.filter(|event| next.iter().any(|ready| ready.pid == event.pid));
            recovered.spawned_ms = ms(latest(of_next));
            recovered.ready_ms = ms(latest(next.iter()));
            let ready = latest(next.iter());
            std::thread::sleep(SETTLE);
            let events = subject.events();
            let late = |pid: &&i32| events.iter().any(|event| event.pid == **pid && event.time > ready);
            recovered.zombies = old.iter().filter(late).count();
            recovered.pause_ms = pause(&events, hurt);
            break;
        }
        std::thread::sleep(SAMPLE);
    }
    recovered
}

/// The rank of the node that stands last.
fn last_of(ranks: &[i32], node: &[i32]) -> i32 {
    *ranks.iter().rfind(|rank| node.contains(rank)).expect("the second node has ranks")
}

/// The newest generation of which all ranks became ready after this time.
fn generation(events: &[Event], after: f64) -> Option<Vec<Event>> {
    let ready: Vec<&Event> =
        events.iter().filter(|event| event.what == "ready" && event.time > after).collect();
    let of = |token: &str| ready.iter().filter(|event| event.token == token).copied().cloned().collect();
    let whole = |all: &Vec<Event>| all.len() == all[0].world;
    ready.iter().rev().map(|event| of(&event.token)).find(whole)
}

fn latest<'a>(events: impl Iterator<Item = &'a Event>) -> f64 {
    events.map(|event| event.time).fold(f64::NEG_INFINITY, f64::max)
}

/// Longest time without a step of anybody, that ended after the fault.
fn pause(events: &[Event], hurt: f64) -> f64 {
    let mut steps: Vec<f64> =
        events.iter().filter(|event| event.what == "step").map(|event| event.time).collect();
    steps.sort_by(f64::total_cmp);
    let gaps = steps.windows(2).filter(|pair| pair[1] > hurt).map(|pair| (pair[1] - pair[0]) * 1000.0);
    gaps.fold(0.0, f64::max)
}

impl Recovered {
    /// When all is well again: the ranks train, or the daemon holds the ranks that never stopped.
    fn back_ms(&self) -> f64 {
        self.ready_ms.min(self.adopted_ms)
    }
}

fn table(cases: &[&Case], seen: &[[Vec<Recovered>; 2]]) {
    let cell = |ms: f64| if ms.is_finite() { format!("{ms:.0}") } else { format!("> {}", CAP.as_millis()) };
    let heads = ["muster", "torchrun", "ratio"];
    println!("\n{:<24}{:^32}{:^32}{:^32}", "median, ms", "spawned", "back", "longest pause");
    print!("{:<24}", "");
    (0..3).for_each(|_| print!("{:>11}{:>11}{:>10}", heads[0], heads[1], heads[2]));
    println!();
    let values: [fn(&Recovered) -> f64; 3] =
        [|seen| seen.spawned_ms, Recovered::back_ms, |seen| seen.pause_ms];
    for (case, [ours, theirs]) in cases.iter().zip(seen) {
        print!("{:<24}", case.name);
        for (at, value) in values.into_iter().enumerate() {
            let both = [ours, theirs].map(|all| median(all.iter().map(value)));
            // Ranks that were taken over were not spawned.
            let kept =
                at == 0 && both[0].is_infinite() && median(ours.iter().map(Recovered::back_ms)).is_finite();
            let first = if kept { "kept".to_owned() } else { cell(both[0]) };
            print!("{first:>11}{:>11}{:>10}", cell(both[1]), ratio(both));
        }
        println!();
    }
}

/// Of medians, ours to theirs; where the peer did not recover it is less than what is said.
fn ratio([ours, theirs]: [f64; 2]) -> String {
    match (ours.is_finite(), theirs.is_finite()) {
        (true, true) => format!("{:.3}x", ours / theirs),
        (true, false) => format!("<{:.3}x", ours / (CAP.as_secs_f64() * 1000.0)),
        (false, _) => "-".to_owned(),
    }
}

fn summary(cases: &[&Case], seen: &[[Vec<Recovered>; 2]], rounds: usize) -> Value {
    let side = |all: &[Recovered]| {
        // What did not come within the cap is null.
        let times = |value: fn(&Recovered) -> f64| {
            let all: Vec<f64> = all.iter().map(|seen| (value(seen) * 10.0).round() / 10.0).collect();
            json!({"median": median(all.iter().copied()), "all": all})
        };
        json!({
            "spawned_ms": times(|seen| seen.spawned_ms), "back_ms": times(Recovered::back_ms),
            "pause_ms": times(|seen| seen.pause_ms), "zombies": all.iter().map(|seen| seen.zombies).max(),
        })
    };
    let each = cases.iter().zip(seen).map(|(case, [ours, theirs])| {
        (case.name.to_owned(), json!({"muster": side(ours), "torchrun": side(theirs)}))
    });
    let cases: serde_json::Map<String, Value> = each.collect();
    let cap = CAP.as_secs() * 1000;
    json!({"bench": "recovery", "rounds": rounds, "cap_ms": cap, "load1": load1(), "cases": cases})
}
