//! Points from a rank's socket: numbered, in order, each until it is acknowledged, whatever else is sent.

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::*;
use v1::session_request::Message as Up;

/// A rank that says where its socket is and ends when the file `done` is there.
pub const REPORTER: &str = "echo $MUSTER_TELEMETRY > $DIR/socket$LOCAL_RANK; \
                        while [ ! -e $DIR/done ]; do sleep 0.02; done";

pub async fn connect(world: &World, local_rank: u32) -> UnixStream {
    let path = text_of(&world.path(&format!("socket{local_rank}"))).await;
    UnixStream::connect(path.trim()).await.unwrap()
}

pub async fn report(rank: &mut UnixStream, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        let line = format!("{{\"step\":{step},\"values\":{{\"loss\":{}}}}}\n", 1.0 / step as f64);
        rank.write_all(line.as_bytes()).await.unwrap();
    }
}

fn seqs(points: &[v1::Point]) -> Vec<u64> {
    points.iter().map(|point| point.seq).collect()
}

async fn wait_for_points(world: &World, count: usize) -> Vec<v1::Point> {
    eventually("points", || {
        let points = world.coordinator.points();
        if points.len() >= count { Ok(points) } else { Err(seqs(&points)) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn points_are_numbered_and_what_is_no_point_is_passed_over() {
    let world = World::start().await;
    let gang = gang(&world, "j1", REPORTER);
    world.want(&gang, DesiredPhase::Running).await;
    let mut rank = connect(&world, 0).await;
    report(&mut rank, 1..=2).await;
    rank.write_all(b"no point\n\xff\xfe\n{\"step\":3,\"values\":{\"a\":1e999}}\n").await.unwrap();
    rank.write_all(&vec![b'x'; 200_000]).await.unwrap();
    rank.write_all(b"\n{\"step\":4,\"time\":1700000000.25,\"values\":{\"loss\":null,\"lr\":0.5}}\n")
        .await
        .unwrap();
    let points = wait_for_points(&world, 3).await;
    assert_eq!(seqs(&points), [1, 2, 3], "numbered without a gap");
    let last = &points[2];
    assert_eq!((last.step, last.generation, last.rank), (Some(4), 1, Some(0)));
    assert_eq!(last.values, [("lr".to_owned(), 0.5)].into());
    assert_eq!(last.time.as_ref().map(|time| (time.seconds, time.nanos)), Some((1_700_000_000, 250_000_000)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_break_exactly_what_was_not_acknowledged_is_sent_again() {
    let world = World::start().await;
    world.coordinator.state().acks_points = false;
    let gang = gang(&world, "j1", REPORTER);
    world.coordinator.state().desired =
        vec![v1::Assignment { phase: DesiredPhase::Running.into(), ..gang.clone() }];
    world.want(&gang, DesiredPhase::Running).await;
    let mut rank = connect(&world, 0).await;
    report(&mut rank, 1..=10).await;
    assert_eq!(seqs(&wait_for_points(&world, 10).await), (1..=10).collect::<Vec<_>>());
    let ack = v1::PointAck { job_id: "j1".into(), generation: 1, rank: 0, seq: 4, again: false };
    world.coordinator.say(Down::PointAck(ack)).await;
    // What is said in one session is heard in order: the answer shows that the acknowledgement was heard.
    let other = super::gang(&world, "j2", "true");
    world.run(&other).await;
    world.coordinator.break_session(tonic::Status::unavailable("the coordinator is restarted")).await;
    report(&mut rank, 11..=12).await;
    world.session(2).await;
    let points = wait_for_points(&world, 18).await;
    assert_eq!(seqs(&points[10..]), (5..=12).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_points_of_an_ordinary_rank_come_before_the_news_of_its_end() {
    let world = World::start().await;
    let gang = with_ranks(gang(&world, "j1", REPORTER), 2);
    world.want(&gang, DesiredPhase::Running).await;
    let mut ranks = vec![connect(&world, 0).await, connect(&world, 1).await];
    for rank in &mut ranks {
        report(rank, 1..=300).await;
    }
    drop(ranks);
    std::fs::write(world.path("done"), "").unwrap();
    world.observe(&gang, ObservedPhase::Stopped).await;
    let heard = world.coordinator.state().heard.clone();
    let (mut last, mut ended) = ([0; 2], 0);
    for message in heard {
        match message {
            Up::Points(batch) => {
                for point in batch.points {
                    last[point.rank() as usize] = point.seq;
                }
            }
            Up::Gang(report) => {
                for exit in &report.exits {
                    assert_eq!(last[exit.rank() as usize], 300, "{report:?}");
                    ended += 1;
                }
            }
            _ => {}
        }
    }
    assert!(ended >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_is_said_although_no_point_is_taken_and_the_points_outlive_the_gang() {
    let world = World::start().await;
    world.coordinator.state().acks_points = false;
    let gang = with_ranks(gang(&world, "j1", REPORTER), 2);
    world.want(&gang, DesiredPhase::Running).await;
    let mut ranks = vec![connect(&world, 0).await, connect(&world, 1).await];
    for rank in &mut ranks {
        report(rank, 1..=3000).await;
    }
    drop(ranks);
    std::fs::write(world.path("done"), "").unwrap();
    world.observe(&gang, ObservedPhase::Stopped).await;
    let sent = world.coordinator.points().len();
    assert!(sent < 6000, "more than fits the window waits on the disk: {sent} were sent");

    // Forgotten, they are still owed: nobody has acknowledged them.
    world.want(&gang, DesiredPhase::Forgotten).await;
    world.run(&super::gang(&world, "j2", "true")).await;
    world.coordinator.state().acks_points = true;
    world.coordinator.break_session(tonic::Status::unavailable("the coordinator is restarted")).await;
    // The first of each that comes again is answered with all that is known, and the rest is not sent.
    let run = world.path("data/run");
    eventually("the end of the shims", || holds(std::fs::read_dir(&run).unwrap().count() == 0)).await;
    assert!((0..2).all(|rank| world.coordinator.kept(&gang, rank).len() == 3000));
    world.session(2).await;
    let (result, coordinator) = world.end().await;
    result.unwrap();
    let sent = coordinator.points().len();
    assert!((6001..=12_000).contains(&sent), "what the first session did not acknowledge came again: {sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_reads_nothing_can_still_stop_a_rank_that_floods() {
    let world = World::start().await;
    let gang = gang(&world, "j1", REPORTER);
    world.want(&gang, DesiredPhase::Running).await;
    let mut rank = connect(&world, 0).await;
    world.coordinator.read(false);
    let flood = tokio::spawn(async move {
        let values: Vec<_> = (0..60).map(|i| format!("\"{i:0>100}\":{i}")).collect();
        let line = format!("{{\"step\":1,\"values\":{{{}}}}}\n", values.join(","));
        // Until nobody reads any more.
        while rank.write_all(line.as_bytes()).await.is_ok() {}
    });
    let pid_of = || {
        std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let environ = std::fs::read(entry.path().join("environ")).ok()?;
            let mark = world.log_dir(&gang, 0).join("error.json");
            let text = String::from_utf8_lossy(&environ).into_owned();
            text.contains(mark.to_str()?).then(|| entry.file_name().to_str()?.parse::<i32>().ok())?
        })
    };
    let pid = eventually("the rank", || pid_of().ok_or(())).await;
    // More than the connection holds.
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.want(&gang, DesiredPhase::Stopped).await;
    gone(pid).await;
    flood.await.unwrap();
    world.coordinator.read(true);
    world.observe(&gang, ObservedPhase::Stopped).await;
    let points = world.coordinator.points();
    assert!(points.windows(2).all(|pair| pair[0].seq < pair[1].seq), "in order, dropped ones apart");
}
