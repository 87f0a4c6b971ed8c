//! The outbox alone, sending from real files.

use super::waiting::{BATCH_BYTES_MAX, BATCH_MAX};
use super::*;
use crate::telemetry::file::Writer;
use crate::telemetry::parse::Reported;
use muster_core::types::{Generation, JobId, Millis};
use prost::Message;

/// An outbox for two ranks, and the files from which it sends.
struct World {
    outbox: Outbox,
    files: [Writer; 2],
    dir: tempfile::TempDir,
}

fn gang() -> GangId {
    GangId { job: JobId::new("j").unwrap(), generation: Generation(1) }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = |rank: u32| {
            let log_dir = log_dir(dir.path(), &gang(), rank);
            std::fs::create_dir_all(&log_dir).unwrap();
            Writer::open(&log_dir).unwrap()
        };
        let files = [file(0), file(1)];
        Self { outbox: outbox(dir.path()), files, dir }
    }

    fn add(&mut self, rank: u32, count: u64, values: &BTreeMap<String, f64>) {
        for step in 0..count {
            let reported = Reported { step, time: Some(Millis(1)), values: values.clone() };
            self.files[rank as usize].add(reported).unwrap();
        }
        self.outbox.add(&gang(), &[Rank(rank)]);
    }

    /// What is given to the session until nothing more can be.
    async fn sent(&self) -> Vec<u64> {
        sent(&self.outbox).await
    }
}

fn outbox(dir: &Path) -> Outbox {
    let outbox = Outbox::default();
    let mut state = outbox.state();
    for rank in 0..2 {
        let path = file::path_in(&log_dir(dir, &gang(), rank));
        state.ranks.insert((gang(), Rank(rank)), Waiting { path, more: true, ..Waiting::default() });
    }
    drop(state);
    outbox
}

async fn sent(outbox: &Outbox) -> Vec<u64> {
    let mut seqs = Vec::new();
    while let Some(batch) = outbox.next_batch().await {
        seqs.extend(batch.points.into_iter().map(|point| point.seq));
    }
    seqs
}

#[tokio::test]
async fn what_is_not_acknowledged_is_sent_again_and_nothing_else() {
    let mut world = World::new();
    world.add(0, 4, &BTreeMap::new());
    assert_eq!(world.sent().await, [1, 2, 3, 4]);
    assert!(world.sent().await.is_empty());
    world.outbox.acknowledge(&gang(), Rank(0), 2);
    world.outbox.rewind();
    assert_eq!(world.sent().await, [3, 4]);
    world.outbox.rewind_to_start();
    assert_eq!(world.sent().await, [1, 2, 3, 4], "another coordinator may lack what this one has");
    world.outbox.end(&gang());
    assert!(world.outbox.holds(&gang()), "the last points outlive their gang");
    world.outbox.acknowledge(&gang(), Rank(0), 4);
    assert!(world.outbox.is_empty() && !world.outbox.holds(&gang()));
}

#[tokio::test]
async fn a_new_daemon_skips_what_the_coordinator_keeps() {
    let mut world = World::new();
    world.add(0, 20_000, &BTreeMap::new());
    let first = world.sent().await;
    let (bytes, batch) = (64 * first.len(), 64 * BATCH_MAX);
    assert!((WINDOW_BYTES_MAX..=WINDOW_BYTES_MAX + batch).contains(&bytes), "no more than may wait: {bytes}");
    assert_eq!(first, (1..=first.len() as u64).collect::<Vec<_>>());
    let next = outbox(world.dir.path());
    assert_eq!(next.next_batch().await.unwrap().points.len(), BATCH_MAX);
    next.acknowledge(&gang(), Rank(0), 19_990);
    assert_eq!(sent(&next).await, (19_991..=20_000).collect::<Vec<_>>());
    next.acknowledge(&gang(), Rank(0), 20_000);
    assert!(next.is_empty());
}

#[tokio::test]
async fn a_batch_of_the_largest_points_fits_a_message() {
    let mut world = World::new();
    let values: BTreeMap<String, f64> = (0..64).map(|i| (format!("{i:0>128}"), 1.0)).collect();
    world.add(0, 1000, &values);
    let mut last = 0;
    while let Some(batch) = world.outbox.next_batch().await {
        assert!(batch.encoded_len() < 2 * BATCH_BYTES_MAX, "{} bytes", batch.encoded_len());
        assert_eq!(batch.points[0].seq, last + 1, "no gap between batches");
        last = batch.points.last().unwrap().seq;
        world.outbox.acknowledge(&gang(), Rank(0), last);
    }
    assert_eq!(last, 1000);
}

