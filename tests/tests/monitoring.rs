//! What the daemons show to Prometheus, and what `deploy/prometheus` and `deploy/grafana` make of it, with the real
//! Prometheus and its promtool.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use muster_tests::{
    Cluster, Etcd, FAST, Outcome, Settings, Several, deployed, eventually, free_port, http_address, http_get,
    prometheus_path, skip,
};
use serde_json::Value;

/// A coordinator and a worker with something to count.
struct Busy {
    cluster: Cluster,
    coordinator: String,
    worker: String,
}

fn busy() -> Busy {
    let mut cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
    let worker = cluster.spawn_worker_with("n1", "n1", &["--http-listen", "127.0.0.1:0"]);
    cluster.workers.push(worker);
    cluster.wait_for_nodes(1);
    let (coordinator, worker) = (http_address(&cluster.coordinator), http_address(&cluster.workers[0]));
    Busy { cluster, coordinator, worker }
}

/// The samples of a scrape, by name and labels as they are written.
fn scrape(address: &str) -> BTreeMap<String, f64> {
    let (status, text) = http_get(address, "/metrics");
    assert_eq!(status, 200, "{text}");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let pair = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    samples.map(pair).collect()
}

/// Runs promtool with something on its standard input.
fn promtool(args: &[&str], input: &str) -> Option<Outcome> {
    let mut command = Command::new(prometheus_path("promtool")?);
    command.args(args).current_dir(deployed("prometheus"));
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap().into())
}

/// Every expression of the rules and of the dashboard.
fn expressions() -> Vec<String> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("expr").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|value| collect(value, found));
            }
            Value::Array(all) => all.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let dashboard = std::fs::read_to_string(deployed("grafana/muster.json")).unwrap();
    let mut found = Vec::new();
    collect(&serde_json::from_str(&dashboard).unwrap(), &mut found);
    assert!(found.len() > 40, "the dashboard's expressions were found: {}", found.len());
    let rules = std::fs::read_to_string(deployed("prometheus/muster.rules.yml")).unwrap();
    // Each is the folded text between its key and the next one.
    for rule in rules.split("expr: >-\n").skip(1) {
        let lines = rule.lines().take_while(|line| line.starts_with("          "));
        found.push(lines.map(str::trim).collect::<Vec<_>>().join(" "));
    }
    found
}

