//! The decoders of this crate for the fuzzer and the property tests: what nodes and users send, as the handlers check
//! it and the core takes it, and what must hold afterwards. What lies on the disk is in `disk`. In no build that is
//! shipped.

mod access;
mod cluster;
mod disk;
mod samples;

use std::sync::Arc;

use muster_core::types::{GangReport, Generation, limits};
use muster_core::{Caller, Heard, Input, Plan, Reply, solve};
use muster_decoders::{Decoder, check_refusal};
use muster_proto::convert::{self, FieldError};
use muster_proto::v1::{self, session_request::Message as Up};
use prost::Message;
use tokio::sync::mpsc;
use tonic::Status;

use crate::grpc::{jobs, logs, nodes, points, worker};
use crate::links::Link;
use crate::metrics::{Latest, Point, Series};
use crate::view::{self, Sight};
use cluster::{Cluster, NOW};

/// Every decoder of this crate.
pub const DECODERS: [Decoder; 19] = [
    Decoder { name: "join_request", decode: join_request, samples: samples::joins },
    Decoder { name: "session_request", decode: session_request, samples: samples::session },
    Decoder { name: "submit_request", decode: submit_request, samples: samples::submits },
    Decoder { name: "plan_request", decode: plan_request, samples: samples::plans },
    Decoder { name: "cancel_request", decode: cancel_request, samples: samples::cancels },
    Decoder { name: "drain_request", decode: drain_request, samples: samples::drains },
    Decoder { name: "list_jobs_request", decode: list_jobs_request, samples: samples::job_pages },
    Decoder { name: "list_nodes_request", decode: list_nodes_request, samples: samples::node_pages },
    Decoder { name: "stream_logs_request", decode: stream_logs_request, samples: samples::log_requests },
    Decoder { name: "stored_job", decode: disk::stored_job, samples: || disk::samples(disk::JOB_KEY) },
    Decoder { name: "stored_node", decode: disk::stored_node, samples: || disk::samples(disk::NODE_KEY) },
    Decoder { name: "stored_meta", decode: disk::stored_meta, samples: || disk::samples("meta") },
    Decoder { name: "stored_token", decode: disk::stored_token, samples: || disk::samples(disk::TOKEN_KEY) },
    Decoder {
        name: "stored_barred",
        decode: disk::stored_barred,
        samples: || disk::samples(disk::BARRED_KEY),
    },
    Decoder { name: "token_request", decode: access::create_token, samples: access::create_token_samples },
    Decoder { name: "bearer", decode: access::bearer, samples: access::bearer_samples },
    Decoder {
        name: "client_certificate",
        decode: access::client_certificate,
        samples: access::client_certificate_samples,
    },
    Decoder {
        name: "signing_request",
        decode: access::signing_request,
        samples: access::signing_request_samples,
    },
    Decoder { name: "points_file", decode: disk::points_file, samples: disk::points_samples },
];

/// The message in the bytes, if there is one: what gRPC hands to a handler.
fn message<T: Message + Default>(bytes: &[u8]) -> Option<T> {
    T::decode(bytes).ok()
}

/// What was accepted; a refusal is checked and is the end of it.
fn accepted<T>(checked: Result<T, Status>) -> Option<T> {
    checked.inspect_err(|status| check_refusal(status.message(), status.details())).ok()
}

fn accepted_field<T>(checked: Result<T, FieldError>) -> Option<T> {
    accepted(checked.map_err(|error| convert::invalid_argument(&[error])))
}

fn join_request(bytes: &[u8]) {
    let Some(join) = message(bytes).and_then(|wire| accepted_field(worker::checked_join(wire))) else {
        return;
    };
    assert!(join.inventory.labels.len() <= 256 && join.inventory.gpus.len() <= 256);
    assert_eq!(join.inventory.total.gpus as usize, join.inventory.gpus.len());
    let mut cluster = Cluster::new();
    let (node, incarnation) = (join.name.clone(), join.incarnation.clone());
    let name = node.to_string();
    cluster.feed(Input::Join(Box::new(join)));
    cluster.feed(Input::Hello { node, incarnation, gangs: Vec::new(), leaving: None, number: 1 });
    for other in ["node-1", "node-2"].into_iter().filter(|other| *other != name) {
        cluster.feed(Input::SetCordon { by: None, node: other.into(), cordon: Some(String::new()) });
    }
    // No device is given to two ranks, whatever the node says it has.
    for gpus in 1..4 {
        cluster.submit(&cluster::spec(1, 2, gpus));
    }
    cluster.check();
}

