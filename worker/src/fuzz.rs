//! The decoders of this crate for the fuzzer and the property tests: what ranks and the coordinator say, and what must
//! hold of it. In no build that is shipped.

use std::collections::BTreeMap;

use muster_core::types::{DesiredPhase, Millis, Rank, StopMode, StopSignal, Value, limits};
use muster_decoders::Decoder;
use muster_proto::convert;
use muster_proto::v1::{self, session_response::Message as Down};
use muster_worker_core::health::{CheckEnd, judge_check};
use muster_worker_core::slurm::{Network, Switches};
use muster_worker_core::{Core, Effect, Input};
use prost::Message;

use crate::session::times;
use crate::shim::{Command, News, Record, State};
use crate::telemetry::events::message::{encoded, scalars};
use crate::telemetry::events::record::{Found, first, framed};
use crate::telemetry::parse::parse;

/// Every decoder of this crate.
pub const DECODERS: [Decoder; 9] = [
    Decoder { name: "telemetry_line", decode: telemetry_line, samples: telemetry_samples },
    Decoder { name: "join_response", decode: join_response, samples: join_samples },
    Decoder { name: "session_response", decode: session_response, samples: session_samples },
    Decoder { name: "shim_message", decode: shim_message, samples: shim_samples },
    Decoder { name: "topology_conf", decode: topology_conf, samples: topology_samples },
    Decoder { name: "check_line", decode: check_line, samples: check_samples },
    Decoder { name: "event_file", decode: event_file, samples: event_samples },
    Decoder { name: "output_lines", decode: output_lines, samples: output_samples },
    Decoder { name: "points_file", decode: points_file, samples: points_samples },
];

/// Whatever is in the file, a node is found in it in bounded time, and its labels fit the API.
fn topology_conf(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let networks = ["topology.conf", "topology.yaml"].map(|file| {
        // One that includes itself ends.
        Network::read(file, &text, &|_| Ok(text.chars().take(1000).collect())).unwrap_or_default()
    });
    let nodes = ["n7", "rack1n07", ""];
    for (network, node) in networks.iter().flat_map(|network| nodes.map(|node| (network, node))) {
        let labels = network.find(node).labels(&BTreeMap::new());
        assert!(
            labels.len() <= 3 && labels.keys().all(|key| ["zone", "spine", "leaf"].contains(&key.as_str()))
        );
    }
    let (address, pattern) = text.split_once('\n').unwrap_or((&text, "switch.switch.node"));
    assert!(Switches::of_environment(address, pattern, "n7").labels(&BTreeMap::new()).len() <= 3);
}

fn topology_samples() -> Vec<Vec<u8>> {
    [
        "SwitchName=s0 Nodes=n[0-3,7]\nSwitchName=s1 \\\n Nodes=rack[0-1]n[00-15]\nSwitchName=top Switches=s[0-1] # all",
        "---\n- topology: t\n  tree:\n    switches:\n      - {switch: s0, nodes: n[0-8/2]}\n",
        "Include x\nSwitchName = \"s0\" Nodes = n[01-100]",
    ]
    .map(Into::into)
    .into()
}

/// What a user's check says becomes words that fit a finding and a terminal.
fn check_line(bytes: &[u8]) {
    let line = String::from_utf8_lossy(bytes);
    for code in [Some(0), Some(1), Some(2), Some(70), None] {
        let Some(found) = judge_check("fans", CheckEnd::Exited(code), &line) else { continue };
        assert!(
            found.reason.chars().count() <= 400 && !found.reason.chars().any(char::is_control),
            "{found:?}"
        );
    }
}

