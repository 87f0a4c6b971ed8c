//! The decoders of this crate for the fuzzer and the property tests: each wire message that is checked into a type,
//! and what must hold of everything that is accepted. In no build that is shipped.

mod machine;

use std::fmt::Debug;

use muster_core::agents::Said;
use muster_core::types::rendezvous::{
    CLIENTS_TOLD_MAX, HOSTS_TOLD_MAX, PROCESSES_TOLD_MAX, RendezvousHost, WAITS_TOLD_MAX,
};
use muster_core::types::{Assignment, JobSpec, Millis, NodePlacement, RankExit, RendezvousReport, limits};
use muster_decoders::Decoder;
use prost::Message;

use crate::{convert, v1};

/// The last second of a Timestamp, and the longest Duration, as `google/protobuf/*.proto` say.
const TIMESTAMP_SECONDS_MAX: i64 = 253_402_300_799;
const DURATION_SECONDS_MAX: i64 = 315_576_000_000;

/// Every decoder of this crate.
pub const DECODERS: [Decoder; 11] = [
    Decoder { name: "job_spec", decode: job_spec, samples: job_spec_samples },
    Decoder { name: "assignment", decode: assignment, samples: || vec![encoded(&sample_assignment())] },
    Decoder { name: "gang_report", decode: gang_report, samples: || vec![encoded(&sample_report())] },
    Decoder {
        name: "rank_exit",
        decode: rank_exit,
        samples: || sample_exits().iter().map(encoded).collect(),
    },
    Decoder { name: "placement", decode: placement, samples: || vec![encoded(&sample_placement())] },
    Decoder { name: "node_health", decode: machine::node_health, samples: machine::node_health_samples },
    Decoder {
        name: "surroundings",
        decode: machine::surroundings,
        samples: || vec![encoded(&machine::sample_surroundings())],
    },
    Decoder { name: "agent_hello", decode: agent_hello, samples: || vec![encoded(&sample_hello())] },
    Decoder { name: "agent_said", decode: agent_said, samples: agent_said_samples },
    Decoder { name: "timestamp", decode: timestamp, samples: timestamp_samples },
    Decoder { name: "duration", decode: duration, samples: duration_samples },
];

fn encoded(message: &impl Message) -> Vec<u8> {
    message.encode_to_vec()
}

/// The message in the bytes, if there is one: what gRPC hands to a handler.
fn message<T: Message + Default>(bytes: &[u8]) -> Option<T> {
    T::decode(bytes).ok()
}

/// Checks that a checked value means the same after it went over the wire once more.
fn survives<T: PartialEq + Debug, W: Message + Default, E: Debug>(
    value: &T,
    to_wire: impl Fn(&T) -> W,
    from_wire: impl Fn(W) -> Result<T, E>,
) {
    let sent = to_wire(value).encode_to_vec();
    let heard = from_wire(W::decode(&*sent).expect("what was encoded decodes"));
    assert_eq!(heard.as_ref().expect("what was checked once is accepted again"), value);
}

fn check_refusal(errors: &[convert::FieldError]) {
    assert!(!errors.is_empty(), "a refusal has a reason");
    assert!(
        errors.iter().all(|error| !error.field.is_empty() && !error.description.is_empty()),
        "{errors:?}"
    );
    let status = convert::invalid_argument(errors);
    muster_decoders::check_refusal(status.message(), status.details());
}

fn check_spec(spec: &JobSpec) {
    assert_eq!(spec.clone().check().as_ref(), Ok(spec), "checking changes nothing the second time");
    assert!((1..=spec.max_nodes).contains(&spec.min_nodes) && spec.max_nodes <= limits::NODES_MAX);
    assert!((1..=limits::WORLD_SIZE_MAX).contains(&spec.world_size(spec.max_nodes)));
    let spans = [spec.stop_grace, spec.start_timeout, spec.progress_timeout, spec.last_call];
    assert!(spans.iter().all(|span| *span <= limits::SPAN_MAX));
    survives(spec, convert::spec_to_wire, convert::spec_from_wire);
}

fn job_spec(bytes: &[u8]) {
    let Some(wire) = message::<v1::JobSpec>(bytes) else { return };
    let policy = v1::CoordinatorLossPolicy::try_from(wire.on_coordinator_loss);
    match convert::spec_from_wire(wire) {
        Ok(spec) => {
            assert!(policy.is_ok(), "what is not known is not taken for the default");
            check_spec(&spec);
        }
        Err(errors) => check_refusal(&errors),
    }
}

