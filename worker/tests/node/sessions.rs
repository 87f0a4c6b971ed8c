//! The one stream to the coordinator: joined, kept, and found again, while ranks run on.

use super::*;
use tonic::Status;
use v1::session_request::Message as Up;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_says_what_it_has_and_keeps_its_lease() {
    let world = World::start().await;
    let join = world.coordinator.state().joins[0].clone();
    let hello = world.session(1).await;
    assert_eq!((join.node_name.as_str(), join.address.as_str()), ("n1", "127.0.0.1"));
    assert_eq!((hello.node_name, hello.incarnation, hello.gangs), ("n1".into(), join.incarnation, vec![]));
    let inventory = join.inventory.unwrap();
    let total = inventory.total.unwrap();
    assert!(total.cpu_millis >= 1000 && total.memory_bytes > 1 << 20, "{total:?}");
    assert!(!inventory.hostname.is_empty() && !inventory.version.is_empty() && !join.boot_id.is_empty());
    let beats = eventually("heartbeats", || {
        let state = world.coordinator.state();
        let seqs = state.heard.iter().filter_map(|message| match message {
            Up::Heartbeat(beat) => Some(beat.seq),
            _ => None,
        });
        let seqs: Vec<_> = seqs.collect();
        if seqs.len() >= 3 { Ok(seqs) } else { Err(seqs) }
    })
    .await;
    assert_eq!(beats[..3], [1, 2, 3]);
    assert!(matches!(world.coordinator.state().heard[0], Up::Hello(_)), "hello comes first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_coordinator_is_left_after_a_lease_and_ranks_run_on() {
    let world = World::with(Coordinator::start(Duration::from_millis(500)).await, vec![]).await;
    let gang = gang(&world, "j1", "echo $$ > $DIR/pid; exec sleep 1000");
    world.coordinator.state().desired =
        vec![v1::Assignment { phase: DesiredPhase::Running.into(), ..gang.clone() }];
    world.want(&gang, DesiredPhase::Running).await;
    world.observe(&gang, ObservedPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    let sessions = world.coordinator.hellos().len();
    world.coordinator.state().acks_heartbeats = false;
    let hello = world.session(sessions + 1).await;
    assert_eq!(hello.gangs.len(), 1, "the whole observed state");
    assert_eq!((hello.gangs[0].phase(), hello.gangs[0].master_port > 0), (ObservedPhase::Running, true));
    assert!(is_running(pid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_broken_session_ends_the_daemon() {
    let world = World::start().await;
    let gang = gang(&world, "j1", "echo $$ > $DIR/pid; exec sleep 1000");
    world.coordinator.state().desired =
        vec![v1::Assignment { phase: DesiredPhase::Running.into(), ..gang.clone() }];
    world.want(&gang, DesiredPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    let table = [
        Status::invalid_argument("points.seq must rise"),
        Status::already_exists("a newer session has begun"),
        Status::unauthenticated("the token has expired"),
        Status::out_of_range("the message is too large"),
    ];
    for (number, status) in (2..).zip(table) {
        world.coordinator.break_session(status).await;
        world.session(number).await;
    }
    assert!(is_running(pid) && !world.task.is_finished());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_coordinator_is_tried() {
    // Bound and given up: nobody listens there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    World::with(Coordinator::start(LEASE).await, vec![format!("http://{nobody}")]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_let_go_of_in_time_is_taken() {
    let coordinator = Coordinator::start(LEASE).await;
    let held = || Status::already_exists("node name n1 is held by another live daemon");
    coordinator.state().refusals.extend([held(), held()]);
    let world = World::with(coordinator, vec![]).await;
    assert!(world.coordinator.state().refusals.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_never_work_ends_the_daemon_in_words() {
    let coordinator = Coordinator::start(LEASE).await;
    coordinator.state().refusals.push_back(Status::invalid_argument("inventory.labels are more than 256"));
    let dir = Dir::new();
    let run = |urls| {
        let run = muster_worker::run(config(urls, dir.path()), CancellationToken::new());
        async { tokio::time::timeout(PATIENCE, run).await.expect("it ends by itself") }
    };
    let refused = run(vec![coordinator.url()]).await.unwrap_err().to_string();
    assert_eq!(refused, "the coordinator refuses this node: inventory.labels are more than 256");
    for urls in [vec![], vec!["10.0.0.1".to_owned()]] {
        let error = run(urls).await.unwrap_err();
        assert!(
            matches!(error, Error::Url { .. }) && error.to_string().contains("http://10.0.0.1:7070"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_daemon_holds_a_data_directory() {
    let world = World::start().await;
    let config = config(vec![world.coordinator.url()], world.dir.path());
    let second = muster_worker::run(config.clone(), CancellationToken::new());
    let error = tokio::time::timeout(PATIENCE, second).await.expect("it ends at once").unwrap_err();
    assert!(matches!(&error, Error::DataDirHeld(path) if path.ends_with("data")), "{error}");
    assert!(error.to_string().contains("stop it or choose another --data-dir"), "{error}");
    // It is let go of with the daemon.
    let World { coordinator, dir: _dir, stop, task } = world;
    stop.cancel();
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap().unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(muster_worker::run(config, stop.clone()));
    eventually("the second daemon", || holds(coordinator.hellos().len() == 2)).await;
    stop.cancel();
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap().unwrap();
}
