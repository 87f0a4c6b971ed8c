//! Faults of the network and of machines, with the real gRPC stack between them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::time::Duration;

use muster_network::schedule::{Entry, Fault, random};
use muster_network::user::Wanted;
use muster_network::{Outcome, run};
use muster_proto::v1;

/// Histories in a run of the tests; `MUSTER_NETWORK_SEEDS` asks for more.
const SEEDS: u64 = 8;
/// Faults of one history.
const FAULTS: usize = 14;
/// Simulated time is known to this, in milliseconds.
const TICK: u64 = 20;

fn wanted() -> Vec<Wanted> {
    let job =
        |min_nodes, max_nodes, seconds| Wanted { min_nodes, max_nodes, work: Duration::from_secs(seconds) };
    vec![job(2, 2, 40), job(3, 3, 15), job(1, 4, 30), job(4, 4, 20), job(1, 1, 60)]
}

/// What must hold whatever has happened.
fn check(outcome: &Outcome) {
    for job in &outcome.jobs {
        assert_eq!(job.state(), v1::JobState::Succeeded, "{job:?}");
        // When each generation first ran, and when it was last seen to.
        let mut spans: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for life in outcome.lives.iter().filter(|life| life.gang.job.as_str() == job.id) {
            let (began, ended) = (life.began.0, life.ended.unwrap().0);
            let span = spans.entry(life.gang.generation.0).or_insert((began, ended));
            *span = (span.0.min(began), span.1.max(ended));
        }
        assert!(spans.contains_key(&job.generation.unwrap()), "{job:?} ran as {spans:?}");
        let spans: Vec<_> = spans.into_iter().collect();
        for pair in spans.windows(2) {
            let ((older, (_, ended)), (newer, (began, _))) = (pair[0], pair[1]);
            assert!(
                ended <= began + TICK,
                "{}: generation {older} ran until {ended} ms, {newer} from {began} ms",
                job.id
            );
        }
    }
}

#[test]
fn no_two_generations_run_at_once_and_every_job_ends() {
    let seeds =
        std::env::var("MUSTER_NETWORK_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let (mut generations, mut simulated) = (0, Duration::ZERO);
    for seed in 0..seeds {
        eprintln!("seed {seed}");
        let outcome = run(seed, &wanted(), &random(seed, FAULTS)).unwrap();
        check(&outcome);
        generations += outcome.jobs.iter().map(|job| u64::from(job.generation.unwrap())).sum::<u64>();
        simulated += outcome.elapsed;
    }
    println!("{seeds} seeds, {} s simulated, {generations} generations", simulated.as_secs());
    assert!(generations > 5 * seeds, "the faults have cost no job its ranks: {generations}");
}

#[test]
fn a_coordinator_that_dies_again_and_again_costs_no_rank() {
    let at = Duration::from_secs;
    let faults: Vec<Entry> = (0..8)
        .flat_map(|round| {
            let dies = Entry { at: at(5 + 12 * round), fault: Fault::KillCoordinator };
            // Twice it is away beyond a lease.
            let away = if round % 4 == 3 { 11 } else { 2 };
            [dies, Entry { at: at(5 + 12 * round + away), fault: Fault::StartCoordinator }]
        })
        .collect();
    let outcome = run(1, &wanted(), &faults).unwrap();
    check(&outcome);
    let generations: Vec<u32> = outcome.jobs.iter().filter_map(|job| job.generation).collect();
    assert!(generations.iter().all(|generation| *generation == 1), "{generations:?}");
}

#[test]
fn a_node_that_is_cut_off_is_replaced_and_comes_back() {
    for cut in [Fault::Cut(0), Fault::CutUp(0), Fault::CutDown(0), Fault::Hold(0)] {
        let wanted = [Wanted { min_nodes: 3, max_nodes: 4, work: Duration::from_mins(1) }];
        let faults = [
            Entry { at: Duration::from_secs(10), fault: cut },
            Entry { at: Duration::from_secs(40), fault: Fault::Repair(0) },
        ];
        let outcome = run(7, &wanted, &faults).unwrap();
        check(&outcome);
        let job = &outcome.jobs[0];
        // Once without it, and once with it again. Before, it may have grown by a node that came late.
        let reasons: Vec<&str> = job.past.iter().rev().map(|past| past.reason.as_str()).collect();
        let [_, grown, lost, ..] = reasons[..] else { panic!("{cut:?}: {job:?}") };
        assert!(lost.contains("n0 was lost"), "{cut:?}: {lost}");
        assert!(grown.contains("4 nodes can be had instead of 3"), "{cut:?}: {grown}");
        assert_eq!((job.restarts_used, job.placement.len()), (Some(1), 4), "{cut:?}: {job:?}");
    }
}
