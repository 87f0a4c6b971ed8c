//! The API by hand, with the real grpcurl 1.8.6, which speaks only the alpha form of reflection; and with gRPC's C core, by
//! Python.

use std::process::Command;

use muster_tests::{Cluster, Outcome, Settings, eventually, grpcurl_path, python, skip, torch_python, user};

const JOBS: &str = "muster.v1.JobService";

fn cluster() -> Option<Cluster> {
    if grpcurl_path().is_none() {
        skip("grpcurl", "it is not in .deps/bin; `cargo xtask test` brings it");
        return None;
    }
    Some(Cluster::start(Settings::default()))
}

#[test]
fn everything_is_described_with_its_comments() {
    let Some(cluster) = cluster() else { return };
    let services = cluster.grpcurl(&["list"]).ok();
    for service in ["JobService", "NodeService", "ClusterService", "WorkerService"] {
        assert!(services.contains(&format!("muster.v1.{service}\n")), "{services}");
    }
    let described = cluster.grpcurl(&["describe", "muster.v1.JobSpec"]).ok();
    assert!(described.contains("// Ranks (processes) per node, 1 to 1024. Default 1."), "{described}");
    let health = cluster.grpcurl(&[
        "-d",
        r#"{"service":"muster.v1.JobService"}"#,
        "--",
        "grpc.health.v1.Health/Check",
    ]);
    assert_eq!(health.json()[0]["status"], "SERVING");
}