fn check_placement(placement: &NodePlacement) {
    let end = placement.first_rank.0.checked_add(placement.procs).expect("ranks are countable");
    assert!(placement.procs > 0 && end <= limits::WORLD_SIZE_MAX);
    assert!(placement.holds(placement.first_rank));
    survives(placement, convert::placement_to_wire, convert::placement_from_wire);
}

fn placement(bytes: &[u8]) {
    let Some(wire) = message::<v1::NodePlacement>(bytes) else { return };
    match convert::placement_from_wire(wire) {
        Ok(placement) => check_placement(&placement),
        Err(error) => check_refusal(&[error]),
    }
}

fn check_assignment(assignment: &Assignment) {
    check_spec(&assignment.spec);
    check_placement(&assignment.placement);
    assert!(assignment.gang.generation.0 > 0 && assignment.master_port != Some(0));
    assert!(assignment.stop.grace <= limits::SPAN_MAX);
    let gpus = u64::from(assignment.spec.per_proc.gpus) * u64::from(assignment.placement.procs);
    assert_eq!(assignment.placement.gpus.len() as u64, gpus, "each process has its GPUs");
    survives(assignment, convert::assignment_to_wire, convert::assignment_from_wire);
}

fn assignment(bytes: &[u8]) {
    let Some(wire) = message::<v1::Assignment>(bytes) else { return };
    match convert::assignment_from_wire(wire) {
        Ok(assignment) => check_assignment(&assignment),
        Err(error) => check_refusal(&[error]),
    }
}

fn gang_report(bytes: &[u8]) {
    let Some(wire) = message::<v1::GangReport>(bytes) else { return };
    match convert::gang_report_from_wire(wire) {
        Ok(report) => {
            assert!(report.gang.generation.0 > 0 && report.master_port != Some(0));
            assert!(report.exits.len().max(report.quiet.len()) <= limits::PROCS_PER_NODE_MAX as usize);
            assert!(report.processes.len() <= limits::PROCS_PER_NODE_MAX as usize);
            report.exits.iter().for_each(check_exit);
            report.rendezvous.as_deref().into_iter().for_each(check_rendezvous);
            survives(&report, convert::gang_report_to_wire, convert::gang_report_from_wire);
        }
        Err(error) => check_refusal(&[error]),
    }
}

fn check_rendezvous(report: &RendezvousReport) {
    let told = |host: &RendezvousHost| host.ranks.len() + host.processes.len();
    assert!(report.hosts.len() <= HOSTS_TOLD_MAX && report.waits.len() <= WAITS_TOLD_MAX);
    assert!(report.hosts.iter().map(told).sum::<usize>() <= PROCESSES_TOLD_MAX);
    for wait in &report.waits {
        assert!(wait.clients.len() <= CLIENTS_TOLD_MAX && wait.key.chars().count() < 512);
    }
}

fn check_exit(exit: &RankExit) {
    assert!(exit.code.is_some() != exit.signal.is_some());
    assert!(exit.stderr_tail.len() <= 2048 && exit.error.as_ref().is_none_or(|error| error.len() <= 2048));
}

fn rank_exit(bytes: &[u8]) {
    let Some(wire) = message::<v1::RankExit>(bytes) else { return };
    let (generation, node) = (muster_core::types::Generation(wire.generation), wire.node_name.clone());
    match convert::rank_exit_from_wire(wire) {
        Ok(exit) => {
            check_exit(&exit);
            let to_wire = |exit: &RankExit| convert::rank_exit_to_wire(exit, generation, &node);
            survives(&exit, to_wire, convert::rank_exit_from_wire);
        }
        Err(error) => check_refusal(&[error]),
    }
}

fn agent_hello(bytes: &[u8]) {
    let Some(wire) = message::<v1::AgentHello>(bytes) else { return };
    match convert::agent_hello_from_wire(wire) {
        Ok(hello) => {
            assert!((1..=hello.spec.max).contains(&hello.spec.min) && hello.spec.max <= limits::NODES_MAX);
            assert!(hello.held.is_none_or(|held| held.rank < held.world_size && held.round > 0));
            survives(&hello, convert::agent_hello_to_wire, convert::agent_hello_from_wire);
        }
        Err(error) => check_refusal(&[error]),
    }
}

