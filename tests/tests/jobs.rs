//! Jobs from the outside: what ranks see, what users see, and what happens when something is wrong.

use muster_tests::{Cluster, Settings, eventually, is_running, processes_with, python, user};
use nix::sys::signal::Signal;

#[test]
fn ranks_get_the_torchrun_environment_in_order() {
    let cluster = Cluster::start(Settings::default());
    let names = "RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE \
                 ROLE_NAME MASTER_ADDR TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS OMP_NUM_THREADS MUSTER_NODE \
                 MUSTER_GENERATION MINE";
    let script = format!(
        "for name in {names}; do eval echo $name=\\$$name; done; echo port=$MASTER_PORT $MUSTER_JOB_ID"
    );
    let id = cluster.submit(&["--nnodes", "2", "--nproc-per-node", "2", "--env", "MINE=a b"], &script);
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!(job["placement"][0]["nodeName"], "n1", "rank 0's node comes first");
    let mut ports = std::collections::BTreeSet::new();
    for rank in 0..4 {
        let (node, local) = (rank / 2, rank % 2);
        let output = cluster.output(&id, rank);
        let expected = format!(
            "RANK={rank}\nLOCAL_RANK={local}\nGROUP_RANK={node}\nROLE_RANK={rank}\nWORLD_SIZE=4\nLOCAL_WORLD_SIZE=2\n\
             GROUP_WORLD_SIZE=2\nROLE_WORLD_SIZE=4\nROLE_NAME=default\nMASTER_ADDR=127.0.0.1\n\
             TORCHELASTIC_RESTART_COUNT=0\nTORCHELASTIC_MAX_RESTARTS=0\nOMP_NUM_THREADS=1\nMUSTER_NODE=n{}\n\
             MUSTER_GENERATION=1\nMINE=a b\n",
            node + 1
        );
        assert!(output.starts_with(&expected), "rank {rank}:\n{output}");
        assert!(output.trim_end().ends_with(&id));
        ports.insert(output.lines().last().unwrap().to_owned());
    }
    assert_eq!(ports.len(), 1, "all ranks have the same master port: {ports:?}");
}

#[test]
fn the_first_failure_is_reported_and_ends_the_gang() {
    let cluster = Cluster::start(Settings::default());
    let mark = format!("sleep 1234.{}", std::process::id());
    let script = format!("if [ $RANK = 3 ]; then echo cannot read shard 7 >&2; exit 9; fi; exec {mark}");
    let id = cluster.submit(&["--nnodes", "2", "--nproc-per-node", "2"], &script);
    let job = cluster.wait_for(&id, "FAILED");
    assert_eq!(job["reason"], "rank 3 on node n2 ended with exit code 9: cannot read shard 7");
    assert_eq!((&job["exit"]["rank"], &job["exit"]["code"]), (&3.into(), &9.into()));
    let explained = cluster.muster(&["explain", &id]).ok();
    assert!(explained.contains("cannot read shard 7") && explained.contains("--rank 3"), "{explained}");
    assert!(
        processes_with(&mark).iter().all(|(_, command)| !command.starts_with(&mark)),
        "siblings were stopped"
    );
}

#[test]
fn a_restart_is_a_new_generation_with_its_own_logs() {
    let cluster = Cluster::start(Settings::default());
    // Only rank 0 fails: a rank that is stopped for another may not have come to write anything.
    let script = "echo start $TORCHELASTIC_RESTART_COUNT; [ $TORCHELASTIC_RESTART_COUNT = 2 ] && exit 0
        [ $RANK = 0 ] && exit 1; exec sleep 1000";
    let id = cluster.submit(&["--nnodes", "2", "--max-restarts", "3"], script);
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!((&job["generation"], &job["restartsUsed"]), (&3.into(), &2.into()));
    for generation in 1..=3 {
        let flags = ["logs", &id, "--rank", "0", "--generation", &generation.to_string()];
        assert_eq!(cluster.muster(&flags).ok(), format!("start {}\n", generation - 1));
    }
}

