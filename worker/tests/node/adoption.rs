//! Ranks outlive their daemon: their shim holds them, and the next daemon goes on from where the last one was.

use std::net::Ipv4Addr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::telemetry::{REPORTER, connect, report};
use super::*;

/// Counts on standard output until the file `done` with its local rank is there, and says how it went.
const COUNTER: &str = "echo $$ > $DIR/pid$LOCAL_RANK; echo $MUSTER_TELEMETRY > $DIR/socket$LOCAL_RANK; \
                       i=0; while [ ! -e $DIR/done$LOCAL_RANK ]; do i=$((i+1)); echo $i; sleep 0.01; done; \
                       exit $((LOCAL_RANK + 3))";

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Stops a process, and returns once none of its threads runs.
async fn freeze(pid: i32) {
    signal(pid, Signal::SIGSTOP);
    eventually("a frozen process", || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let stats: Vec<String> =
            threads.map(|thread| std::fs::read_to_string(thread.path().join("stat")).unwrap()).collect();
        if stats.iter().all(|stat| stat.contains(") T ")) { Ok(()) } else { Err(stats) }
    })
    .await;
}

fn only_shim(world: &World) -> i32 {
    let [shim] = shims(world.dir.path())[..] else { panic!("{:?}", shims(world.dir.path())) };
    shim
}

/// Numbered from 1 without a gap.
fn assert_complete(points: &[(u64, u64)], count: u64) {
    let expected: Vec<_> = (1..=count).map(|number| (number, number)).collect();
    assert_eq!(points, expected);
}

async fn run_is_empty(world: &World) {
    let run = world.path("data/run");
    eventually("the end of the shims", || holds(std::fs::read_dir(&run).unwrap().count() == 0)).await;
}

fn record(world: &World, job: &str) -> (PathBuf, serde_json::Value) {
    let path = world.path(&format!("data/run/{job}.1/shim.json"));
    let record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    (path, record)
}

/// Connects to the ranks' store, and validates as torch's clients do.
async fn client_of_store(port: u32) -> TcpStream {
    let port = u16::try_from(port).unwrap();
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    client.write_all(b"\x00\xce\xf7\x85\x3c").await.unwrap();
    client
}