fn agent_said(bytes: &[u8]) {
    let Some(wire) = message::<v1::RendezvousServiceJoinRequest>(bytes) else { return };
    match convert::agent_said_from_wire(wire) {
        Ok(Some(Said::Leave(failure))) => assert!(failure.len() <= 2048),
        Ok(Some(Said::Enter(store))) => assert!(store.port() > 0),
        Ok(Some(Said::Gone)) => panic!("that is not said but noticed"),
        Ok(None) => {}
        Err(error) => check_refusal(&[error]),
    }
}

fn timestamp(bytes: &[u8]) {
    let Some(wire) = message::<prost_types::Timestamp>(bytes) else { return };
    let time = convert::millis_from_timestamp(&wire);
    let again = convert::timestamp_to_wire(time);
    assert!(
        (0..=TIMESTAMP_SECONDS_MAX).contains(&again.seconds) && (0..1_000_000_000).contains(&again.nanos)
    );
    assert_eq!(convert::millis_from_timestamp(&again), time);
}

fn duration(bytes: &[u8]) {
    let Some(wire) = message::<prost_types::Duration>(bytes) else { return };
    match convert::span_from_wire("span", Some(&wire), Millis(0)) {
        Ok(span) => {
            let again = convert::duration_to_wire(span);
            assert!(
                (0..=DURATION_SECONDS_MAX).contains(&again.seconds)
                    && (0..1_000_000_000).contains(&again.nanos)
            );
            assert_eq!(convert::span_from_wire("span", Some(&again), Millis(0)), Ok(span));
        }
        Err(error) => check_refusal(&[error]),
    }
}

/// With every field set.
fn sample_spec() -> v1::JobSpec {
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    v1::JobSpec {
        name: "vision".into(),
        command: vec!["/usr/bin/python3".into(), "train.py".into(), "--lr=0.1".into()],
        env: [pair("OMP_NUM_THREADS", "4"), pair("A", "")].into(),
        env_files: [pair("API_KEY", "/run/secrets/key")].into(),
        working_dir: "/shared/code".into(),
        min_nodes: Some(1),
        max_nodes: 2,
        procs_per_node: Some(2),
        per_proc: Some(v1::Resources { gpus: 1, cpu_millis: 500, memory_bytes: 1 << 20 }),
        max_restarts: Some(3),
        priority: -1,
        node_selector: [pair("zone", "a")].into(),
        checkpoint_dir: "/shared/checkpoints".into(),
        stop_grace: Some(prost_types::Duration { seconds: 5, nanos: 500_000_000 }),
        start_timeout: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        progress_timeout: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        last_call: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
        stop_signal: "SIGINT".into(),
        on_coordinator_loss: v1::CoordinatorLossPolicy::Stop.into(),
        tensorboard_dir: "runs".into(),
        run_as: "ann".into(),
        metric_pattern: "step (?P<step>[0-9]+).*loss (?P<loss>[0-9.]+)".into(),
    }
}

fn job_spec_samples() -> Vec<Vec<u8>> {
    let least = v1::JobSpec { command: vec!["sh".into()], ..Default::default() };
    // Wrong, with much to quote, and in many places.
    let long = "\u{1F980}".repeat(2000);
    let quoted = v1::JobSpec { working_dir: long.clone(), checkpoint_dir: long.clone(), ..least.clone() };
    let many =
        v1::JobSpec { env: (0..40).map(|i| (format!("{i}={long}"), "\0".into())).collect(), ..least.clone() };
    let policy = v1::JobSpec { on_coordinator_loss: 3, ..least.clone() };
    let pattern = v1::JobSpec { metric_pattern: format!("(?<{long:.200}>"), ..least.clone() };
    [sample_spec(), least, quoted, many, policy, pattern].iter().map(encoded).collect()
}

fn sample_placement() -> v1::NodePlacement {
    v1::NodePlacement {
        node_name: "node-1.example".into(),
        address: "fd00::1".into(),
        group_rank: Some(1),
        first_rank: Some(2),
        procs: 2,
        gpus: vec![0, 3],
    }
}