#[test]
fn every_metric_of_rules_and_dashboard_is_there_and_none_is_shown_nowhere() {
    let Busy { cluster, coordinator, worker } = busy();
    let id = cluster.submit(&[], "true");
    cluster.wait_for(&id, "SUCCEEDED");
    let name = |sample: &String| sample.split('{').next().unwrap().to_owned();
    let there: BTreeSet<String> = [scrape(&coordinator), scrape(&worker)]
        .iter()
        .flat_map(|samples| samples.keys().map(name).collect::<Vec<_>>())
        .collect();
    let all = expressions().join(" ");
    let words = all.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let named: BTreeSet<String> = words
        .filter(|word| word.starts_with("muster_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect();
    let missing: Vec<_> = named.difference(&there).collect();
    assert!(missing.is_empty(), "no daemon has {missing:?}");
    let of_histogram = |name: &str| ["_bucket", "_sum", "_count"].iter().any(|end| name.ends_with(end));
    let unused: Vec<_> =
        there.difference(&named).filter(|name| name.starts_with("muster_") && !of_histogram(name)).collect();
    assert!(unused.is_empty(), "neither a rule nor a panel looks at {unused:?}");

    for address in [&coordinator, &worker] {
        let (_, text) = http_get(address, "/metrics");
        let Some(outcome) = promtool(&["check", "metrics"], &text) else {
            return skip("promtool check metrics", "Prometheus could not be brought");
        };
        assert_eq!((outcome.code, &*outcome.stderr), (0, ""), "{outcome:?}");
    }
}

#[test]
fn what_is_counted_is_what_happens() {
    let Busy { mut cluster, coordinator, worker } = busy();
    assert_eq!(http_get(&coordinator, "/readyz"), (200, "ready\n".to_owned()));
    assert_eq!(http_get(&coordinator, "/healthz"), (200, "ok\n".to_owned()));
    let good = cluster.submit(&[], "true");
    cluster.wait_for(&good, "SUCCEEDED");
    let bad = cluster.submit(&["--max-restarts", "1"], "kill -KILL $$");
    cluster.wait_for(&bad, "FAILED");
    let runs = cluster.submit(&["--nproc-per-node", "3"], "sleep 1000");
    cluster.wait_for(&runs, "RUNNING");
    let waits = cluster.submit(&["--nnodes", "2"], "true");
    cluster.wait_for(&waits, "QUEUED");
    let expected = [
        (&coordinator, "muster_jobs{state=\"succeeded\"}", 1.0),
        (&coordinator, "muster_jobs{state=\"running\"}", 1.0),
        (&coordinator, "muster_jobs{state=\"queued\"}", 1.0),
        (&coordinator, "muster_jobs_submitted_total", 4.0),
        (&coordinator, "muster_jobs_ended_total{state=\"failed\"}", 1.0),
        (&coordinator, "muster_job_restarts_total", 1.0),
        (&coordinator, "muster_placements_total", 4.0),
        (&coordinator, "muster_queue_wait_seconds_count", 3.0),
        (&coordinator, "muster_nodes{state=\"ready\"}", 1.0),
        (&coordinator, "muster_nodes_by_verdict{verdict=\"healthy\"}", 1.0),
        (&coordinator, "muster_sessions", 1.0),
        (&coordinator, "muster_leader", 1.0),
        (&coordinator, "muster_store_writable", 1.0),
        (
            &coordinator,
            "muster_grpc_requests_total{code=\"Ok\",method=\"muster.v1.JobService/SubmitJob\"}",
            4.0,
        ),
        (&worker, "muster_worker_ranks_running", 3.0),
        (&worker, "muster_worker_generations_total", 4.0),
        (&worker, "muster_worker_rank_exits_total{how=\"ok\"}", 1.0),
        (&worker, "muster_worker_rank_exits_total{how=\"signal\"}", 2.0),
        (&worker, "muster_worker_session_connected", 1.0),
    ];
    eventually("the counts", || {
        let seen = [(&coordinator, scrape(&coordinator)), (&worker, scrape(&worker))];
        let value = |(of, name, _): &(&String, &str, f64)| {
            seen.iter().find(|(address, _)| address == of).and_then(|(_, all)| all.get(*name).copied())
        };
        let wrong: Vec<_> =
            expected.iter().filter(|e| value(e) != Some(e.2)).map(|e| (e.1, value(e), e.2)).collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    });
    // Whether all ranks of the one that kills itself were seen to run is a matter of luck.
    assert!(scrape(&coordinator)["muster_job_start_seconds_count"] >= 2.0);
    assert!(scrape(&coordinator)["muster_queue_oldest_timestamp_seconds"] > 0.0);

    // A call of no such method has no series of its own.
    let before = scrape(&coordinator).len();
    for n in 0..5 {
        cluster.grpcurl(&["--", &format!("made.Up{n}/Method")]);
    }
    assert!(scrape(&coordinator).keys().all(|name| !name.contains("made.Up")));
    assert!(scrape(&coordinator).len() < before + 5);

    // Nobody is lost by that: the session ends, and the worker says that it is not ready.
    cluster.coordinator.kill();
    let ready = eventually("a worker that is not ready", || {
        let (status, body) = http_get(&worker, "/readyz");
        if status == 503 { Ok(body) } else { Err(body) }
    });
    assert!(ready.starts_with("not ready: no coordinator has welcomed"), "{ready}");
    assert_eq!(scrape(&worker).get("muster_worker_ranks_running"), Some(&3.0));
}

#[test]
fn rules_and_configuration_are_as_promtool_wants_them() {
    let checks: [&[&str]; 3] = [
        &["check", "config", "prometheus.yml"],
        &["check", "rules", "muster.rules.yml"],
        &["test", "rules", TESTS],
    ];
    for args in checks {
        let Some(outcome) = promtool(args, "") else {
            return skip("promtool", "Prometheus could not be brought");
        };
        outcome.ok();
    }
    let rules = std::fs::read_to_string(deployed("prometheus/muster.rules.yml")).unwrap();
    let tests = std::fs::read_to_string(deployed("prometheus").join(TESTS)).unwrap();
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.contains(&format!("- name: {alert}\n")), "{alert} is not tested");
    }
}

