//! Ranks end when they are told to, with everything they started, and never later than their daemon.

use super::*;
use v1::session_request::Message as Up;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_ignores_sigterm_is_killed_after_its_grace() {
    let world = World::start().await;
    let script = "trap 'echo asked' TERM; echo $$ > $DIR/pid; while :; do sleep 0.05; done";
    let gang = with_grace(gang(&world, "j1", script), Duration::from_millis(300));
    world.want(&gang, DesiredPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    let began = Instant::now();
    world.want(&gang, DesiredPhase::Stopped).await;
    let report = world.observe(&gang, ObservedPhase::Stopped).await;
    assert!(began.elapsed() >= Duration::from_millis(300), "it had its grace");
    assert_eq!((report.exits[0].code, report.exits[0].signal), (None, Some(9)));
    assert!(!is_running(pid));
    assert_eq!(text_of(&world.log_dir(&gang, 0).join("stdout.log")).await, "asked\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_heeds_sigterm_ends_at_once_even_if_it_was_suspended() {
    let world = World::start().await;
    let script = "trap 'exit 3' TERM; echo $$ > $DIR/pid; while :; do sleep 0.05; done";
    let gang = gang(&world, "j1", script);
    world.want(&gang, DesiredPhase::Running).await;
    let pid = nix::unistd::Pid::from_raw(pid_in(&world.path("pid")).await);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    world.want(&gang, DesiredPhase::Stopped).await;
    let report = world.observe(&gang, ObservedPhase::Stopped).await;
    assert_eq!(report.exits[0].code, Some(3), "long before its grace of {PATIENCE:?}: {report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_rank_leaves_behind_ends_with_it() {
    let world = World::start().await;
    for (number, last) in ["exit 0", "kill -9 $$"].into_iter().enumerate() {
        let script = format!("sleep 1000 & echo $! > $DIR/child{number}; {last}");
        world.run(&gang(&world, &format!("j{number}"), &script)).await;
        gone(pid_in(&world.path(&format!("child{number}"))).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_exit_stops_no_sibling() {
    let world = World::start().await;
    let script = "echo $$ > $DIR/pid$LOCAL_RANK; [ $LOCAL_RANK = 0 ] && exit 5; exec sleep 1000";
    let gang = with_ranks(gang(&world, "j1", script), 2);
    world.want(&gang, DesiredPhase::Running).await;
    let report = eventually("the exit", || {
        let report = world.coordinator.report(&gang);
        report.clone().filter(|report| !report.exits.is_empty()).ok_or(report)
    })
    .await;
    assert_eq!((report.phase(), report.exits[0].code), (ObservedPhase::Running, Some(5)));
    assert!(is_running(pid_in(&world.path("pid1")).await), "that is the coordinator's to decide");
    world.want(&gang, DesiredPhase::Stopped).await;
    let report = world.observe(&gang, ObservedPhase::Stopped).await;
    let ends: Vec<_> = report.exits.iter().map(|exit| (exit.rank(), exit.code, exit.signal)).collect();
    assert_eq!(ends, [(0, Some(5), None), (1, None, Some(15))]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_generation_starts_when_the_old_one_is_gone() {
    let world = World::start().await;
    let script = "trap '' TERM; echo $$ > $DIR/pid; while :; do sleep 0.05; done";
    let old = with_grace(gang(&world, "j1", script), Duration::from_millis(300));
    world.want(&old, DesiredPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    let mut new = gang(&world, "j1", &format!("[ -e /proc/{pid}/exe ] && echo together || echo alone"));
    new.generation = 2;
    world.run(&new).await;
    assert_eq!(text_of(&world.log_dir(&new, 0).join("stdout.log")).await, "alone\n");
    assert_eq!(world.observe(&old, ObservedPhase::Stopped).await.exits[0].signal, Some(9));

    // The old one is not brought back, neither before nor after it is forgotten.
    for phase in [DesiredPhase::Running, DesiredPhase::Forgotten, DesiredPhase::Running] {
        world.want(&old, phase).await;
    }
    let other = gang(&world, "j2", "true");
    world.run(&other).await;
    assert_eq!(world.coordinator.report(&old).unwrap().phase(), ObservedPhase::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_welcome_does_not_list_is_stopped_and_forgotten() {
    let world = World::start().await;
    let [kept, other] = ["kept", "other"].map(|job| gang(&world, job, "echo $$ > pid; exec sleep 1000"));
    let mut pids = vec![];
    for gang in [&kept, &other] {
        world.want(gang, DesiredPhase::Running).await;
        pids.push(pid_in(&world.log_dir(gang, 0).join("pid")).await);
    }
    world.coordinator.state().desired =
        vec![v1::Assignment { phase: DesiredPhase::Running.into(), ..kept.clone() }];
    world.coordinator.break_session(tonic::Status::aborted("the coordinator stops")).await;
    let hello = world.session(2).await;
    assert_eq!(hello.gangs.len(), 2, "it says everything that it holds");
    gone(pids[1]).await;
    assert!(is_running(pids[0]), "what is listed runs on");
    // Its end may be seen here a moment before the daemon takes note.
    let mut session = 3;
    loop {
        world.coordinator.break_session(tonic::Status::aborted("again")).await;
        let jobs: Vec<_> = world.session(session).await.gangs.into_iter().map(|gang| gang.job_id).collect();
        match &jobs[..] {
            [kept] if kept == "kept" => break,
            _ => assert!(session < 20, "{jobs:?}"),
        }
        session += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_is_stopped_leaves_nothing_running() {
    let world = World::start().await;
    let script = "sleep 1000 & echo $! > $DIR/child$LOCAL_RANK; trap 'exit 4' TERM; echo $$ > $DIR/pid$LOCAL_RANK; wait";
    let gang = with_ranks(gang(&world, "j1", script), 2);
    world.want(&gang, DesiredPhase::Running).await;
    let mut pids = vec![];
    for file in ["pid0", "pid1", "child0", "child1"] {
        pids.push(pid_in(&world.path(file)).await);
    }
    let sockets = world.path("data/run");
    assert_eq!(std::fs::read_dir(&sockets).unwrap().count(), 1);
    let World { coordinator, dir: _dir, stop, task } = world;
    stop.cancel();
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap().unwrap();
    for pid in pids {
        gone(pid).await;
    }
    let report = coordinator.report(&gang).unwrap();
    assert_eq!(report.phase(), ObservedPhase::Stopped);
    assert!(report.exits.iter().all(|exit| exit.code == Some(4)) && report.exits.len() == 2, "{report:?}");
    let heard = coordinator.state().heard.clone();
    let leaving = heard.iter().position(|message| matches!(message, Up::Leaving(_)));
    let first_end =
        heard.iter().position(|message| matches!(message, Up::Gang(report) if !report.exits.is_empty()));
    assert!(leaving.is_some() && leaving < first_end, "it leaves before its ranks end: {heard:?}");
    let last = heard.last().cloned();
    assert!(matches!(last, Some(Up::Goodbye(_))), "{last:?}");
    eventually("the sockets' end", || holds(std::fs::read_dir(&sockets).unwrap().count() == 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_without_progress_are_told_of_until_one_shows_some() {
    let world = World::start().await;
    let script = "echo $$ > $DIR/pid$LOCAL_RANK; echo $MUSTER_TELEMETRY > $DIR/socket$LOCAL_RANK; \
                  while [ ! -e $DIR/go$LOCAL_RANK ]; do sleep 0.05; done; \
                  [ $LOCAL_RANK = 0 ] && exit; while :; do echo on; sleep 0.05; done";
    let mut gang = with_grace(with_ranks(gang(&world, "j1", script), 3), Duration::ZERO);
    gang.spec.as_mut().unwrap().progress_timeout = Some(duration_to_wire_std(Duration::from_secs(1)));
    world.want(&gang, DesiredPhase::Running).await;
    let mut rank = telemetry::connect(&world, 2).await;
    telemetry::report(&mut rank, 1..=7).await;
    let quiet = |ranks: usize| {
        let report = world.coordinator.report(&gang);
        report.clone().filter(|report| report.quiet.len() == ranks).map(|report| report.quiet).ok_or(report)
    };
    let stopped = pid_in(&world.path("pid1")).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(stopped), nix::sys::signal::Signal::SIGSTOP).unwrap();
    let told = eventually("silence", || quiet(3)).await;
    let seen: Vec<_> = told.iter().map(|rank| (rank.rank, rank.step, rank.state.as_str())).collect();
    assert_eq!(seen, [(0, None, "S"), (1, None, "T"), (2, Some(7), "S")]);
    std::fs::write(world.path("go2"), "").unwrap();
    eventually("progress", || quiet(0)).await;
    world.want(&gang, DesiredPhase::Stopped).await;
    world.observe(&gang, ObservedPhase::Stopped).await;
}
