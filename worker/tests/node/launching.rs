//! What ranks get, how they end, and what is said when they cannot start.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn variables(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once('=')).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_get_their_place_their_gpus_and_their_files() {
    let world = World::start().await;
    let mut gang = with_ranks(gang(&world, "j1", "env; pwd; echo to stderr >&2"), 2);
    gang.spec.as_mut().unwrap().per_proc = Some(v1::Resources { gpus: 2, ..Default::default() });
    gang.spec.as_mut().unwrap().env.insert("HOME".into(), "/job".into());
    gang.spec.as_mut().unwrap().checkpoint_dir = "/shared/c".into();
    gang.placement.as_mut().unwrap().gpus = vec![3, 5, 6, 7];
    gang.placement.as_mut().unwrap().first_rank = Some(4);
    (gang.world_size, gang.group_world_size, gang.generation, gang.restart_count) = (8, 4, 3, 2);

    world.want(&gang, DesiredPhase::Prepared).await;
    let prepared = world.observe(&gang, ObservedPhase::Prepared).await;
    assert!(prepared.master_port > 0, "the gang's first node chooses the port");
    let report = world.run(&gang).await;
    assert_eq!(report.exits.iter().filter(|exit| exit.code == Some(0)).count(), 2, "{report:?}");

    for (local_rank, gpus) in [(0, "3,5"), (1, "6,7")] {
        let dir = world.log_dir(&gang, local_rank);
        let output = text_of(&dir.join("stdout.log")).await;
        let env = variables(&output);
        let (rank, local_rank, port) =
            ((4 + local_rank).to_string(), local_rank.to_string(), prepared.master_port.to_string());
        let error_file = dir.join("error.json");
        let expected = [
            ("RANK", rank.as_str()),
            ("LOCAL_RANK", &local_rank),
            ("GROUP_RANK", "0"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_ERROR_FILE", error_file.to_str().unwrap()),
            ("CUDA_VISIBLE_DEVICES", gpus),
            ("MUSTER_JOB_ID", "j1"),
            ("MUSTER_GENERATION", "3"),
            ("MUSTER_NODE", "n1"),
            ("MUSTER_CHECKPOINT_DIR", "/shared/c"),
            ("HOME", "/job"),
        ];
        for (name, value) in expected {
            assert_eq!(env.get(name), Some(&value), "{name} of local rank {local_rank}");
        }
        assert!(env["MUSTER_TELEMETRY"].len() < 108 && env.contains_key("PATH"));
        let cwd = output.lines().last().unwrap();
        assert_eq!(cwd, dir.to_str().unwrap(), "it starts in its log directory");
        assert_eq!(text_of(&dir.join("stderr.log")).await, "to stderr\n");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_nodes_use_the_port_that_the_first_one_chose() {
    let world = World::start().await;
    let mut gang = gang(&world, "j1", "echo $MASTER_ADDR:$MASTER_PORT; pwd");
    gang.placement.as_mut().unwrap().group_rank = Some(1);
    gang.placement.as_mut().unwrap().first_rank = Some(1);
    gang.spec.as_mut().unwrap().working_dir = "/usr".into();
    world.want(&gang, DesiredPhase::Prepared).await;
    assert_eq!(world.observe(&gang, ObservedPhase::Prepared).await.master_port, 0);
    // The first node's store, as it is asked for there.
    let store = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let port = store.local_addr().unwrap().port();
    (gang.master_addr, gang.master_port) = ("127.0.0.3".into(), port.into());
    world.run(&gang).await;
    let said = text_of(&world.log_dir(&gang, 0).join("stdout.log")).await;
    assert_eq!(said, format!("127.0.0.3:{port}\n/usr\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_end_is_reported_as_it_was() {
    let world = World::start().await;
    let table = [
        ("exit 0", Some(0), None, ""),
        ("echo cannot read shard 7 >&2; exit 9", Some(9), None, "cannot read shard 7\n"),
        ("kill -9 $$", None, Some(9), ""),
        ("kill -SEGV $$", None, Some(11), ""),
        ("printf '%5000s' end >&2; exit 1", Some(1), None, "end"),
    ];
    for (number, (script, code, signal, tail)) in table.into_iter().enumerate() {
        let report = world.run(&gang(&world, &format!("j{number}"), script)).await;
        let [exit] = &report.exits[..] else { panic!("{script}: {report:?}") };
        assert_eq!((exit.code, exit.signal, exit.rank), (code, signal, Some(0)), "{script}");
        assert!(exit.stderr_tail.ends_with(tail) && exit.stderr_tail.len() <= 2048, "{script}: {exit:?}");
        assert_eq!(report.error, "", "{script}");
        assert!(exit.time.is_some_and(|time| time.seconds > 1_700_000_000));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_start_says_why_and_what_to_do() {
    type Change = fn(&mut v1::Assignment);
    fn program(gang: &mut v1::Assignment, name: &str) {
        gang.spec.as_mut().unwrap().command = vec![name.to_owned()];
    }
    fn script(gang: &mut v1::Assignment, name: &str) {
        gang.spec.as_mut().unwrap().command = ["python3", "-u", name].map(str::to_owned).into();
    }
    let world = World::start().await;
    let path = |gang: &mut v1::Assignment, path: &str| {
        _ = gang.spec.as_mut().unwrap().env.insert("PATH".into(), path.into());
    };
    std::fs::create_dir(world.path("bin")).unwrap();
    std::fs::write(world.path("bin/no-program"), "#!/no/such/interpreter\n").unwrap();
    let table: [(Change, &str); 9] = [
        (|g| program(g, "no-such-program"), "program \"no-such-program\" was not found; looked in /"),
        (|g| program(g, "/no/such/program"), "/no/such/program is not there; install it on this node"),
        (|g| script(g, "train.py"), "script \"train.py\" is a relative path; give an absolute one, or set"),
        (|g| script(g, "/no/such/train.py"), "script /no/such/train.py cannot be read: No such file"),
        (|g| program(g, "/etc/passwd"), "/etc/passwd is not an executable file"),
        (|g| program(g, "sub/program"), "is a relative path; give an absolute one, or set working_dir"),
        (
            |g| g.spec.as_mut().unwrap().working_dir = "/no/such/dir".into(),
            "/no/such/dir cannot be used: No such",
        ),
        (|g| g.spec.as_mut().unwrap().working_dir = "/etc/passwd".into(), "/etc/passwd is not a directory"),
        (|g| g.placement.as_mut().unwrap().address = "192.0.2.1".into(), "cannot serve on 192.0.2.1: Cannot"),
    ];
    for (number, (change, expected)) in table.into_iter().enumerate() {
        let mut gang = gang(&world, &format!("j{number}"), "true");
        change(&mut gang);
        let report = world.run(&gang).await;
        assert!(report.error.contains(expected) && report.exits.is_empty(), "{report:?}");
    }

    // The job's own PATH is where its program is looked for, and a file that nobody may run is passed over.
    let mut gang = gang(&world, "path", "true");
    program(&mut gang, "no-program");
    path(&mut gang, world.path("bin").to_str().unwrap());
    assert!(world.run(&gang).await.error.contains("was not found"));
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(world.path("bin/no-program"), mode).unwrap();
    gang.generation = 2;
    let error = world.run(&gang).await.error;
    assert!(error.contains("failed to start") && error.contains("bin/no-program"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_that_cannot_be_written_are_an_error_of_the_node() {
    let world = World::start().await;
    std::fs::write(world.path("data/logs"), "in the way").unwrap();
    let error = world.run(&gang(&world, "j1", "true")).await.error;
    assert!(error.contains("failed to make the log directory"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_ranks_of_a_node_are_launched_or_none() {
    let world = World::start().await;
    let gang = with_ranks(gang(&world, "j1", "echo $$ > $DIR/pid$LOCAL_RANK; exec sleep 1000"), 3);
    world.want(&gang, DesiredPhase::Prepared).await;
    world.observe(&gang, ObservedPhase::Prepared).await;
    std::fs::create_dir(world.log_dir(&gang, 2).join("stdout.log")).unwrap();
    let report = world.run(&gang).await;
    assert!(report.error.contains("failed to open") && report.exits.is_empty(), "{report:?}");
    let was_running = |message: &v1::session_request::Message| match message {
        v1::session_request::Message::Gang(report) => report.phase() == ObservedPhase::Running,
        _ => false,
    };
    assert!(!world.coordinator.state().heard.iter().any(was_running));
    for rank in 0..2 {
        // A rank may have been killed before it wrote its id.
        if let Ok(pid) = std::fs::read_to_string(world.path(&format!("pid{rank}"))) {
            pid.trim().parse().is_ok_and(is_running).then(|| panic!("rank {rank} is left"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_daemon_left_is_kept() {
    let world = World::start().await;
    let gang = gang(&world, "j1", "echo new");
    let dir = world.log_dir(&gang, 0);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("stdout.log"), "old\n").unwrap();
    world.run(&gang).await;
    assert_eq!(text_of(&dir.join("stdout.log")).await, "old\nnew\n");
}