const TESTS: &str = "muster.rules.test.yml";

/// Prometheus itself, which ends with the test.
struct Prometheus {
    child: Child,
    address: String,
    dir: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Prometheus {
    /// With the configuration as it is in deploy/, but for the targets.
    fn start(coordinator: &str, worker: &str) -> Option<Self> {
        let program = prometheus_path("prometheus")?;
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("targets")).unwrap();
        for name in ["prometheus.yml", "muster.rules.yml"] {
            let text = std::fs::read_to_string(deployed("prometheus").join(name)).unwrap();
            // So that nobody waits for half a minute.
            let text =
                text.replace("_interval: 15s", "_interval: 1s").replace("_interval: 30s", "_interval: 1s");
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        for (name, address) in [("coordinators.yml", coordinator), ("workers.yml", worker)] {
            let shipped = std::fs::read_to_string(deployed("prometheus/targets").join(name)).unwrap();
            let port = if name == "workers.yml" { "127.0.0.1:7072" } else { "127.0.0.1:7071" };
            assert!(shipped.contains(port), "{shipped}");
            std::fs::write(dir.path().join("targets").join(name), shipped.replace(port, address)).unwrap();
        }
        let address = format!("127.0.0.1:{}", free_port());
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Self { child, address, dir })
    }

    fn query(&self, expression: &str) -> Value {
        let query: Vec<String> = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        if std::net::TcpStream::connect(&self.address).is_err() {
            return Value::String(log(self.dir.path()));
        }
        let (_, body) = http_get(&self.address, &format!("/api/v1/query?query={}", query.concat()));
        serde_json::from_str(&body).unwrap_or(Value::String(body))
    }
}

fn log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("log")).unwrap_or_default()
}

#[test]
fn prometheus_scrapes_both_and_understands_every_panel() {
    let Busy { cluster, coordinator, worker } = busy();
    let Some(prometheus) = Prometheus::start(&coordinator, &worker) else {
        return skip("a real Prometheus", "it could not be brought");
    };
    let id = cluster.submit(&[], "true");
    cluster.wait_for(&id, "SUCCEEDED");
    let up = |query: &str, count: usize| {
        eventually(query, || {
            let answer = prometheus.query(query);
            let found = answer["data"]["result"].as_array().map_or(0, Vec::len);
            if found == count { Ok(()) } else { Err(answer) }
        });
    };
    up("up{cluster=\"muster\",job=~\"muster-.*\"} == 1", 2);
    up("muster_jobs{state=\"succeeded\"} == 1 and on (cluster) muster_leader == 1", 1);
    for expression in expressions() {
        let expression = expression.replace("$cluster", ".*").replace("$__rate_interval", "1m");
        let answer = prometheus.query(&expression);
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
    }
    // A whole way of an alert, from what happens to what is said.
    drop(cluster);
    up("ALERTS{alertname=\"MusterCoordinatorDown\",cluster=\"muster\"}", 1);
}

#[test]
fn readiness_and_what_is_counted_follow_leadership() {
    let Some(etcd) = Etcd::start(1) else {
        return skip("metrics of several coordinators", "etcd could not be brought");
    };
    let flags = [&FAST[..], &["--http-listen", "127.0.0.1:0"]].concat();
    let mut several = Several::on(etcd, None, 2, 1, &flags);
    let leads = |several: &Several, index: usize, nodes: f64| {
        let address = http_address(several.coordinators[index].as_ref().unwrap());
        eventually("leadership in the metrics", || {
            let (status, body) = http_get(&address, "/readyz");
            let seen = scrape(&address);
            let known =
                [seen["muster_leader"], seen["muster_nodes{state=\"ready\"}"], seen["muster_sessions"]];
            let expected = if nodes > 0.0 { (200, [1.0, nodes, nodes]) } else { (503, [0.0; 3]) };
            if (status, known) == expected { Ok(body) } else { Err((body, known)) }
        })
    };
    let first = several.leader();
    leads(&several, first, 1.0);
    let body = leads(&several, 1 - first, 0.0);
    assert!(body.starts_with("not ready: http://") && body.ends_with(" leads\n"), "{body}");
    several.kill_coordinator(first);
    let second = several.leader();
    assert_eq!(second, 1 - first);
    leads(&several, second, 1.0);
}
