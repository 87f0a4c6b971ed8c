//! Requests that are accepted: where mutations start. They speak of the nodes and the job of `cluster`.

use muster_core::types::Millis;
use muster_proto::convert::{duration_to_wire, timestamp_to_wire};
use muster_proto::v1::{self, session_request::Message as Up};
use prost::Message;

use super::cluster::{Cluster, NOW};

fn encoded<T: Message>(messages: impl IntoIterator<Item = T>) -> Vec<Vec<u8>> {
    messages.into_iter().map(|message| message.encode_to_vec()).collect()
}

fn job_id() -> String {
    Cluster::new().job.to_string()
}

fn spec() -> v1::JobSpec {
    v1::JobSpec {
        command: vec!["python3".into(), "train.py".into()],
        env: [("A".to_owned(), "1".to_owned())].into(),
        min_nodes: Some(1),
        max_nodes: 2,
        procs_per_node: Some(2),
        per_proc: Some(v1::Resources { gpus: 1, cpu_millis: 100, memory_bytes: 1 << 20 }),
        max_restarts: Some(1),
        node_selector: [("zone".to_owned(), "a".to_owned())].into(),
        ..Default::default()
    }
}

pub(super) fn joins() -> Vec<Vec<u8>> {
    let gpus = |count| {
        let gpu = |index| v1::Device {
            index: Some(index),
            uuid: format!("GPU-{index}"),
            model: "H100".into(),
            memory_bytes: 80 << 30,
            pci_address: format!("0000:{index}a:00.0"),
            numa_node: Some(0),
            near_fabric: vec![format!("mlx5_{index}")],
            fault: String::new(),
        };
        (0..count).map(gpu).collect()
    };
    let port = |device: &str| v1::FabricPort {
        device: device.into(),
        port: 1,
        state: v1::PortState::Active.into(),
        link_layer: v1::LinkLayer::Infiniband.into(),
        rate_mbps: 400_000,
        ..Default::default()
    };
    let join = |name: &str, count| v1::JoinRequest {
        node_name: name.into(),
        address: "10.0.0.3".into(),
        incarnation: "2".into(),
        boot_id: "boot".into(),
        data_id: "data".into(),
        inventory: Some(v1::Inventory {
            total: Some(v1::Resources { gpus: count, cpu_millis: 8000, memory_bytes: 1 << 34 }),
            gpus: gpus(count),
            labels: [("zone".to_owned(), "a".to_owned())].into(),
            hostname: "host".into(),
            version: "0.1.0".into(),
            fabric_ports: vec![port("mlx5_0"), port("mlx5_1")],
            interfaces: vec![v1::NetworkInterface {
                name: "eth0".into(),
                addresses: vec!["10.0.0.3".into()],
                ..Default::default()
            }],
            numa_nodes: vec![v1::NumaNode { id: 0, cpus: "0-3,8".into(), memory_bytes: 1 << 34 }],
            memlock_bytes: Some(1 << 16),
            ..Default::default()
        }),
    };
    let mut twice = join("node-4", 4);
    for gpu in twice.inventory.iter_mut().flat_map(|inventory| &mut inventory.gpus) {
        gpu.index = Some(0);
    }
    encoded([join("node-3", 8), join("node-1", 4), twice])
}

fn report() -> v1::GangReport {
    v1::GangReport {
        job_id: job_id(),
        generation: 1,
        phase: v1::ObservedPhase::Running.into(),
        master_port: 29_500,
        exits: vec![v1::RankExit {
            rank: Some(1),
            code: Some(1),
            time: Some(timestamp_to_wire(NOW)),
            stderr_tail: "RuntimeError".into(),
            ..Default::default()
        }],
        quiet: vec![v1::RankProgress {
            rank: 0,
            step: Some(7),
            silent: Some(duration_to_wire(Millis::from_secs(600))),
            state: "S".into(),
        }],
        ..Default::default()
    }
}

pub(super) fn session() -> Vec<Vec<u8>> {
    let hello = v1::Hello {
        node_name: "node-1".into(),
        incarnation: "1".into(),
        gangs: vec![report()],
        leaving: Some(v1::Leaving { reason: "shutdown".into() }),
        number: 1,
        resends_points: true,
    };
    let phase = |phase: v1::ObservedPhase| Up::Gang(v1::GangReport { phase: phase.into(), ..report() });
    let points = |generation, time| {
        let point = |seq| v1::Point {
            generation,
            rank: Some(1),
            step: Some(seq * 10),
            time,
            values: [("loss".to_owned(), 2.5), ("lr".to_owned(), 0.1)].into(),
            seq,
        };
        Up::Points(v1::PointBatch { job_id: job_id(), points: (1..4).map(point).collect(), resumes: true })
    };
    let late = Some(timestamp_to_wire(Millis(u64::MAX)));
    let chunk =
        v1::LogChunk { generation: 1, rank: Some(0), data: b"line\n"[..].into(), ..Default::default() };
    let log = v1::LogData { subscription: 1, chunk: Some(chunk), ..Default::default() };
    encoded(
        [
            Up::Hello(hello),
            Up::Heartbeat(v1::Heartbeat { seq: 1 }),
            phase(v1::ObservedPhase::Running),
            phase(v1::ObservedPhase::Killed),
            phase(v1::ObservedPhase::Stopped),
            points(1, None),
            points(u32::MAX, late),
            Up::Log(log),
            Up::Goodbye(v1::Goodbye { reason: "shutdown".into() }),
            Up::Leaving(v1::Leaving { reason: "shutdown".into() }),
            Up::Health(v1::NodeHealth {
                findings: vec![v1::Finding {
                    subject: "mlx5_0:1".into(),
                    severity: v1::HealthVerdict::Quarantined.into(),
                    reason: "went down 9 times in an hour".into(),
                }],
                inventory: None,
            }),
        ]
        .map(|message| v1::SessionRequest { message: Some(message) }),
    )
}

pub(super) fn submits() -> Vec<Vec<u8>> {
    let request =
        |request_id: &str| v1::SubmitJobRequest { request_id: request_id.into(), spec: Some(spec()) };
    encoded([request(""), request("a1")])
}

pub(super) fn plans() -> Vec<Vec<u8>> {
    encoded([v1::PlanJobRequest { spec: Some(spec()) }])
}

pub(super) fn cancels() -> Vec<Vec<u8>> {
    encoded([v1::CancelJobRequest {
        job_id: job_id(),
        reason: "by hand".into(),
        stop_signal: "SIGINT".into(),
    }])
}

pub(super) fn drains() -> Vec<Vec<u8>> {
    let timeout = Some(duration_to_wire(Millis::from_secs(60)));
    encoded([v1::DrainNodeRequest { node_name: "node-1".into(), reason: "repair".into(), timeout }])
}

pub(super) fn job_pages() -> Vec<Vec<u8>> {
    let states = vec![v1::JobState::Running.into(), v1::JobState::Queued.into()];
    encoded([v1::ListJobsRequest {
        page_size: 10,
        page_token: "17".into(),
        states,
        owner: "ann".into(),
        mine: false,
    }])
}

pub(super) fn node_pages() -> Vec<Vec<u8>> {
    encoded([v1::ListNodesRequest { page_size: 10, page_token: "node-1".into() }])
}

pub(super) fn log_requests() -> Vec<Vec<u8>> {
    let request = |rank| v1::StreamLogsRequest {
        job_id: job_id(),
        rank,
        generation: Some(1),
        stream: v1::LogStream::Stderr.into(),
        offset: 5,
        follow: true,
    };
    encoded([request(None), request(Some(1))])
}
