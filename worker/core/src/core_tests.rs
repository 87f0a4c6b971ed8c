//! The node's core as tables and random histories.

use std::collections::BTreeMap;

use muster_core::types::{JobSpec, NodeName, NodePlacement, Rank, RankExit, RendezvousReport, StopMode};
use proptest::prelude::*;

use super::*;
use crate::lease::Fence;

fn assignment(generation: u32, phase: DesiredPhase) -> Assignment {
    let spec = JobSpec::new(vec!["train".into()]);
    let placement = NodePlacement {
        node: NodeName::new("n").unwrap(),
        address: [127, 0, 0, 1].into(),
        group_rank: 0,
        first_rank: Rank(0),
        procs: 1,
        gpus: vec![],
    };
    let (world_size, group_world_size) = (1, 1);
    let master_addr = [127, 0, 0, 1].into();
    let (master_port, restart_count) = (None, 0);
    let stop = StopMode { signal: spec.stop_signal, grace: spec.stop_grace, dump_stacks: false };
    let gang = gang(generation);
    Assignment {
        gang,
        phase,
        spec,
        placement,
        world_size,
        group_world_size,
        master_addr,
        master_port,
        restart_count,
        stop,
    }
}

fn gang(generation: u32) -> GangId {
    GangId { job: JobId::new("j").unwrap(), generation: Generation(generation) }
}

fn assign(generation: u32, phase: DesiredPhase) -> Input {
    Input::Assign(Box::new(assignment(generation, phase)))
}

/// Effects without their contents.
fn names(effects: &[Effect]) -> Vec<&'static str> {
    let name = |effect: &Effect| match effect {
        Effect::Start(_) => "start",
        Effect::Launch(..) => "launch",
        Effect::Fence(..) => "fence",
        Effect::Kill(_) => "kill",
        Effect::Leaving(_) => "leaving",
        Effect::Stop(..) => "stop",
        Effect::Release(_) => "release",
        Effect::Report(_) => "report",
    };
    effects.iter().map(name).collect()
}

fn check(script: Vec<(Input, &[&str])>) -> Core {
    let mut core = Core::default();
    for (input, expected) in script {
        let shown = format!("{input:?}");
        assert_eq!(names(&core.step(Millis(0), input)), expected, "{shown}");
    }
    core
}

fn exit() -> RankExit {
    RankExit {
        rank: Rank(0),
        code: Some(0),
        signal: None,
        time: Millis(0),
        stderr_tail: String::new(),
        out_of_memory: false,
        error: None,
    }
}

#[test]
fn a_gang_is_prepared_launched_and_forgotten() {
    use DesiredPhase::{Forgotten, Prepared, Running, Stopped};
    let core = check(vec![
        (assign(1, Prepared), &["start"]),
        (assign(1, Prepared), &[]),
        (Input::Prepared(gang(1), Some(29500)), &["report"]),
        (assign(1, Running), &["launch"]),
        (assign(1, Running), &[]),
        (Input::Launched(gang(1)), &["report"]),
        (assign(1, Stopped), &["stop"]),
        (assign(1, Stopped), &[]),
        (Input::Exited(gang(1), exit()), &["report"]),
        (Input::Exited(gang(1), exit()), &["report"]),
        (Input::Gone(gang(1)), &["report"]),
        (assign(1, Forgotten), &["release"]),
        (assign(1, Running), &[]),
        (assign(1, Forgotten), &[]),
    ]);
    assert!(core.reports().is_empty());
}