/// The store answers.
async fn pings(client: &mut TcpStream) {
    client.write_all(b"\x0dping").await.unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_daemon_goes_on_where_the_last_one_was() {
    let mut world = World::start().await;
    let gang = with_ranks(gang(&world, "j1", COUNTER), 3);
    world.desire(&[&gang]);
    world.want(&gang, DesiredPhase::Running).await;
    world.observe(&gang, ObservedPhase::Running).await;
    let mut pids = vec![];
    for rank in 0..3 {
        pids.push(pid_in(&world.path(&format!("pid{rank}"))).await);
    }
    let mut rank = connect(&world, 2).await;
    report(&mut rank, 1..=3).await;
    let store = world.coordinator.report(&gang).unwrap().master_port;
    let mut early = client_of_store(store).await;
    world.kill_daemon().await;
    pings(&mut early).await;
    pings(&mut client_of_store(store).await).await;

    // One rank ends while nobody looks, and another reports.
    report(&mut rank, 4..=9).await;
    std::fs::write(world.path("done1"), "").unwrap();
    gone(pids[1]).await;
    let hello = world.start_daemon().await;
    assert_eq!((hello.gangs.len(), hello.gangs[0].phase()), (1, ObservedPhase::Running));
    assert_eq!(hello.gangs[0].master_port, store);
    pings(&mut early).await;
    assert!(is_running(pids[0]) && is_running(pids[2]), "they are the same");
    eventually("the exit", || {
        let exits = world.coordinator.report(&gang).unwrap().exits;
        exits.first().filter(|exit| exit.code == Some(4)).cloned().ok_or(exits)
    })
    .await;

    // All end while nobody looks, and with them their shim and its store.
    let shim = only_shim(&world);
    world.kill_daemon().await;
    report(&mut rank, 10..=12).await;
    drop(rank);
    for rank in [0, 2] {
        std::fs::write(world.path(&format!("done{rank}")), "").unwrap();
    }
    gone(shim).await;
    assert!(early.read(&mut [0]).await.is_ok_and(|length| length == 0), "its store ends with it");
    let hello = world.start_daemon().await;
    assert_eq!(hello.gangs[0].phase(), ObservedPhase::Stopped, "{hello:?}");
    assert_eq!(hello.gangs[0].error, "");
    let mut codes: Vec<_> = hello.gangs[0].exits.iter().map(|exit| (exit.rank(), exit.code)).collect();
    assert_eq!(codes[0], (1, Some(4)), "in the order in which they ended");
    codes.sort_unstable();
    assert_eq!(codes, [(0, Some(3)), (1, Some(4)), (2, Some(5))]);
    eventually("points", || holds(world.coordinator.kept(&gang, 2).len() == 12)).await;
    assert_complete(&world.coordinator.kept(&gang, 2), 12);
    for local_rank in 0..3 {
        let text = text_of(&world.log_dir(&gang, local_rank).join("stdout.log")).await;
        assert!(text.lines().enumerate().all(|(at, line)| line == (at + 1).to_string()), "{text}");
    }
    world.want(&gang, DesiredPhase::Forgotten).await;
    run_is_empty(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_daemons_lose_nothing() {
    let mut world = World::start().await;
    let gang = gang(&world, "j1", COUNTER);
    world.desire(&[&gang]);
    world.want(&gang, DesiredPhase::Running).await;
    let mut rank = connect(&world, 0).await;
    let pid = pid_in(&world.path("pid0")).await;
    let mut reported = 0;
    for daemon in 0..100 {
        report(&mut rank, reported + 1..=reported + 7).await;
        reported += 7;
        world.kill_daemon().await;
        // Some do not live long enough to say anything.
        if daemon % 3 == 0 {
            let config = config(vec![world.coordinator.url()], world.dir.path());
            world.task = tokio::spawn(muster_worker::run(config, CancellationToken::new()));
            tokio::time::sleep(Duration::from_millis(daemon / 5)).await;
            world.kill_daemon().await;
        }
        let hello = world.start_daemon().await;
        let phases: Vec<_> = hello.gangs.iter().map(v1::GangReport::phase).collect();
        assert_eq!(phases, [ObservedPhase::Running], "{daemon}: {hello:?}");
    }
    assert!(is_running(pid));
    drop(rank);
    std::fs::write(world.path("done0"), "").unwrap();
    let report = world.observe(&gang, ObservedPhase::Stopped).await;
    assert_eq!(report.exits.iter().map(|exit| exit.code).collect::<Vec<_>>(), [Some(3)]);
    eventually("points", || holds(world.coordinator.kept(&gang, 0).len() as u64 == reported)).await;
    assert_complete(&world.coordinator.kept(&gang, 0), reported);
    let text = text_of(&world.log_dir(&gang, 0).join("stdout.log")).await;
    assert!(text.lines().count() > 10);
    assert!(text.lines().enumerate().all(|(at, line)| line == (at + 1).to_string()), "{text}");
}

/// A rank with a grandchild in a session of its own that nobody in the gang waits for.
const ESCAPER: &str = "(setsid sh -c 'echo $$ > $DIR/escaped; exec sleep 1000' &); \
                       echo $$ > $DIR/pid; exec sleep 1000";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_and_all_they_started_die_with_their_shim() {
    for daemon_dies in [false, true] {
        let mut world = World::start().await;
        let gang = gang(&world, "j1", ESCAPER);
        world.desire(&[&gang]);
        world.want(&gang, DesiredPhase::Running).await;
        world.observe(&gang, ObservedPhase::Running).await;
        let pids = [pid_in(&world.path("pid")).await, pid_in(&world.path("escaped")).await];
        let shim = only_shim(&world);
        if daemon_dies {
            world.kill_daemon().await;
        }
        signal(shim, Signal::SIGKILL);
        gone(pids[0]).await;
        if daemon_dies {
            let hello = world.start_daemon().await;
            assert_eq!(hello.gangs[0].phase(), ObservedPhase::Stopped, "the first that it says");
        }
        let report = world.observe(&gang, ObservedPhase::Stopped).await;
        assert_eq!(report.error, "its shim was killed");
        assert!(!is_running(pids[1]), "it is reported when nothing is left");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_escapes_its_session_ends_with_the_gang() {
    let world = World::start().await;
    let gang = gang(&world, "j1", &ESCAPER.replace("exec sleep 1000\"", "").replace("; exec sleep 1000", ""));
    world.want(&gang, DesiredPhase::Running).await;
    world.observe(&gang, ObservedPhase::Stopped).await;
    // It may have been killed before it wrote its id.
    if let Ok(pid) = std::fs::read_to_string(world.path("escaped")) {
        assert!(!pid.trim().parse().is_ok_and(is_running));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_daemon_ranks_end_with_the_lease() {
    let mut world = World::with(Coordinator::start(Duration::from_secs(4)).await, vec![]).await;
    let script = "trap 'echo asked' TERM; echo $$ > $DIR/pid; while :; do sleep 0.05; done";
    let gang = gang(&world, "j1", script);
    world.desire(&[&gang]);
    world.want(&gang, DesiredPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    // It is renewed.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(is_running(pid));
    let shim = only_shim(&world);
    world.kill_daemon().await;
    let began = Instant::now();
    gone(pid).await;
    let took = began.elapsed();
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(4), "{took:?}");
    gone(shim).await;
    assert!(world.path("data/run/j1.1/final.json").exists());
    let hello = world.start_daemon().await;
    assert_eq!(hello.gangs[0].phase(), ObservedPhase::Stopped);
    assert!(hello.gangs[0].error.contains("lease"), "{hello:?}");
    assert_eq!(hello.gangs[0].exits[0].signal, Some(9));
    assert_eq!(text_of(&world.log_dir(&gang, 0).join("stdout.log")).await, "asked\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thawed_shim_looks_at_the_clock_first() {
    let mut world = World::with(Coordinator::start(Duration::from_secs(2)).await, vec![]).await;
    let gang = gang(&world, "j1", "echo $$ > $DIR/pid; exec sleep 1000");
    world.desire(&[&gang]);
    world.want(&gang, DesiredPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    world.observe(&gang, ObservedPhase::Running).await;
    let shim = only_shim(&world);
    freeze(shim).await;
    world.kill_daemon().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(is_running(pid), "nobody could end it");
    signal(shim, Signal::SIGCONT);
    gone(pid).await;
    gone(shim).await;
    assert!(world.start_daemon().await.gangs[0].error.contains("lease"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_shim_is_killed_when_it_does_not_follow() {
    let world = World::start().await;
    let gang = with_grace(gang(&world, "j1", ESCAPER), Duration::ZERO);
    world.want(&gang, DesiredPhase::Running).await;
    world.observe(&gang, ObservedPhase::Running).await;
    let pids = [pid_in(&world.path("pid")).await, pid_in(&world.path("escaped")).await];
    let shim = only_shim(&world);
    freeze(shim).await;
    world.want(&gang, DesiredPhase::Stopped).await;
    let report = world.observe(&gang, ObservedPhase::Stopped).await;
    assert!(report.error.contains("shim was killed"), "{report:?}");
    assert!([shim, pids[0], pids[1]].into_iter().all(|pid| !is_running(pid)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_shim_is_not_adopted() {
    let mut world = World::start().await;
    let gang = gang(&world, "j1", "echo $$ > $DIR/pid; exec sleep 1000");
    world.desire(&[&gang]);
    world.want(&gang, DesiredPhase::Running).await;
    let pid = pid_in(&world.path("pid")).await;
    let shim = only_shim(&world);
    world.kill_daemon().await;
    freeze(shim).await;
    let hello = world.start_daemon().await;
    assert_eq!(hello.gangs[0].phase(), ObservedPhase::Stopped, "{hello:?}");
    assert!(!is_running(shim) && !is_running(pid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_id_alone_is_nobody() {
    let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let id = other.id();
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let started: u64 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().parse().unwrap();
    for (boot, start_time) in [(None, started + 1), (Some("another"), started)] {
        let mut world = World::start().await;
        let gang = gang(&world, "j1", ESCAPER);
        world.desire(&[&gang]);
        world.want(&gang, DesiredPhase::Running).await;
        let escaped = pid_in(&world.path("escaped")).await;
        let shim = only_shim(&world);
        world.kill_daemon().await;
        signal(shim, Signal::SIGKILL);
        gone(shim).await;
        let (path, mut record) = record(&world, "j1");
        record["pid"] = id.into();
        record["start_time"] = start_time.into();
        if let Some(boot) = boot {
            record["boot_id"] = boot.into();
        }
        std::fs::write(path, record.to_string()).unwrap();
        let hello = world.start_daemon().await;
        assert_eq!(hello.gangs[0].phase(), ObservedPhase::Stopped, "{hello:?}");
        assert!(is_running(id as i32), "it has nothing to do with this");
        gone(escaped).await;
        let (_, mut record) = self::record(&world, "j1");
        // What the test made up is not for its clean-up either.
        record["pid"] = 0.into();
        std::fs::write(world.path("data/run/j1.1/shim.json"), record.to_string()).unwrap();
    }
    other.kill().unwrap();
    other.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_generation_is_launched_once_on_a_node() {
    let mut world = World::start().await;
    let gang = gang(&world, "j1", "echo ran");
    world.run(&gang).await;
    world.want(&gang, DesiredPhase::Forgotten).await;
    run_is_empty(&world).await;
    // The next daemon knows nothing of it, and is told to launch it all the same.
    world.kill_daemon().await;
    assert_eq!(world.start_daemon().await.gangs, []);
    world.want(&gang, DesiredPhase::Running).await;
    eventually("the refusal", || {
        let report = world.coordinator.report(&gang).unwrap();
        holds(report.error == "generation 1 of job j1 was launched on this node before").map_err(|_| report)
    })
    .await;
    assert_eq!(text_of(&world.log_dir(&gang, 0).join("stdout.log")).await, "ran\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_launched_nothing_ends_with_its_daemon() {
    let mut world = World::start().await;
    let gang = gang(&world, "j1", REPORTER);
    world.want(&gang, DesiredPhase::Prepared).await;
    world.observe(&gang, ObservedPhase::Prepared).await;
    let shim = only_shim(&world);
    world.kill_daemon().await;
    gone(shim).await;
    run_is_empty(&world).await;
    assert_eq!(world.start_daemon().await.gangs, []);
}