fn check_samples() -> Vec<Vec<u8>> {
    [r#"{"reason":"fan 3 stands still","more":[1,null]}"#, "plain words"].map(Into::into).into()
}

/// What a shim and a daemon say to each other, and what each leaves on the disk for the next: read, it says the same
/// when it is written and read again.
fn shim_message(bytes: &[u8]) {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned>(bytes: &[u8]) {
        if let Ok(read) = serde_json::from_slice::<T>(bytes) {
            let written = serde_json::to_vec(&read).expect("what was read can be written");
            let reread: T = serde_json::from_slice(&written).expect("and read again");
            assert_eq!(serde_json::to_vec(&reread).ok(), Some(written));
        }
    }
    again::<Command>(bytes);
    again::<News>(bytes);
    again::<State>(bytes);
    again::<Record>(bytes);
    again::<BTreeMap<String, std::net::SocketAddr>>(bytes);
}

fn shim_samples() -> Vec<Vec<u8>> {
    let state = State { pid: 7, error: Some("no such program".to_owned()), ..State::default() };
    let stop = Command::Stop(StopMode { signal: StopSignal::SigInt, grace: Millis(5), dump_stacks: true });
    let commands = [stop, Command::Release].map(|command| serde_json::to_vec(&command));
    let news = [News::State(state.clone()), News::Points { ranks: vec![Rank(3)] }];
    let news = news.map(|news| serde_json::to_vec(&news));
    commands.into_iter().chain(news).chain([serde_json::to_vec(&state)]).map(Result::unwrap).collect()
}

/// A rank's points as a daemon finds them: lines are numbered upwards, whatever they hold.
fn points_file(bytes: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let numbers = crate::telemetry::numbers(dir.path(), bytes);
    assert!(numbers.is_sorted(), "{numbers:?}");
}

fn points_samples() -> Vec<Vec<u8>> {
    ["{\"step\":1,\"time\":5,\"values\":{\"loss\":0.5}}\n{\"dropped\":3}\nnot a point\n{\"step\":2"]
        .map(Into::into)
        .into()
}

/// Records of an event file are found without a step back or over the end, framed again they are what they were, and
/// whatever is in them is a scalar or is not.
fn event_file(bytes: &[u8]) {
    let mut rest = bytes;
    while let Found::Record(record, length) = first(rest) {
        assert_eq!(framed(record), &rest[..length]);
        if let Ok(Some(found)) = scalars(record) {
            assert!(!found.values.is_empty() && found.values.iter().all(|(tag, _)| !tag.is_empty()));
        }
        rest = &rest[length..];
    }
    // As a record that the fuzzer need not give a checksum.
    if let Err(why) = scalars(bytes) {
        assert!(!why.is_empty(), "a refusal says why");
    }
}

fn event_samples() -> Vec<Vec<u8>> {
    let event = encoded(7, &[("loss", 0.5), ("lr", 0.1)]);
    vec![[framed(&event), framed(b"")].concat(), event]
}

/// Lines of output are the same in whatever pieces they come.
fn output_lines(bytes: &[u8]) {
    let Some((piece, text)) = bytes.split_first() else { return };
    let whole = crate::telemetry::lines(text, text.len());
    // A long line is looked at again with each piece, so that there are not too many of these.
    let piece = usize::from(*piece) + text.len() / 256;
    assert_eq!(crate::telemetry::lines(text, piece), whole);
}

fn output_samples() -> Vec<Vec<u8>> {
    ["\x03step 1 loss 2.5\r 10%\n\nend"].map(Into::into).into()
}

fn telemetry_line(bytes: &[u8]) {
    match parse(bytes) {
        Ok(point) => {
            assert!(point.values.len() <= 64);
            assert!(point.values.keys().all(|name| (1..=128).contains(&name.len())));
            let time = convert::timestamp_to_wire(point.time.unwrap_or_default());
            assert_eq!(convert::millis_from_timestamp(&time), point.time.unwrap_or_default());
            let seconds = point.time.map(|time| time.0 as f64 / 1000.0);
            let values: BTreeMap<_, _> =
                point.values.iter().map(|(name, value)| (name, Value(*value))).collect();
            let line = serde_json::json!({ "step": point.step, "time": seconds, "values": values });
            let again = parse(line.to_string().as_bytes()).expect("what was accepted is accepted again");
            // As text, for NaN equals nothing.
            assert_eq!(
                format!("{:?}", (again.step, again.values)),
                format!("{:?}", (point.step, point.values))
            );
        }
        Err(why) => assert!(!why.is_empty(), "a refusal says why"),
    }
}

fn telemetry_samples() -> Vec<Vec<u8>> {
    [
        r#"{"step":1,"time":1760000000.5,"values":{"loss":2.3,"lr":1e-4,"nan":null,"bad":NaN,"worse":-Infinity}}"#,
        r#"{"step":18446744073709551615,"values":{},"more":[1]}"#,
    ]
    .map(Into::into)
    .into()
}

fn join_response(bytes: &[u8]) {
    let Ok(wire) = v1::JoinResponse::decode(bytes) else { return };
    let (heartbeat, lease) = times(&wire);
    assert!([heartbeat, lease].iter().all(|span| (Millis(10)..=limits::SPAN_MAX).contains(span)));
}

fn join_samples() -> Vec<Vec<u8>> {
    let wire = |heartbeat, lease| v1::JoinResponse {
        heartbeat_interval: Some(convert::duration_to_wire(Millis(heartbeat))),
        lease: Some(convert::duration_to_wire(Millis(lease))),
        ..v1::JoinResponse::default()
    };
    [wire(1000, 10_000), wire(0, u64::MAX)].map(|wire| wire.encode_to_vec()).into()
}

/// The daemon's core takes whatever passes the check, and launches nothing that is not wanted.
fn session_response(bytes: &[u8]) {
    let Ok(v1::SessionResponse { message: Some(heard), .. }) = v1::SessionResponse::decode(bytes) else {
        return;
    };
    let wires = match heard {
        Down::Welcome(welcome) => welcome.assignments,
        Down::Assignment(assignment) => vec![assignment],
        // Numbers alone; what they lead to needs a running daemon.
        Down::PointAck(_)
        | Down::LogSubscribe(_)
        | Down::LogCredit(_)
        | Down::LogUnsubscribe(_)
        | Down::HeartbeatAck(_) => return,
    };
    let Ok(all) = wires.into_iter().map(convert::assignment_from_wire).collect::<Result<Vec<_>, _>>() else {
        return;
    };
    let (mut core, mut now) = (Core::default(), Millis(1000));
    let mut effects = core.step(now, Input::Renewed { sent: now, lease: Millis::from_secs(10) });
    effects.extend(core.step(now, Input::Welcome(all.clone())));
    for assignment in &all {
        effects.extend(core.step(now, Input::Assign(Box::new(assignment.clone()))));
        effects.extend(core.step(now, Input::Prepared(assignment.gang.clone(), Some(29_500))));
        effects.extend(core.step(now, Input::Launched(assignment.gang.clone())));
    }
    let wanted: BTreeMap<_, _> = all.iter().map(|assignment| (&assignment.gang, assignment)).collect();
    for effect in &effects {
        if let Effect::Launch(launched, _) = effect {
            assert!(wanted.contains_key(&launched.gang) && launched.phase == DesiredPhase::Running);
        }
    }
    for _ in 0..100 {
        let Some(at) = core.next_deadline() else { return };
        now = now.max(at);
        core.step(now, Input::Tick);
    }
}

fn session_samples() -> Vec<Vec<u8>> {
    let assignment = |generation, phase: v1::DesiredPhase| v1::Assignment {
        job_id: "k3v9x2ma".into(),
        generation,
        phase: phase.into(),
        spec: Some(v1::JobSpec {
            command: vec!["sh".into()],
            per_proc: Some(v1::Resources { gpus: 1, ..Default::default() }),
            procs_per_node: Some(2),
            ..Default::default()
        }),
        placement: Some(v1::NodePlacement {
            node_name: "node-1".into(),
            address: "10.0.0.1".into(),
            group_rank: Some(0),
            first_rank: Some(0),
            procs: 2,
            gpus: vec![0, 1],
        }),
        world_size: 2,
        group_world_size: 1,
        master_addr: "10.0.0.1".into(),
        master_port: 29_500,
        stop_signal: "SIGINT".into(),
        restart_count: 0,
        dump_stacks: true,
        stop_grace: Some(convert::duration_to_wire(Millis(500))),
    };
    let phases = [
        v1::DesiredPhase::Prepared,
        v1::DesiredPhase::Running,
        v1::DesiredPhase::Stopped,
        v1::DesiredPhase::Forgotten,
    ];
    let assignments: Vec<_> =
        (1..).zip(phases).map(|(generation, phase)| assignment(generation, phase)).collect();
    let single = assignments.clone().into_iter().map(Down::Assignment);
    let welcome = Down::Welcome(v1::Welcome { session: 1, assignments: assignments.clone() });
    single
        .chain([welcome])
        .map(|message| v1::SessionResponse { message: Some(message), term: 1 }.encode_to_vec())
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn decoders_hold_what_they_promise() {
        muster_decoders::check(&super::DECODERS);
    }
}