#[test]
fn what_is_stuck_at_the_store_is_said_while_the_gang_runs() {
    let stuck = |come| Some(Box::new(RendezvousReport { come, ..RendezvousReport::default() }));
    let rendezvous = |come| Input::Rendezvous(gang(1), stuck(come));
    let mut core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Prepared(gang(1), Some(29500)), &["report"]),
        (Input::Processes(gang(1), vec![77]), &[]),
        (Input::Launched(gang(1)), &["report"]),
        (rendezvous(3), &["report"]),
        (Input::Processes(gang(2), vec![1]), &[]),
    ]);
    let report = core.report(&gang(1)).unwrap();
    assert_eq!((report.processes, report.rendezvous), (vec![77], stuck(3)));
    let adopted = names(&core.step(Millis(0), Input::Processes(gang(1), vec![78])));
    assert_eq!(adopted, ["report"], "the ranks ran before their processes were told");
    core.step(Millis(0), Input::Gone(gang(1)));
    assert_eq!(core.report(&gang(1)).unwrap().rendezvous, None, "the store went with them");
    assert!(core.step(Millis(0), rendezvous(3)).is_empty());
}

#[test]
fn what_a_welcome_does_not_list_is_stopped_and_forgotten() {
    let core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Prepared(gang(1), None), &["report"]),
        (Input::Launched(gang(1)), &["report"]),
        (Input::Welcome(vec![]), &["stop"]),
        (Input::Gone(gang(1)), &["report", "release"]),
    ]);
    assert!(core.is_idle());
}

#[test]
fn a_newer_generation_waits_for_the_older_ones_end() {
    check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Launched(gang(1)), &["report"]),
        (assign(2, DesiredPhase::Prepared), &["stop"]),
        (assign(2, DesiredPhase::Running), &[]),
        (Input::Gone(gang(1)), &["report", "start", "launch"]),
        (assign(1, DesiredPhase::Forgotten), &["release"]),
    ]);
}

#[test]
fn an_older_generation_is_not_brought_back() {
    check(vec![(assign(2, DesiredPhase::Prepared), &["start"]), (assign(1, DesiredPhase::Running), &[])]);
    check(vec![
        (assign(2, DesiredPhase::Prepared), &["start"]),
        (assign(2, DesiredPhase::Forgotten), &["stop"]),
        (Input::Gone(gang(2)), &["report", "release"]),
        (assign(1, DesiredPhase::Running), &[]),
        (assign(3, DesiredPhase::Running), &["start", "launch"]),
    ]);
}

#[test]
fn a_waiting_generation_may_be_overtaken() {
    let core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Launched(gang(1)), &["report"]),
        (assign(2, DesiredPhase::Running), &["stop"]),
        (assign(3, DesiredPhase::Prepared), &["report"]),
        (Input::Gone(gang(1)), &["report", "start"]),
    ]);
    assert_eq!(core.report(&gang(2)).unwrap().phase, ObservedPhase::Stopped, "it never began");
}

#[test]
fn a_stop_of_what_is_not_held_is_answered() {
    let core = check(vec![(assign(1, DesiredPhase::Stopped), &["report"])]);
    assert_eq!(core.report(&gang(1)).unwrap().phase, ObservedPhase::Stopped);
}

#[test]
fn what_is_held_is_bounded() {
    let mut core = Core::default();
    let of_job = |number: usize| {
        let job = JobId::new(format!("j{number}")).unwrap();
        let gang = GangId { job, generation: Generation(1) };
        Assignment { gang, ..assignment(1, DesiredPhase::Prepared) }
    };
    for number in 0..HELD_MAX + 10 {
        let expected: &[&str] = match number {
            ..GANGS_MAX => &["start"],
            GANGS_MAX..HELD_MAX => &["report"],
            HELD_MAX.. => &[],
        };
        let effects = core.step(Millis(0), Input::Assign(Box::new(of_job(number))));
        assert_eq!(names(&effects), expected, "{number}");
    }
    let refused = core.report(&of_job(GANGS_MAX).gang).unwrap();
    assert!(refused.error.unwrap().contains("runs 256 gangs already"));
}

#[test]
fn what_cannot_be_prepared_is_reported_and_never_launched() {
    let core = check(vec![
        (assign(1, DesiredPhase::Prepared), &["start"]),
        (Input::Failed(gang(1), "no such program".into()), &["report"]),
        (assign(1, DesiredPhase::Stopped), &[]),
    ]);
    let report = core.report(&gang(1)).unwrap();
    assert_eq!((report.phase, report.error.as_deref()), (ObservedPhase::Stopped, Some("no such program")));
}