#[test]
fn what_cannot_start_says_why_and_where() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let reason = |args: &[&str]| {
        let id = cluster.muster(args).ok().trim().to_owned();
        cluster.wait_for(&id, "FAILED")["reason"].as_str().unwrap().to_owned()
    };
    let missing = reason(&["submit", "--", "no-such-program"]);
    assert!(missing.contains("node n1: program \"no-such-program\" was not found; looked in /"), "{missing}");
    let absolute = reason(&["submit", "--", "/no/such/program"]);
    assert!(absolute.contains("/no/such/program is not there"), "{absolute}");
    let directory = reason(&["submit", "--working-dir", "/no/such/dir", "--", "true"]);
    assert!(directory.contains("working_dir /no/such/dir cannot be used"), "{directory}");
    let not_a_program = reason(&["submit", "--", "/etc/passwd"]);
    assert!(not_a_program.contains("/etc/passwd is not an executable file"), "{not_a_program}");
}

#[test]
fn stopping_is_term_then_grace_then_kill_for_everything_a_rank_started() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let script = "trap 'echo asked to stop' TERM; sleep 3000 & echo child $!; while :; do sleep 0.1; done";
    let id = cluster.submit(&["--stop-grace", "300ms"], script);
    let child = eventually("the child's id", || {
        let output = cluster.muster(&["logs", &id, "--rank", "0"]).stdout;
        output.lines().find_map(|line| line.strip_prefix("child ")?.parse::<i32>().ok()).ok_or(output)
    });
    assert!(is_running(child));
    cluster.muster(&["cancel", &id, "--reason", "enough"]).ok();
    let job = cluster.wait_for(&id, "CANCELLED");
    assert_eq!(job["reason"], format!("cancelled by {}: enough", user()));
    assert!(cluster.output(&id, 0).contains("asked to stop"), "SIGTERM comes first");
    eventually("the child's end", || if is_running(child) { Err(child) } else { Ok(()) });
}

#[test]
fn a_job_waits_for_nodes_and_runs_when_they_come() {
    let mut cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let id = cluster.submit(&["--nnodes", "2"], "true");
    let job = cluster.job(&id);
    assert_eq!(
        (&job["state"], &job["reason"]),
        (&"JOB_STATE_QUEUED".into(), &"waiting: 1 of 2 nodes; no other node has joined".into())
    );
    let plan = cluster.muster(&["submit", "--dry-run", "--nnodes", "2", "--", "true"]).ok();
    assert_eq!(plan, "the job would wait: 1 of 2 nodes; no other node has joined\n");
    cluster.add_worker();
    cluster.wait_for(&id, "SUCCEEDED");
}

#[test]
fn any_language_reports_points_and_the_curve_is_drawn() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let program = r#"
import json, os, socket
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["MUSTER_TELEMETRY"])
s.sendall(b"this is no point\n")
for step in range(1, 2001):
    s.sendall((json.dumps({"step": step, "values": {"loss": 2.0 / step}}) + "\n").encode())
"#;
    let submit =
        ["submit", "--nproc-per-node", "2", "--follow", "--output", "json", "--", python(), "-c", program];
    let job = cluster.muster(&submit).json().remove(0);
    assert_eq!((&job["state"], &job["latestStep"]), (&"JOB_STATE_SUCCEEDED".into(), &"2000".into()));
    let id = job["id"].as_str().unwrap();
    for rank in ["0", "1"] {
        let points = cluster.muster(&["metrics", id, "--rank", rank, "--output", "json"]).json();
        let seqs: Vec<u64> = points.iter().map(|p| p["seq"].as_str().unwrap().parse().unwrap()).collect();
        assert_eq!(seqs, (1..=2000).collect::<Vec<_>>(), "rank {rank}: every point once, in order");
    }
    let plot = cluster.muster(&["plot", id]).ok();
    assert!(plot.contains("loss: 0.001 at step 2000") && plot.lines().count() > 10, "{plot}");
    let error = cluster.muster(&["plot", id, "--key", "lost"]);
    assert!(error.stderr.contains("has reported no \"lost\""), "{error:?}");
}