fn session_request(bytes: &[u8]) {
    let Some(v1::SessionRequest { message: Some(said) }) = message(bytes) else { return };
    let mut cluster = Cluster::new();
    let (node, session) = (cluster.node.clone(), cluster.session);
    match said {
        Up::Hello(hello) => {
            let Some(hello) = accepted_field(worker::checked_hello(hello)) else { return };
            hello.gangs.iter().for_each(check_report);
            assert!(hello.gangs.len() <= 1024 && hello.leaving.iter().all(|why| why.chars().count() <= 256));
            let crate::driver::Hello { node, incarnation, gangs, leaving, number } = hello;
            cluster.feed(Input::Hello { node, incarnation, gangs, leaving, number });
        }
        Up::Gang(report) => {
            let Some(report) = accepted_field(convert::gang_report_from_wire(report)) else { return };
            check_report(&report);
            cluster.feed(Input::Report { node, session, report: Box::new(report) });
        }
        Up::Points(batch) => {
            let Some((_, points)) = accepted_field(points::checked_points(batch, NOW)) else { return };
            check_points(&points);
        }
        Up::Log(data) => {
            let (sender, _stream) = mpsc::channel(4);
            let link = Link::new(session, 1, sender);
            let (reader, _pieces) = mpsc::channel(1);
            link.subscribe(reader, |_| v1::LogSubscribe::default());
            // The second time the reader has no room: it is dropped, and holds nothing up.
            link.route_log(data.clone());
            link.route_log(data);
            assert_eq!(Arc::strong_count(&link), 1);
        }
        Up::Leaving(leaving) => {
            cluster.feed(Input::Leaving { node, session, reason: worker::reason(&leaving) });
        }
        Up::Health(health) => {
            let Some((findings, inventory)) = accepted_field(worker::checked_health(health)) else { return };
            cluster.feed(Input::Health { node, session, findings, inventory });
        }
        Up::Heartbeat(_) => {
            cluster.feed(Input::Heartbeats(vec![Heard { node, session, at: NOW }]));
        }
        Up::Goodbye(_) => _ = cluster.feed(Input::Goodbye { node, session }),
    }
    cluster.check();
}

fn check_report(report: &GangReport) {
    assert!(report.gang.generation.0 > 0 && report.exits.len() <= limits::PROCS_PER_NODE_MAX as usize);
}

/// A batch is kept once, in order, and can be shown.
fn check_points(points: &[Point]) {
    assert!(points.len() <= 512);
    for point in points {
        assert!(point.rank.0 < limits::WORLD_SIZE_MAX && point.generation.0 > 0 && point.seq > 0);
        assert!(point.values.len() <= 64);
        assert_eq!(convert::millis_from_timestamp(&view::point(point).time.unwrap_or_default()), point.time);
    }
    let series = Series::read(std::path::PathBuf::new());
    for _ in 0..2 {
        assert_eq!(series.append(points.to_vec()), points.last().map(|point| point.seq));
        let kept: Vec<Point> = series.after(0, 1000).into_iter().map(|(_, point)| (*point).clone()).collect();
        // As text, for NaN equals nothing.
        assert_eq!(format!("{kept:?}"), format!("{points:?}"));
    }
    if let Some(last) = points.last() {
        let newest = points.iter().map(|point| point.step).max();
        assert_eq!(series.latest(last.generation).step, newest);
        assert_eq!(series.latest(Generation(0)), Latest::default());
    }
}

