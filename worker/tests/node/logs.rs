//! Output is pulled: as much as was asked for, until the rank has ended, also long after.

use super::*;

fn subscribe(number: u64, gang: &v1::Assignment, rank: u32) -> v1::LogSubscribe {
    v1::LogSubscribe {
        subscription: number,
        job_id: gang.job_id.clone(),
        generation: gang.generation,
        rank,
        stream: v1::LogStream::Stdout.into(),
        offset: 0,
        follow: false,
        credit_bytes: 1 << 20,
        local_rank: rank,
    }
}

/// The bytes of a subscription, whose offsets must follow one another, and its end if it has come.
fn taken(world: &World, number: u64, start: u64) -> (Vec<u8>, Option<v1::LogData>) {
    let (mut bytes, mut end) = (Vec::new(), None);
    for piece in world.coordinator.logs(number) {
        assert!(end.is_none(), "nothing follows the end");
        if let Some(chunk) = &piece.chunk {
            assert_eq!(chunk.offset, start + bytes.len() as u64);
            assert!(chunk.data.len() <= 64 << 10);
            bytes.extend_from_slice(&chunk.data);
        }
        end = (piece.end || !piece.error.is_empty()).then_some(piece);
    }
    (bytes, end)
}

async fn ended(world: &World, number: u64, start: u64) -> (Vec<u8>, v1::LogData) {
    eventually("the end of the output", || match taken(world, number, start) {
        (bytes, Some(end)) => Ok((bytes, end)),
        (bytes, None) => Err(bytes.len()),
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_sent_than_was_asked_for() {
    let world = World::start().await;
    let gang = gang(&world, "j1", "yes 0123456789abcde | head -c 200000");
    world.run(&gang).await;
    let wanted = v1::LogSubscribe { credit_bytes: 100_000, ..subscribe(1, &gang, 0) };
    world.coordinator.say(Down::LogSubscribe(wanted)).await;
    eventually("the first part", || holds(taken(&world, 1, 0).0.len() == 100_000)).await;
    // Another subscription goes its whole way meanwhile.
    world
        .coordinator
        .say(Down::LogSubscribe(v1::LogSubscribe { offset: 150_000, ..subscribe(2, &gang, 0) }))
        .await;
    assert_eq!(ended(&world, 2, 150_000).await.0.len(), 50_000);
    assert_eq!(taken(&world, 1, 0).0.len(), 100_000, "it waits for credit");
    world.coordinator.say(Down::LogCredit(v1::LogCredit { subscription: 1, bytes: 200_000 })).await;
    let (bytes, end) = ended(&world, 1, 0).await;
    assert_eq!(bytes, std::fs::read(world.log_dir(&gang, 0).join("stdout.log")).unwrap());
    assert!(end.end && end.error.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_hears_a_rank_until_that_rank_ends() {
    let world = World::start().await;
    let script = "echo first; while [ ! -e $DIR/go$LOCAL_RANK ]; do sleep 0.02; done; echo last";
    let gang = with_ranks(gang(&world, "j1", script), 2);
    world.want(&gang, DesiredPhase::Running).await;
    world.observe(&gang, ObservedPhase::Running).await;
    for rank in 0..2 {
        let wanted = v1::LogSubscribe { follow: true, ..subscribe(u64::from(rank), &gang, rank) };
        world.coordinator.say(Down::LogSubscribe(wanted)).await;
    }
    for number in 0..2 {
        eventually("the first line", || holds(taken(&world, number, 0).0 == b"first\n")).await;
    }
    std::fs::write(world.path("go0"), "").unwrap();
    assert_eq!(ended(&world, 0, 0).await.0, b"first\nlast\n");
    assert!(taken(&world, 1, 0).1.is_none(), "its sibling still runs");
    world.coordinator.say(Down::LogUnsubscribe(v1::LogUnsubscribe { subscription: 1 })).await;
    std::fs::write(world.path("go1"), "").unwrap();
    world.observe(&gang, ObservedPhase::Stopped).await;
    assert_eq!(taken(&world, 1, 0).0, b"first\n", "nobody listened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_outlives_its_gang_and_what_cannot_be_read_says_why() {
    let world = World::start().await;
    let gang = gang(&world, "j1", "echo kept; echo wrong >&2");
    world.run(&gang).await;
    world.want(&gang, DesiredPhase::Forgotten).await;
    let follow = |wanted| v1::LogSubscribe { follow: true, ..wanted };
    world.coordinator.say(Down::LogSubscribe(follow(subscribe(1, &gang, 0)))).await;
    assert_eq!(ended(&world, 1, 0).await.0, b"kept\n");
    let stderr = v1::LogSubscribe { stream: v1::LogStream::Stderr.into(), ..subscribe(2, &gang, 0) };
    world.coordinator.say(Down::LogSubscribe(stderr)).await;
    assert_eq!(ended(&world, 2, 0).await.0, b"wrong\n");

    let base = || follow(subscribe(0, &gang, 0));
    let table = [
        (v1::LogSubscribe { generation: 7, ..base() }, "rank 0 has written nothing to"),
        (v1::LogSubscribe { local_rank: 9, ..base() }, "rank 0 has written nothing to"),
        (v1::LogSubscribe { job_id: "../../etc".into(), ..base() }, "job_id contains '/'"),
        (v1::LogSubscribe { job_id: "..".into(), ..base() }, "job_id starts with a dot"),
        (v1::LogSubscribe { stream: 0, ..base() }, "the stream is not known"),
        (v1::LogSubscribe { offset: u64::MAX, ..base() }, "failed to read"),
    ];
    for (number, (wanted, expected)) in (10..).zip(table) {
        world.coordinator.say(Down::LogSubscribe(v1::LogSubscribe { subscription: number, ..wanted })).await;
        let (bytes, end) = ended(&world, number, 0).await;
        assert!(bytes.is_empty() && end.error.contains(expected), "{expected}: {end:?}");
    }
}
