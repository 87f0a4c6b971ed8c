//! The node's core as tables and random histories.

use std::collections::BTreeMap;

use muster_core::types::{JobSpec, NodeName, NodePlacement, Rank};
use proptest::prelude::*;

use super::*;

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
        Effect::Launch(_) => "launch",
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
        assert_eq!(names(&core.step(input)), expected, "{shown}");
    }
    core
}

fn exit() -> RankExit {
    RankExit { rank: Rank(0), code: Some(0), signal: None, time: Millis(0), stderr_tail: String::new() }
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
        let effects = core.step(Input::Assign(Box::new(of_job(number))));
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
fn shutdown_says_why_before_the_ranks_end() {
    let core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Launched(gang(1)), &["report"]),
        (Input::Shutdown, &["report", "stop"]),
        // Nothing new is begun, and nothing is said that would be taken for the job's fault.
        (assign(2, DesiredPhase::Prepared), &[]),
        (assign(2, DesiredPhase::Stopped), &["report"]),
    ]);
    assert_eq!(core.report(&gang(1)).unwrap().error.as_deref(), Some("its daemon was stopped"));
    assert_eq!(core.report(&gang(2)).unwrap().error, None);
}

#[test]
fn shutdown_is_the_cause_also_while_the_ranks_are_launched() {
    let core = check(vec![
        (assign(1, DesiredPhase::Running), &["start", "launch"]),
        (Input::Prepared(gang(1), None), &["report"]),
        (Input::Shutdown, &["report", "stop"]),
        (Input::Launched(gang(1)), &["report"]),
        (Input::Exited(gang(1), exit()), &["report"]),
        (Input::Gone(gang(1)), &["report"]),
    ]);
    assert_eq!(core.report(&gang(1)).unwrap().error.as_deref(), Some("its daemon was stopped"));
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
            for effect in core.step(input) {
                match effect {
                    Effect::Start(a) => {
                        assert!(newest < a.gang.generation, "generations rise: {newest} then {}", a.gang);
                        newest = a.gang.generation;
                        running.insert(a.gang, false);
                    }
                    Effect::Launch(a) => launches.push(a.gang),
                    Effect::Stop(gang, _) => { running.insert(gang, true); }
                    Effect::Release(_) | Effect::Report(_) => {}
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
            core.step(Input::Gone(gang.clone()));
        }
        prop_assert!(core.is_idle() && core.reports().is_empty());
    }
}
