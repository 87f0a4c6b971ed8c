//! Points that are not a node's to report.

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