#[test]
fn a_job_is_submitted_watched_and_read() {
    let Some(cluster) = cluster() else { return };
    let program = r#"
import json, os, socket
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["MUSTER_TELEMETRY"])
s.sendall((json.dumps({"step": 7, "values": {"loss": 0.5}}) + "\n").encode())
print("rank", os.environ["RANK"])
"#;
    let command = serde_json::json!([python(), "-c", program]);
    let request = format!(
        r#"{{"requestId":"a1","spec":{{"name":"hello","command":{command},"minNodes":2,"procsPerNode":2}}}}"#
    );
    let submit = format!("{JOBS}/SubmitJob");
    let job = cluster.grpcurl(&["-d", &request, "--", &submit]).json().remove(0)["job"].take();
    assert_eq!((&job["name"], &job["worldSize"]), (&"hello".into(), &4.into()), "{job}");
    let of_job = format!(r#"{{"jobId":{}}}"#, job["id"]);

    let watched = cluster.grpcurl(&["-d", &of_job, "--", &format!("{JOBS}/WatchJob")]).json();
    let states: Vec<_> = watched.iter().map(|response| response["job"]["state"].as_str().unwrap()).collect();
    assert_eq!(states.last(), Some(&"JOB_STATE_SUCCEEDED"), "{states:?}");

    let points = cluster.grpcurl(&["-d", &of_job, "--", &format!("{JOBS}/StreamMetrics")]).json();
    let ranks: std::collections::BTreeSet<_> =
        points.iter().map(|p| p["point"]["rank"].as_u64().unwrap()).collect();
    assert_eq!(ranks, (0..4).collect(), "rank 0 is shown too");
    assert!(
        points.iter().all(|p| p["point"]["values"]["loss"] == 0.5 && p["point"]["step"] == "7"),
        "{points:?}"
    );

    let logs = cluster.grpcurl(&["-d", &of_job, "--", &format!("{JOBS}/StreamLogs")]).json();
    let mut data: Vec<_> = logs.iter().map(|l| l["chunk"]["data"].as_str().unwrap().to_owned()).collect();
    data.sort();
    // Base64 of "rank 0\n" to "rank 3\n".
    assert_eq!(data, ["cmFuayAwCg==", "cmFuayAxCg==", "cmFuayAyCg==", "cmFuayAzCg=="]);

    let again = cluster.grpcurl(&["-d", &request, "--", &submit]).json().remove(0)["job"].take();
    assert_eq!(again["id"], job["id"], "the same request id is the same job");
    let other = request.replace(r#""minNodes":2"#, r#""minNodes":1"#);
    let refused = cluster.grpcurl(&["-d", &other, "--", &submit]);
    assert!(
        refused.code == 64 + 6 && refused.stderr.contains("was already used to submit job"),
        "{refused:?}"
    );
}

#[test]
fn a_job_is_cancelled() {
    let Some(cluster) = cluster() else { return };
    let request = r#"{"spec":{"command":["sleep","4000"]}}"#;
    let job =
        cluster.grpcurl(&["-d", request, "--", &format!("{JOBS}/SubmitJob")]).json().remove(0)["job"].take();
    let id = job["id"].as_str().unwrap();
    cluster.wait_for(id, "RUNNING");
    let cancel = format!(r#"{{"jobId":"{id}","reason":"by hand"}}"#);
    cluster.grpcurl(&["-d", &cancel, "--", &format!("{JOBS}/CancelJob")]).ok();
    assert_eq!(cluster.wait_for(id, "CANCELLED")["reason"], format!("cancelled by {}: by hand", user()));
    let nodes = cluster.grpcurl(&["muster.v1.NodeService/ListNodes"]).json().remove(0);
    assert!(nodes["nodes"][0].get("jobIds").is_none(), "the node is free again: {nodes}");
}

#[test]
fn bad_input_is_refused_with_the_field_and_what_to_do() {
    let Some(cluster) = cluster() else { return };
    let submit = format!("{JOBS}/SubmitJob");
    let table = [
        (r#"{"spec":{"command":["a"],"minNode":1}}"#, 1, "no known field named minNode"),
        (r#"{"spec":{"command":[]}}"#, 67, "spec.command: is empty"),
        (r#"{"spec":{"command":["a"],"minNodes":0}}"#, 67, "spec.min_nodes: is 0"),
        (r#"{"spec":{"command":["a"],"procsPerNode":1000000}}"#, 67, "spec.procs_per_node: is 1000000"),
        (r#"{"spec":{"command":["a"],"env":{"RANK":"1"}}}"#, 67, "is set by Muster"),
        (r#"{"spec":{"command":["a"],"stopGrace":"-5s"}}"#, 67, "spec.stop_grace: is negative"),
        ("{}", 67, "spec: is missing"),
    ];
    for (request, code, expected) in table {
        let refused = cluster.grpcurl(&["-d", request, "--", &submit]);
        assert!(refused.code == code && refused.stderr.contains(expected), "{request}: {refused:?}");
    }
    let details = cluster.grpcurl(&["-d", r#"{"spec":{"command":[]}}"#, "--", &submit]).stderr;
    assert!(
        details.contains(r#""fieldViolations":[{"field":"spec.command""#),
        "details are readable: {details}"
    );
    let missing = cluster.grpcurl(&["-d", r#"{"jobId":"nope"}"#, "--", &format!("{JOBS}/GetJob")]);
    assert!(missing.code == 64 + 5 && missing.stderr.contains("no job nope is known"), "{missing:?}");
    // The coordinator is as well as before.
    let id = cluster.submit(&[], "true");
    eventually("a job after all that", || {
        let job = cluster.job(&id);
        if job["state"] == "JOB_STATE_SUCCEEDED" { Ok(()) } else { Err(job) }
    });
}

#[test]
fn a_page_in_the_browser_of_this_machine_gets_nothing_run_by_a_name_of_its_own() {
    let Some(cluster) = cluster() else { return };
    let submit = format!("{JOBS}/SubmitJob");
    let hello = ["-d", r#"{"spec":{"command":["true"]}}"#];
    let refused = cluster.grpcurl(&[&["-authority", "evil.example"], &hello[..], &["--", &submit]].concat());
    assert!(refused.code != 0 && refused.stderr.contains("is not called \"evil.example\""), "{refused:?}");
    let log = cluster.coordinator.log();
    let line = log.lines().find(|line| line.contains("PermissionDenied")).unwrap_or_default();
    assert!(line.contains("audit") && line.contains("evil.example") && !log.contains("ERROR"), "{log}");
    // The coordinator has said how long headers may be, and this client does not send one that is longer.
    let long = format!("x: {}", "a".repeat(20_000));
    let refused =
        cluster.grpcurl(&[&["-max-time", "10", "-H", &long], &hello[..], &["--", &submit]].concat());
    assert!(refused.code != 0 && refused.stderr.contains("header list size"), "{refused:?}");
    assert_eq!(cluster.muster(&["jobs", "--output", "json"]).ok(), "");
    cluster.grpcurl(&[&["-authority", "localhost:1"], &hello[..], &["--", &submit]].concat()).ok();
}

/// Calls each target, compressed and not, and sends a request of a few bytes that unpacks to 64 MiB.
const C_CORE: &str = r#"
import sys, grpc
for target in sys.argv[1:]:
    with grpc.insecure_channel(target) as channel:
        cluster = channel.unary_unary("/muster.v1.ClusterService/GetCluster")
        submit = channel.unary_unary("/muster.v1.JobService/SubmitJob")
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            # Twice: the second one names its fields by number.
            print(all(cluster(b"", compression=compression) for _ in range(2)))
        bomb = b"\x0a\x80\x80\x80\x20" + b"a" * (64 << 20)
        try:
            submit(bomb, compression=grpc.Compression.Gzip)
        except grpc.RpcError as error:
            print(error.code().name)
"#;

#[test]
fn the_c_core_calls_by_the_unix_socket_and_compresses() {
    let Some(python) = torch_python() else {
        return skip(
            "gRPC's C core",
            "there is no Python with grpcio; `cargo xtask test --python` brings one",
        );
    };
    let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let socket = format!("unix:{}/coordinator/muster.sock", cluster.dir.path().display());
    let address = cluster.url().replace("http://", "");
    let called = Outcome::of(Command::new(python).args(["-c", C_CORE, &socket, &address])).ok();
    let each = ["True", "True", "RESOURCE_EXHAUSTED"];
    assert_eq!(called.lines().collect::<Vec<_>>(), [each, each].concat());
}