#[test]
fn shutdown_says_that_it_leaves_before_the_ranks_end() {
    let core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Launched(gang(1)), &["report"]),
        (Input::Shutdown, &["leaving", "stop"]),
        // Nothing new is begun, and nothing is said that would be taken for the job's fault.
        (assign(2, DesiredPhase::Prepared), &[]),
        (assign(2, DesiredPhase::Stopped), &["report"]),
    ]);
    assert_eq!(core.report(&gang(2)).unwrap().error, None);
    assert!(core.is_stopping());
}

fn at(core: &mut Core, now: u64, input: Input) -> Vec<Effect> {
    core.step(Millis(now), input)
}

#[test]
fn ranks_live_by_the_lease() {
    let mut core = Core::default();
    let renewed = |sent| Input::Renewed { sent: Millis(sent), lease: Millis(10_000) };
    let fence =
        |until: u64| Fence { term: Millis(until - 2500), kill: Millis(until - 1000), lease: Millis(10_000) };
    assert!(at(&mut core, 0, renewed(0)).is_empty(), "nothing runs");
    let launched = at(&mut core, 10, assign(1, DesiredPhase::Running));
    assert!(matches!(&launched[1], Effect::Launch(_, Some(told)) if *told == fence(10_000)));
    at(&mut core, 20, Input::Launched(gang(1)));
    assert_eq!(at(&mut core, 1500, renewed(1000)), [Effect::Fence(gang(1), fence(11_000))]);
    assert_eq!(at(&mut core, 1600, renewed(900)), [], "an older heartbeat takes nothing back");
    let gone = Input::CoordinatorGone { at: Millis(5000) };
    assert_eq!(at(&mut core, 5000, gone), [Effect::Fence(gang(1), fence(15_000))]);
    assert_eq!(core.next_deadline(), Some(Millis(14_000)));
    assert_eq!(at(&mut core, 14_000, Input::Tick), [], "the shim gets a moment");
    assert_eq!(core.next_deadline(), Some(Millis(14_500)));
    assert_eq!(at(&mut core, 14_500, Input::Tick), [Effect::Kill(gang(1))], "it does not act: it is killed");
    at(&mut core, 14_600, Input::Fenced(gang(1)));
    assert_eq!(names(&at(&mut core, 14_700, Input::Gone(gang(1)))), ["report"]);
    assert!(core.report(&gang(1)).unwrap().error.unwrap().contains("could not renew its lease"));
    assert_eq!(core.next_deadline(), None);
}

#[test]
fn a_job_may_ask_to_be_stopped_when_the_coordinator_is_gone() {
    let mut core = Core::default();
    let mut strict = assignment(1, DesiredPhase::Running);
    strict.spec.on_coordinator_loss = muster_core::types::CoordinatorLoss::Stop;
    at(&mut core, 0, Input::Renewed { sent: Millis(0), lease: Millis(10_000) });
    at(&mut core, 0, Input::Assign(Box::new(strict)));
    at(&mut core, 0, Input::Launched(gang(1)));
    assert_eq!(at(&mut core, 5000, Input::CoordinatorGone { at: Millis(5000) }), []);
}

#[test]
fn a_shim_that_is_adopted_is_as_if_this_daemon_had_started_it() {
    let mut core = Core::default();
    let fence = Fence { term: Millis(7500), kill: Millis(9000), lease: Millis(10_000) };
    let adopted = Adopted {
        assignment: assignment(2, DesiredPhase::Running),
        master_port: Some(29500),
        launched: true,
        exits: vec![],
        fence: Some(fence),
        surroundings: None,
    };
    at(&mut core, 5000, Input::Adopted(Box::new(adopted)));
    assert_eq!((core.reports().len(), core.reports()[0].phase), (1, ObservedPhase::Running));
    assert_eq!(names(&at(&mut core, 5001, assign(2, DesiredPhase::Running))), Vec::<&str>::new());
    // Only the coordinator is gone: the ranks run on, by what the earlier daemon knew of the lease.
    assert_eq!(names(&at(&mut core, 6000, Input::CoordinatorGone { at: Millis(6000) })), ["fence"]);
    assert_eq!(names(&at(&mut core, 6001, assign(1, DesiredPhase::Running))), Vec::<&str>::new());
    assert_eq!(names(&at(&mut core, 6002, Input::Welcome(vec![]))), ["stop"]);
}