#[tokio::test]
async fn a_rank_that_floods_does_not_hold_up_the_others() {
    let mut world = World::new();
    world.add(0, 3 * BATCH_MAX as u64, &BTreeMap::new());
    world.add(1, 1, &BTreeMap::new());
    let mut ranks = Vec::new();
    while let Some(batch) = world.outbox.next_batch().await {
        ranks.push(batch.points[0].rank);
    }
    assert_eq!(ranks, [Some(0), Some(1), Some(0), Some(0)]);
}

#[tokio::test]
async fn what_is_on_its_way_is_bounded_over_all_ranks() {
    let mut world = World::new();
    for rank in 0..2 {
        world.add(rank, 20_000, &BTreeMap::new());
    }
    let sent = world.sent().await;
    assert!(64 * sent.len() < WINDOW_BYTES_MAX + 64 * BATCH_MAX + 64, "{} points", sent.len());
    assert!(sent.iter().filter(|seq| **seq == 1).count() == 2, "both ranks have their part");
    assert!(!world.outbox.is_empty() && !world.outbox.can_send());
    world.outbox.acknowledge(&gang(), Rank(0), BATCH_MAX as u64);
    assert!(world.outbox.can_send(), "what is acknowledged makes room, whoever's it is");
}

#[tokio::test]
async fn what_the_coordinator_had_no_room_for_is_sent_again_and_marked() {
    let mut world = World::new();
    world.add(0, 3 * BATCH_MAX as u64, &BTreeMap::new());
    let first = world.outbox.next_batch().await.unwrap();
    let second = world.outbox.next_batch().await.unwrap();
    assert!(!first.resumes && !second.resumes);
    world.outbox.acknowledge(&gang(), Rank(0), first.points.last().unwrap().seq);
    world.outbox.again(&gang(), Rank(0));
    let again = world.outbox.next_batch().await.unwrap();
    assert_eq!(again.points, second.points);
    assert!(again.resumes, "what came between is passed over until then");
    assert!(!world.outbox.next_batch().await.unwrap().resumes);
}

#[tokio::test(start_paused = true)]
async fn the_news_of_an_end_waits_for_points_that_come_soon_and_not_for_others() {
    let mut world = World::new();
    let awaited = |world: &World| world.outbox.awaited_until(&gang()).is_some();
    world.add(0, 4, &BTreeMap::new());
    world.outbox.exited(&gang(), Rank(0));
    assert!(awaited(&world));
    assert_eq!(world.sent().await, [1, 2, 3, 4]);
    assert!(awaited(&world), "they are on their way");
    world.outbox.acknowledge(&gang(), Rank(0), 4);
    assert!(!awaited(&world));
    world.add(1, 1, &BTreeMap::new());
    world.outbox.exited(&gang(), Rank(1));
    assert!(awaited(&world));
    tokio::time::advance(EXIT_WAIT_MAX).await;
    assert!(!awaited(&world), "nobody acknowledges them");
}

#[tokio::test]
async fn the_last_points_of_a_rank_that_has_ended_go_first() {
    let mut world = World::new();
    world.add(0, 3 * BATCH_MAX as u64, &BTreeMap::new());
    world.add(1, BATCH_MAX as u64 + 1, &BTreeMap::new());
    world.outbox.exited(&gang(), Rank(1));
    let mut ranks = Vec::new();
    while let Some(batch) = world.outbox.next_batch().await {
        ranks.push(batch.points[0].rank.unwrap());
    }
    assert_eq!(ranks, [1, 1, 0, 0, 0]);
}

#[tokio::test]
async fn what_a_shim_still_reads_of_ended_ranks_is_waited_for_after_their_gang_is_forgotten() {
    let mut world = World::new();
    world.outbox.set_draining(&gang(), true);
    world.outbox.exited(&gang(), Rank(0));
    assert!(world.sent().await.is_empty() && world.outbox.awaited_until(&gang()).is_some());
    world.outbox.end(&gang());
    assert!(world.sent().await.is_empty() && world.outbox.holds(&gang()), "more may come");
    let reported = Reported { step: 1, time: Some(Millis(1)), values: BTreeMap::new() };
    world.files[0].add(reported).unwrap();
    world.outbox.set_draining(&gang(), false);
    assert_eq!(world.sent().await, [1], "the last look comes after the last line");
    world.outbox.acknowledge(&gang(), Rank(0), 1);
    world.outbox.settled().await;
    assert!(!world.outbox.holds(&gang()));
}
