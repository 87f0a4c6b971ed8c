//! Starts that do not get on: who is missing at the store of the ranks, and who waits there for what.

use muster_tests::{Cluster, Settings, eventually, skip, torch_python, trainer};

#[test]
fn a_stuck_start_names_the_ranks_that_have_not_come() {
    let Some(trainer) = trainer() else {
        return skip("a stuck start", "muster-trainer is not built; `cargo xtask test` does");
    };
    let cluster = Cluster::start(Settings::default());
    let held = cluster.dir.path().join("held");
    std::fs::write(&held, "").unwrap();
    let script = format!(
        "while [ $RANK = 3 ] && [ -e {} ]; do sleep 0.1; done; exec {} vision --limit 256 --epochs 1",
        held.display(),
        trainer.display()
    );
    let id = cluster.submit(&["--nnodes", "2", "--nproc-per-node", "2"], &script);
    let job = eventually("a report about rank 3", || {
        let job = cluster.job(&id);
        let missing = &job["rendezvous"]["missing"];
        if missing.as_array().is_some_and(|missing| missing.len() == 1) { Ok(job) } else { Err(job) }
    });
    let stuck = &job["rendezvous"];
    assert_eq!((&stuck["come"], &stuck["missingTotal"]), (&3.into(), &1.into()), "{stuck}");
    assert_eq!(stuck["missing"][0], serde_json::json!({"rank": 3, "nodeName": "n2"}));
    let shown = cluster.muster(&["job", &id]).ok();
    assert!(shown.contains("rendezvous: 3 of 4 ranks have come"), "{shown}");
    assert!(shown.contains("\n  rank 3 on n2 has not come\n"), "{shown}");
    let explained = cluster.muster(&["explain", &id]).ok();
    assert!(explained.contains("rank 3 on n2 has not come"), "{explained}");
    assert!(explained.contains(&format!("next: `muster logs {id} --rank 3`")), "{explained}");

    std::fs::remove_file(held).unwrap();
    let job = cluster.wait_for(&id, "SUCCEEDED");
    assert!(job["rendezvous"].is_null(), "it is over: {job}");
}

#[test]
fn a_rank_that_waits_for_a_key_nobody_sets_is_shown_with_the_key() {
    let Some(python) = torch_python() else {
        return skip("a key nobody sets", "there is no Python with torch; `cargo xtask bench` brings one");
    };
    let cluster = Cluster::start(Settings::default());
    let program = "
import os, time, torch.distributed as dist
store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
rank = int(os.environ['RANK'])
store.set(f'here {rank}', b'1')
if rank == 1:
    store.get('checkpoint uploaded')
else:
    time.sleep(1000)
";
    let path = cluster.dir.path().join("waits.py");
    std::fs::write(&path, program).unwrap();
    let script = format!("exec {} {}", python.display(), path.display());
    let id = cluster.submit(&["--nnodes", "2"], &script);
    let job = eventually("a report about the key", || {
        let job = cluster.job(&id);
        if job["rendezvous"]["awaited"][0].is_object() { Ok(job) } else { Err(job) }
    });
    let awaited = &job["rendezvous"]["awaited"][0];
    assert_eq!(awaited["key"], "checkpoint uploaded");
    assert_eq!(awaited["waiting"], serde_json::json!([{"rank": 1, "nodeName": "n2"}]));
    let shown = cluster.muster(&["job", &id]).ok();
    assert!(shown.contains("rank 1 on n2 waits since "), "{shown}");
    assert!(shown.contains("for the key \"checkpoint uploaded\"\n"), "{shown}");
    cluster.muster(&["cancel", &id]).ok();
    assert!(cluster.wait_for(&id, "CANCELLED")["rendezvous"].is_null());
}