#[test]
fn ranks_that_the_kernel_holds_are_said_and_forgotten_only_when_gone() {
    let core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Launched(gang(1)), &["report"]),
        (assign(1, DesiredPhase::Stopped), &["stop"]),
        (Input::Killed(gang(1)), &["report"]),
        (assign(1, DesiredPhase::Forgotten), &[]),
        (Input::Gone(gang(1)), &["report", "release"]),
    ]);
    assert!(core.is_idle());
}

#[test]
fn a_stop_is_told_again_if_there_is_less_time() {
    let mut core = Core::default();
    at(&mut core, 0, assign(1, DesiredPhase::Running));
    let stop = |grace| {
        let mut assignment = assignment(1, DesiredPhase::Stopped);
        assignment.stop.grace = Millis(grace);
        Input::Assign(Box::new(assignment))
    };
    for (grace, expected) in [(30_000, 1), (30_000, 0), (5000, 1), (9000, 0)] {
        assert_eq!(at(&mut core, 0, stop(grace)).len(), expected, "{grace}");
    }
    assert_eq!(core.next_deadline(), Some(Millis(5000).plus(SHIM_SLACK)));
}

fn input() -> impl Strategy<Value = (u8, u32)> {
    (0..10_u8, 1..5_u32)
}

proptest! {
    /// Whatever comes in whatever order: one generation of a job runs at a time, nothing is launched twice, and
    /// after an empty welcome everything that started has been told to stop.
    #[test]
    fn one_generation_runs_at_a_time(history in prop::collection::vec(input(), 0..60)) {
        let mut core = Core::default();
        let (mut running, mut launched) = (BTreeMap::new(), std::collections::BTreeSet::new());
        let mut newest = Generation(0);
        let mut apply = |core: &mut Core, running: &mut BTreeMap<GangId, bool>, input| {
            let mut launches = vec![];
            for effect in core.step(Millis(0), input) {
                match effect {
                    Effect::Start(a) => {
                        assert!(newest < a.gang.generation, "generations rise: {newest} then {}", a.gang);
                        newest = a.gang.generation;
                        running.insert(a.gang, false);
                    }
                    Effect::Launch(a, _) => launches.push(a.gang),
                    Effect::Stop(gang, _) => { running.insert(gang, true); }
                    _ => {}
                }
            }
            launches
        };
        for (kind, generation) in history {
            let input = match kind {
                0 | 1 => assign(generation, DesiredPhase::Prepared),
                2 | 3 => assign(generation, DesiredPhase::Running),
                4 => assign(generation, DesiredPhase::Stopped),
                5 => assign(generation, DesiredPhase::Forgotten),
                6 => Input::Prepared(gang(generation), None),
                7 => Input::Launched(gang(generation)),
                8 if running.remove(&gang(generation)).is_some() => Input::Gone(gang(generation)),
                9 => Input::Welcome(vec![assignment(generation, DesiredPhase::Running)]),
                _ => continue,
            };
            for gang in apply(&mut core, &mut running, input) {
                prop_assert!(launched.insert(gang), "launched twice");
            }
            prop_assert!(running.len() <= 1, "{running:?}");
        }
        apply(&mut core, &mut running, Input::Welcome(vec![]));
        prop_assert!(running.values().all(|told| *told), "{running:?}");
        for gang in running.keys() {
            core.step(Millis(0), Input::Gone(gang.clone()));
        }
        prop_assert!(core.is_idle() && core.reports().is_empty());
    }
}