fn sample_assignment() -> v1::Assignment {
    v1::Assignment {
        job_id: "k3v9x2ma".into(),
        generation: 2,
        phase: v1::DesiredPhase::Running.into(),
        spec: Some(sample_spec()),
        placement: Some(sample_placement()),
        world_size: 4,
        group_world_size: 2,
        master_addr: "10.0.0.1".into(),
        master_port: 29_500,
        restart_count: 1,
        dump_stacks: true,
        stop_grace: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        stop_signal: "SIGINT".into(),
    }
}

fn sample_exits() -> [v1::RankExit; 2] {
    let exit = v1::RankExit {
        rank: Some(3),
        node_name: "node-1".into(),
        code: Some(1),
        time: Some(prost_types::Timestamp { seconds: 1_760_000_000, nanos: 1_000_000 }),
        stderr_tail: "Traceback (most recent call last):\nRuntimeError: é".into(),
        generation: 2,
        error: "RuntimeError".into(),
        ..Default::default()
    };
    [v1::RankExit { code: None, signal: Some(9), out_of_memory: true, ..exit.clone() }, exit]
}

fn sample_report() -> v1::GangReport {
    v1::GangReport {
        job_id: "k3v9x2ma".into(),
        generation: 2,
        phase: v1::ObservedPhase::Running.into(),
        master_port: 29_500,
        exits: sample_exits().into(),
        error: "the program is not there".into(),
        quiet: vec![v1::RankProgress {
            rank: 2,
            step: Some(7),
            silent: Some(prost_types::Duration { seconds: 601, nanos: 0 }),
            state: "S".into(),
        }],
        process_ids: vec![4711, 4712],
        rendezvous: Some(sample_rendezvous()),
        surroundings: Some(machine::sample_surroundings()),
    }
}

fn sample_rendezvous() -> v1::RendezvousReport {
    let time = Some(prost_types::Timestamp { seconds: 1_760_000_000, nanos: 0 });
    let host = |address: &str, ranks, process_ids| v1::RendezvousHost {
        address: address.into(),
        come: 2,
        ranks,
        process_ids,
    };
    let client = v1::RendezvousClient { address: "10.0.0.1".into(), process_id: Some(4711), rank: Some(0) };
    v1::RendezvousReport {
        come: 4,
        last_came: time,
        hosts: vec![host("10.0.0.1", vec![0], vec![4712]), host("fd00::2", vec![], vec![])],
        waits: vec![v1::RendezvousWait {
            key: "default_pg/0//cpu//0/3".into(),
            setter: Some(3),
            waiting: 3,
            clients: vec![client],
            since: time,
        }],
        waits_more: 1,
    }
}

fn sample_hello() -> v1::AgentHello {
    v1::AgentHello {
        run_id: "run 1".into(),
        agent_id: "0123abcd".into(),
        node_name: "node-1.example".into(),
        min_agents: 1,
        max_agents: 4,
        last_call: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
        held: Some(v1::AgentPlace {
            round: 3,
            rank: 1,
            world_size: 2,
            store_rank: 0,
            store_address: "fd00::1".into(),
            store_port: 29_500,
        }),
    }
}

fn agent_said_samples() -> Vec<Vec<u8>> {
    use v1::rendezvous_service_join_request::Message;
    let messages = [
        Message::Enter(v1::AgentEnter { address: "10.0.0.1".into(), port: 29_500 }),
        Message::Leave(v1::AgentLeave { failure: "\u{1F980}".repeat(1000) }),
        Message::Hello(sample_hello()),
    ];
    let of = |message| v1::RendezvousServiceJoinRequest { message: Some(message) };
    messages.map(|message| encoded(&of(message))).into()
}

fn timestamp_samples() -> Vec<Vec<u8>> {
    let of = |seconds, nanos| encoded(&prost_types::Timestamp { seconds, nanos });
    vec![of(1_760_000_000, 999_999_999), of(-1, 0), of(i64::MAX, i32::MAX), of(TIMESTAMP_SECONDS_MAX, 0)]
}

fn duration_samples() -> Vec<Vec<u8>> {
    let of = |seconds, nanos| encoded(&prost_types::Duration { seconds, nanos });
    vec![of(30, 500_000_000), of(0, -1), of(i64::MAX, i32::MAX), of(DURATION_SECONDS_MAX, 0)]
}

#[cfg(test)]
mod tests {
    #[test]
    fn decoders_hold_what_they_promise() {
        muster_decoders::check(&super::DECODERS);
    }
}
