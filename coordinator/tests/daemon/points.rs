//! Points of nodes: those that are slow to be written, and those that are not a node's to report.

use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;

use tokio_stream::StreamExt;

use super::{Coordinator, Session, metric_seqs, points, report, submission};

/// Says points, and hears their acknowledgement: also what is refused is acknowledged, so that a node does not keep it.
async fn acknowledged(session: &mut Session, points: Up) -> u64 {
    session.say(points).await;
    match session.hear().await {
        Down::PointAck(ack) => ack.seq,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn points_count_from_the_node_that_holds_the_rank_alone() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut holder = Session::open(&coordinator, vec![]).await.unwrap();
    assert!(matches!(holder.hear().await, Down::Welcome(_)));
    let mut jobs = coordinator.jobs().await;
    let job = jobs.submit_job(submission("r1")).await.unwrap().into_inner().job.unwrap();
    let prepare = holder.assignment().await;
    holder.say(report(&prepare, v1::ObservedPhase::Prepared, vec![])).await;
    let run = holder.assignment().await;
    let mut stranger = Session::open_as("n2", &coordinator, vec![]).await.unwrap();
    assert!(matches!(stranger.hear().await, Down::Welcome(_)));

    let last = 1 << 63;
    let foreign_rank = |mut up: Up| {
        if let Up::Points(batch) = &mut up {
            batch.points.iter_mut().for_each(|point| point.rank = Some(1));
        }
        up
    };
    assert_eq!(acknowledged(&mut stranger, points(&run, last..=last)).await, last);
    assert_eq!(acknowledged(&mut holder, foreign_rank(points(&run, 1..=9))).await, 9);
    assert_eq!(acknowledged(&mut holder, points(&run, last..=last)).await, last, "its number jumps");
    assert_eq!(acknowledged(&mut holder, points(&run, 1..=3)).await, 3);
    let exit = v1::RankExit { rank: Some(0), code: Some(0), ..Default::default() };
    holder.say(report(&run, v1::ObservedPhase::Running, vec![])).await;
    holder.say(report(&run, v1::ObservedPhase::Stopped, vec![exit])).await;
    assert_eq!(holder.assignment().await.phase(), v1::DesiredPhase::Forgotten);
    assert_eq!(acknowledged(&mut holder, points(&run, 4..=5)).await, 5, "late ones of a gang that has ended");
    coordinator.stop().await;

    let coordinator = Coordinator::start(dir.path()).await;
    for (node, last) in [("n2", 9), ("n1", 7)] {
        let mut session = Session::open_as(node, &coordinator, vec![]).await.unwrap();
        assert!(matches!(session.hear().await, Down::Welcome(_)));
        assert_eq!(acknowledged(&mut session, points(&run, 6..=last)).await, last);
    }
    let seqs = metric_seqs(&mut coordinator.jobs().await, &job.id, false).await;
    assert_eq!(seqs, [1, 2, 3, 4, 5, 6, 7]);
    for (after_index, expected) in [(0, vec![1, 2, 3, 4, 5, 6, 7]), (5, vec![6, 7]), (7, vec![])] {
        let request = v1::StreamMetricsRequest {
            job_id: job.id.clone(),
            full: true,
            after_index,
            ..v1::StreamMetricsRequest::default()
        };
        let stream = coordinator.jobs().await.stream_metrics(request).await.unwrap().into_inner();
        let points: Vec<_> = stream.collect().await;
        let seqs: Vec<u64> = points.into_iter().map(|point| point.unwrap().index).collect();
        assert_eq!(seqs, expected, "from the file, after {after_index}");
    }
    coordinator.stop().await;
}

#[tokio::test]
async fn a_disk_that_hangs_under_points_holds_up_nothing_else_that_a_node_says() {
    let dir = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(dir.path()).await;
    let mut session = Session::open(&coordinator, vec![]).await.unwrap();
    assert!(matches!(session.hear().await, Down::Welcome(_)));
    let mut jobs = coordinator.jobs().await;
    let job = jobs.submit_job(submission("r1")).await.unwrap().into_inner().job.unwrap();
    let prepare = session.assignment().await;
    session.say(report(&prepare, v1::ObservedPhase::Prepared, vec![])).await;
    let run = session.assignment().await;
    session.say(points(&run, 1..=3)).await;
    assert!(matches!(session.hear().await, Down::PointAck(ack) if ack.seq == 3));

    // Whoever opens a pipe to write waits until somebody reads.
    let file = dir.path().join(format!("metrics/{}.jsonl", job.id));
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    session.say(points(&run, 4..=5)).await;
    session.say(Up::Heartbeat(v1::Heartbeat { seq: 7 })).await;
    assert!(matches!(session.hear().await, Down::HeartbeatAck(ack) if ack.seq == 7));
    let exit = v1::RankExit { rank: Some(0), code: Some(0), ..Default::default() };
    session.say(report(&run, v1::ObservedPhase::Stopped, vec![exit])).await;
    let forget = session.assignment().await;
    assert_eq!(forget.phase(), v1::DesiredPhase::Forgotten, "the end does not wait for points either");

    // Points that are written after the end of their job count all the same.
    let _reader = tokio::task::spawn_blocking(move || std::fs::File::open(file).unwrap()).await.unwrap();
    assert!(matches!(session.hear().await, Down::PointAck(ack) if ack.seq == 5));
    session.say(points(&run, 6..=7)).await;
    assert!(matches!(session.hear().await, Down::PointAck(ack) if ack.seq == 7));
    assert_eq!(metric_seqs(&mut jobs, &job.id, true).await, (1..=7).collect::<Vec<_>>());
    coordinator.stop().await;
}