fn submit_request(bytes: &[u8]) {
    let Some((request_id, spec)) = message(bytes).and_then(|wire| accepted(jobs::checked_submit(wire)))
    else {
        return;
    };
    let mut cluster = Cluster::new();
    let input = Input::Submit { by: Caller::trusted(), request_id: request_id.clone(), spec };
    let Some(Reply::Job(job)) = cluster.feed(input.clone()) else { panic!("a checked spec was not taken") };
    for sight in [Sight::Whole, Sight::Redacted] {
        let shown = view::job(&job, Latest::default(), sight);
        assert!(shown.encoded_len() < 3 << 20, "a job fits a page");
    }
    if request_id.is_some() {
        let Some(Reply::Job(again)) = cluster.feed(input) else {
            panic!("a repeated submission was refused")
        };
        assert_eq!(again.id, job.id, "the same request makes one job");
    }
    cluster.feed(Input::Cancel {
        by: Caller::trusted(),
        job: job.id.to_string(),
        reason: String::new(),
        signal: None,
    });
    cluster.check();
}

fn plan_request(bytes: &[u8]) {
    let Some(wire) = message::<v1::PlanJobRequest>(bytes) else { return };
    let wire = v1::SubmitJobRequest { request_id: String::new(), spec: wire.spec };
    let Some((_, spec)) = accepted(jobs::checked_submit(wire)) else { return };
    let cluster = Cluster::new();
    if let Plan::Place(placements) = solve(&spec, cluster.core.nodes_after(None)) {
        assert!((spec.min_nodes..=spec.max_nodes).contains(&(placements.len() as u32)));
    }
}

fn cancel_request(bytes: &[u8]) {
    let Some(wire) = message::<v1::CancelJobRequest>(bytes) else { return };
    let Some(reason) = accepted(jobs::checked_reason(wire.reason)) else { return };
    let Some(signal) = convert::optional_stop_signal("stop_signal", &wire.stop_signal).ok() else { return };
    let mut cluster = Cluster::new();
    cluster.feed(Input::Cancel { by: Caller::trusted(), job: wire.job_id, reason, signal });
    cluster.check();
}

fn drain_request(bytes: &[u8]) {
    let Some(input) = message(bytes).and_then(|wire| accepted(nodes::checked_drain(None, wire))) else {
        return;
    };
    let mut cluster = Cluster::new();
    if let Some(Reply::Node(node)) = cluster.feed(input.clone()) {
        let deadline = node.drain.as_ref().and_then(|drain| drain.deadline);
        assert!(deadline.is_none_or(|at| at.since(NOW) <= limits::SPAN_MAX));
    }
    if let Input::Drain { node, reason, .. } = input {
        cluster.feed(Input::SetCordon { by: None, node, cordon: Some(reason) });
    }
    cluster.check();
}

fn list_jobs_request(bytes: &[u8]) {
    let Some(wire) = message::<v1::ListJobsRequest>(bytes) else { return };
    let Some((before, size)) = accepted(jobs::checked_page(&wire)) else { return };
    accepted(jobs::Wanted::checked(&wire, &Caller::trusted()));
    assert!((1..=1000).contains(&size) && wire.states().count() <= wire.states.len());
    let cluster = Cluster::new();
    let shown: Vec<u64> = cluster.core.jobs_before(before).take(size).map(|job| job.order).collect();
    assert!(shown.iter().all(|order| *order < before) && shown.is_sorted_by(|a, b| a > b));
}

fn list_nodes_request(bytes: &[u8]) {
    let Some((after, size)) = message(bytes).and_then(|wire| accepted(nodes::checked_page(wire))) else {
        return;
    };
    let cluster = Cluster::new();
    let page = cluster.core.nodes_after(after.as_ref()).take(size);
    assert!((1..=1000).contains(&size) && page.into_iter().all(|node| Some(&node.name) > after.as_ref()));
}

fn stream_logs_request(bytes: &[u8]) {
    let Some(wire) = message::<v1::StreamLogsRequest>(bytes) else { return };
    let mut cluster = Cluster::new();
    let Some(job) = cluster.find(&wire.job_id) else { return };
    let generation = wire.generation.map_or(job.generation, Generation);
    let Some(sources) = accepted(logs::sources(&job, generation, &wire)) else { return };
    assert!(sources.len() <= 2 * job.world_size() as usize);
    cluster.check();
}

#[cfg(test)]
mod tests {
    #[test]
    fn decoders_hold_what_they_promise() {
        muster_decoders::check(&super::DECODERS);
    }
}
