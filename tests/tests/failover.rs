//! Three coordinators, an etcd of three members and two nodes with a running job, under one fault after the other; and
//! what must hold of everything that was recorded.
//!
//! `MUSTER_FAULTS=60` makes it longer, and `MUSTER_SEED` another one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use muster_tests::{Etcd, FAST, Outcome, Several, binary, skip};
use nix::sys::signal::Signal;

/// Faults in the test command, of which each takes some seconds.
const FAULTS: u32 = 8;
/// Longest time in which a rank may show no sign of life: it writes every 20 ms, on a machine that is busy.
const SILENCE_MAX: f64 = 5.0;

/// What is done to whom.
#[derive(Clone, Copy, Debug)]
enum Fault {
    KillLeader,
    StopLeader,
    FreezeLeader { ms: u64 },
    KillFollower,
    KillMember,
    FreezeMember,
    NoQuorum,
    KillDaemon,
}

const KINDS: [Fault; 9] = [
    Fault::KillLeader,
    Fault::FreezeLeader { ms: 4500 },
    Fault::KillMember,
    Fault::StopLeader,
    Fault::NoQuorum,
    Fault::FreezeLeader { ms: 1000 },
    Fault::KillDaemon,
    Fault::FreezeMember,
    Fault::KillFollower,
];

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// Carries a fault out, and undoes it.
fn strike(several: &mut Several, fault: Fault, dice: &mut Dice) {
    let leader = several.leader_now().unwrap_or(0);
    let follower = (leader + 1 + dice.roll(2)) % 3;
    let member = dice.roll(3);
    match fault {
        Fault::KillLeader | Fault::KillFollower => {
            let index = if matches!(fault, Fault::KillLeader) { leader } else { follower };
            several.kill_coordinator(index);
            pause(200 + dice.roll(2000) as u64);
            several.start_coordinator(index);
        }
        Fault::StopLeader => {
            let mut stopped = several.coordinators[leader].take().unwrap();
            stopped.signal(Signal::SIGTERM);
            assert_eq!(stopped.wait(), 0, "{}", stopped.log());
            several.start_coordinator(leader);
        }
        Fault::FreezeLeader { ms } => {
            let frozen = several.coordinators[leader].as_ref().unwrap();
            frozen.signal(Signal::SIGSTOP);
            pause(ms);
            frozen.signal(Signal::SIGCONT);
        }
        Fault::KillMember => {
            several.etcd.kill(member);
            pause(1000 + dice.roll(1000) as u64);
            several.etcd.restart(member);
        }
        Fault::FreezeMember => {
            several.etcd.signal(member, Signal::SIGSTOP);
            pause(2000);
            several.etcd.signal(member, Signal::SIGCONT);
        }
        Fault::NoQuorum => {
            let other = (member + 1) % 3;
            several.etcd.kill(member);
            several.etcd.kill(other);
            // Beyond the leader's lease and the nodes'.
            pause(7000);
            several.etcd.restart(member);
            several.etcd.restart(other);
        }
        Fault::KillDaemon => {
            several.workers[1].kill();
            pause(dice.roll(500) as u64);
            several.workers[1] = several.spawn_worker("n2");
        }
    }
}

/// Somebody who submits jobs all the time, and writes down what was acknowledged: request ids and jobs.
struct Submitter {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<BTreeMap<String, String>>>,
    thread: std::thread::JoinHandle<u32>,
}

impl Submitter {
    fn start(url: String) -> Self {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
        let (stopped, kept) = (stop.clone(), acknowledged.clone());
        let submit = move || {
            let (mut number, mut failures) = (0, 0);
            while !stopped.load(Ordering::Relaxed) {
                let request = format!("request-{number}");
                let mut command = Command::new(binary("muster"));
                let command = command.args(["submit", "--request-id", &request, "--", "true"]);
                let outcome = Outcome::of(command.env("MUSTER_COORDINATOR", &url).stdin(Stdio::null()));
                // One that has failed is made again: it may have been taken, and must not be taken twice.
                if outcome.code == 0 {
                    kept.lock().unwrap().insert(request, outcome.stdout.trim().to_owned());
                    number += 1;
                } else {
                    failures += 1;
                }
                pause(50);
            }
            failures
        };
        Self { stop, acknowledged, thread: std::thread::spawn(submit) }
    }