#[test]
fn lines_of_output_are_points_while_the_program_runs() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let script = "for i in 1 2 3; do printf '%d%%\\r' $i; echo step $i: loss=0.$i rank $RANK; done
        while [ ! -e $GO ]; do read up idle < /proc/uptime; done; echo step 4: loss=0.25 rank $RANK";
    let dir = tempfile::tempdir().unwrap();
    let go = dir.path().join("go");
    let pattern = r"step (?<step>\d+): loss=(?<loss>\S+) rank (?<mine>\d)";
    let env = format!("GO={}", go.display());
    let id = cluster.submit(&["--nproc-per-node", "2", "--metric-pattern", pattern, "--env", &env], script);
    eventually("what it has printed so far", || {
        let job = cluster.job(&id);
        (job["latestStep"] == "3" && job["state"] == "JOB_STATE_RUNNING").then_some(()).ok_or(job)
    });
    std::fs::write(&go, "").unwrap();
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert_eq!((&job["latestStep"], &job["latestLoss"]), (&"4".into(), &0.25.into()));
    for rank in [0, 1] {
        let points =
            cluster.muster(&["metrics", &id, "--rank", &rank.to_string(), "--output", "json"]).json();
        let found: Vec<_> =
            points.iter().map(|point| (point["step"].clone(), point["values"].clone())).collect();
        let point = |step: &str, loss: f64| {
            (step.into(), serde_json::json!({ "loss": loss, "mine": f64::from(rank) }))
        };
        assert_eq!(found, [point("1", 0.1), point("2", 0.2), point("3", 0.3), point("4", 0.25)]);
    }
    let refused = cluster.muster(&["submit", "--metric-pattern", "loss (", "--", "true"]);
    assert!(refused.stderr.contains("metric_pattern: is no regular expression"), "{refused:?}");
}

#[test]
fn a_node_that_leaves_or_dies_is_named_and_nothing_of_it_is_left() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut cluster = Cluster::start(Settings { lease: "1s", ..Settings::default() });
        let id = cluster.submit(&["--nnodes", "2"], "echo pid $$; exec sleep 2000");
        cluster.wait_for(&id, "RUNNING");
        let pid = |rank| {
            eventually("the rank's pid", || {
                let output = cluster.muster(&["logs", &id, "--rank", rank]).stdout;
                output.trim().strip_prefix("pid ").and_then(|pid| pid.parse::<i32>().ok()).ok_or(output)
            })
        };
        let pids = [pid("0"), pid("1")];
        cluster.workers[1].signal(signal);
        let code = cluster.workers[1].wait();
        assert_eq!(code, if signal == Signal::SIGTERM { 0 } else { -1 });
        // Whoever stops a daemon means to: that is no fault of the job, which waits for another node.
        let (state, expected) = match signal {
            Signal::SIGTERM => ("RESTARTING", "node n2 leaves: its daemon is being stopped"),
            _ => ("FAILED", "node n2 was lost"),
        };
        let job = cluster.wait_for(&id, state);
        let reason = job["reason"].as_str().unwrap();
        assert!(reason.starts_with(expected), "{signal}: {reason}");
        for pid in pids {
            eventually("the ranks' end", || if is_running(pid) { Err(pid) } else { Ok(()) });
        }
    }
}

#[test]
fn a_lost_node_is_replaced_within_the_budget() {
    let mut cluster = Cluster::start(Settings { workers: 3, lease: "1s", ..Settings::default() });
    let id = cluster
        .submit(&["--nnodes", "2", "--max-restarts", "1"], "[ $MUSTER_GENERATION = 2 ] || exec sleep 2000");
    cluster.wait_for(&id, "RUNNING");
    cluster.workers[0].kill();
    let job = cluster.wait_for(&id, "SUCCEEDED");
    let nodes: Vec<&str> =
        job["placement"].as_array().unwrap().iter().map(|p| p["nodeName"].as_str().unwrap()).collect();
    assert_eq!((nodes, &job["generation"]), (vec!["n2", "n3"], &2.into()));
}

#[test]
fn followed_output_comes_while_the_rank_writes() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let id = cluster
        .submit(&["--nproc-per-node", "2"], "for i in 1 2 3; do echo line $i; sleep 0.2; done; echo bye >&2");
    let followed = cluster.muster(&["logs", &id, "-f"]);
    assert_eq!(followed.code, 0, "{followed:?}");
    for rank in 0..2 {
        let lines: Vec<&str> =
            followed.stdout.lines().filter_map(|line| line.strip_prefix(&format!("[{rank}]: "))).collect();
        assert_eq!(lines, ["line 1", "line 2", "line 3"]);
        assert!(followed.stderr.contains(&format!("[{rank}]: bye")));
    }
}

#[test]
fn a_flood_of_output_arrives_whole() {
    let cluster = Cluster::start(Settings { workers: 1, ..Settings::default() });
    let id = cluster.submit(&[], "yes 0123456789abcde | head -c 20000000; echo; echo end");
    let output = cluster.muster(&["logs", &id, "-f", "--rank", "0"]).ok();
    assert!(output.len() == 20_000_005 && output.ends_with("\nend\n"), "{} bytes", output.len());
    cluster.wait_for(&id, "SUCCEEDED");
}