    fn end(self) -> (BTreeMap<String, String>, u32) {
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.thread.join().unwrap();
        (self.acknowledged.lock().unwrap().clone(), failures)
    }
}

#[test]
fn one_fault_after_the_other_and_the_job_never_notices() {
    let Some(etcd) = Etcd::start(3) else {
        return skip("failover", "there is no etcd here; `cargo xtask test` brings it where it can");
    };
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let faults = number("MUSTER_FAULTS").unwrap_or(FAULTS);
    let mut dice = Dice(u64::from(number("MUSTER_SEED").unwrap_or(1)));
    let mut several = Several::on(etcd, None, 3, 2, &FAST);
    let id = several.submit_beats(&[]);
    let submitter = Submitter::start(several.url());
    for nth in 0..faults {
        let fault = KINDS[(nth as usize) % KINDS.len()];
        println!("fault {nth}: {fault:?}");
        strike(&mut several, fault, &mut dice);
        several.leader();
        several.wait_for_nodes(2);
    }
    let (acknowledged, failures) = submitter.end();
    several.etcd.wait();
    println!("{faults} faults, {} submissions acknowledged, {failures} refused", acknowledged.len());

    // No acknowledged submission is lost, and one request is one job.
    let jobs = several.muster(&["jobs", "--all", "--output", "json"]).json();
    let there: BTreeSet<&str> = jobs.iter().filter_map(|job| job["id"].as_str()).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|(_, job)| !there.contains(job.as_str())).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
    let distinct: BTreeSet<&String> = acknowledged.values().collect();
    assert_eq!(distinct.len(), acknowledged.len(), "one request, one job");
    assert!(jobs.len() <= acknowledged.len() + 2, "the job, and one that nobody waits for any more");
    assert!(acknowledged.len() > faults as usize, "the cluster took work throughout");

    // The job: one generation, no restart, the same processes, alive throughout.
    let job = several.job(&id);
    assert_eq!((&job["state"], &job["generation"]), (&"JOB_STATE_RUNNING".into(), &1.into()), "{job}");
    for queued in acknowledged.values() {
        several.muster(&["cancel", queued]);
    }
    several.end_beats();
    let job = several.wait_for(&id, "SUCCEEDED");
    assert_eq!(job["restartsUsed"], 0, "{job}");
    let beats = several.beats();
    for rank in 0..2 {
        let of_rank: Vec<_> = beats.iter().filter(|beat| beat.rank == rank).collect();
        let processes: BTreeSet<(u32, i32)> =
            of_rank.iter().map(|beat| (beat.generation, beat.pid)).collect();
        assert_eq!(
            processes.len(),
            1,
            "rank {rank} was killed by nothing that is not its own: {processes:?}"
        );
        let silence = of_rank.windows(2).map(|pair| pair[1].time - pair[0].time).fold(0.0, f64::max);
        assert!(silence < SILENCE_MAX, "rank {rank} stood still for {silence} s");
    }

    // One leader's writes at a time, each commit once, and in order: terms rise and are nobody else's.
    let history = several.etcd.history("muster/head");
    let numbers = |head: &String| {
        let mut numbers = head.split(' ').map(|number| number.parse::<u64>().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    };
    let heads: Vec<(u64, u64)> = history.iter().map(numbers).collect();
    assert_eq!(heads[0], (1, 0), "from the first on");
    for pair in heads.windows(2) {
        let ((fence, commits), (next_fence, next_commits)) = (pair[0], pair[1]);
        let begins = next_fence > fence && next_commits == commits;
        let follows = next_fence == fence && next_commits == commits + 1;
        assert!(begins || follows, "{:?} after {:?}", pair[1], pair[0]);
    }
    let terms = several.terms();
    let distinct: BTreeSet<&u64> = terms.iter().collect();
    assert_eq!(distinct.len(), terms.len(), "no two have led under one number: {terms:?}");
    println!("{} commits in {} terms", heads.len(), terms.len());
}
