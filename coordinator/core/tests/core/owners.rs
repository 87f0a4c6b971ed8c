//! Jobs belong to who submitted them: who may end them, whose request ids are whose, and how much of each owner waits.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::world::{World, exit_of, name as node_name, spec};
use muster_core::types::{JobSpec, Owner, RankExit, RequestId};
use muster_core::{Caller, Input, Job, JobState, NodeState, QueueFull, QueueMax, Refusal, Reply, Rights};

#[expect(clippy::unnecessary_wraps, reason = "as records have it")]
fn name(text: &str) -> Option<Owner> {
    Some(Owner::new(text).unwrap())
}

fn owner(text: &str) -> Caller {
    Caller { name: name(text), rights: Rights::Own }
}

fn operator(text: &str) -> Caller {
    Caller { rights: Rights::All, ..owner(text) }
}

fn submit(world: &mut World, by: Caller, request: Option<&str>, spec: JobSpec) -> Result<Job, Refusal> {
    let request_id = request.map(|id| RequestId::new(id).unwrap());
    match world.input(Input::Submit { by, request_id, spec: Box::new(spec) }).unwrap()? {
        Reply::Job(job) => Ok(*job),
        other => panic!("{other:?}"),
    }
}

fn cancel(world: &mut World, by: Caller, job: &Job, reason: &str) -> Result<Job, Refusal> {
    let (job, reason) = (job.id.to_string(), reason.to_owned());
    match world.input(Input::Cancel { by, job, reason, signal: None }).unwrap()? {
        Reply::Job(job) => Ok(*job),
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_the_owner_and_operators_end_a_job() {
    let mut world = World::with_nodes(&["a"]);
    let job = submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap();
    assert_eq!(job.owner, name("ann"));
    let refused = cancel(&mut world, owner("bob"), &job, "").unwrap_err();
    assert!(
        refused.to_string().contains("belongs to ann, and only ann or an operator may change it"),
        "{refused}"
    );
    assert_eq!(world.state(job.id.as_str()), JobState::Running, "nothing has happened");
    let ended = cancel(&mut world, owner("ann"), &job, "wrong data").unwrap();
    assert_eq!((ended.reason.as_str(), ended.cancelled_by), ("cancelled by ann: wrong data", name("ann")));
    let other = submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap();
    assert_eq!(cancel(&mut world, operator("ops"), &other, "").unwrap().reason, "cancelled by ops");
    // Of a record that is older than owners.
    let old = submit(&mut world, Caller::trusted(), None, spec(1, 1)).unwrap();
    let refused = cancel(&mut world, owner("ann"), &old, "").unwrap_err();
    assert!(refused.to_string().contains("has no known owner, and only an operator"), "{refused}");
    assert_eq!(cancel(&mut world, Caller::trusted(), &old, "").unwrap().reason, "cancelled");
}

#[test]
fn a_record_without_an_owner_is_read() {
    let mut world = World::default();
    let job = submit(&mut world, owner("ann"), Some("r1"), spec(1, 1)).unwrap();
    let mut record = serde_json::to_value(&job).unwrap();
    let fields = record.as_object_mut().unwrap();
    assert!(fields.remove("owner").is_some() && fields.remove("cancelled_by").is_some());
    let read: Job = serde_json::from_value(record).unwrap();
    assert_eq!((read.owner, read.request_id), (None, job.request_id));
}

#[test]
fn reasons_can_be_shown_without_what_a_rank_wrote() {
    let mut world = World::with_nodes(&["a"]);
    let spec = JobSpec { max_restarts: 1, ..spec(1, 1) };
    let id = submit(&mut world, owner("ann"), None, spec).unwrap().id.to_string();
    let secrets = ["error: s3cret; restart 1 of 1", "s3cret"];
    for said in secrets {
        let gang = world.job(&id).gang_id();
        let mut report = world.node("a").gangs[&gang].1.clone();
        let exit = exit_of(0, Some(1), None, world.now);
        report.exits.push(RankExit { stderr_tail: format!("{said}\n"), ..exit });
        world.report(&node_name("a"), report);
        world.pass(60_000);
        let job = world.job(&id);
        let past = &job.past.iter().find(|past| past.generation == gang.generation).unwrap();
        let (whole, redacted) = (&past.reason, past.reason_redacted());
        assert!(whole.contains(said), "{whole}");
        assert!(!redacted.contains("s3cret") && redacted.contains("exit code 1: [redacted]"), "{redacted}");
        assert!(!job.reason_redacted().contains("s3cret"), "{}", job.reason_redacted());
    }
    assert_eq!(world.state(&id), JobState::Failed);
    world.restart_coordinator();
    assert!(!world.job(&id).reason_redacted().contains("s3cret"));
}

#[test]
fn a_request_id_is_its_owners() {
    let mut world = World::default();
    let submit_r1 = |world: &mut World, by, spec| submit(world, by, Some("r1"), spec);
    let anns = submit_r1(&mut world, owner("ann"), spec(1, 1)).unwrap();
    let bobs = submit_r1(&mut world, owner("bob"), spec(1, 1)).unwrap();
    assert_ne!(anns.id, bobs.id, "the same request of somebody else is another one");
    assert_eq!(bobs.owner, name("bob"));
    submit_r1(&mut world, owner("eve"), spec(2, 1)).unwrap();
    world.restart_coordinator();
    for (by, job) in [("ann", &anns), ("bob", &bobs)] {
        assert_eq!(submit_r1(&mut world, owner(by), spec(1, 1)).unwrap().id, job.id, "{by} asks again");
    }
    let refused = submit_r1(&mut world, owner("bob"), spec(2, 1)).unwrap_err();
    assert!(matches!(&refused, Refusal::RequestReused { job, .. } if *job == bobs.id), "{refused}");
}

#[test]
fn who_drains_and_cordons_is_said() {
    let mut world = World::with_nodes(&["a", "b"]);
    let job = submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap();
    let set = |cordon: Option<&str>| Input::SetCordon {
        by: name("ops"),
        node: "a".into(),
        cordon: cordon.map(ToOwned::to_owned),
    };
    let people = |world: &World| {
        let node = world.core.node("a").unwrap();
        let drained_by = node.drain.as_ref().and_then(|drain| drain.by.clone());
        (node.cordoned_by.clone(), drained_by, node.uncordoned_by.clone())
    };
    world.input(set(Some("fan")));
    assert_eq!(people(&world), (name("ops"), None, None));
    let drain = Input::Drain { by: name("eve"), node: "a".into(), reason: "kernel".into(), timeout: None };
    world.input(drain);
    assert_eq!(people(&world), (name("ops"), name("eve"), None));
    let moved = world.job(job.id.as_str());
    assert_eq!(moved.past[0].reason, "node a is drained by eve (kernel); starts again, no restart spent");
    world.input(set(None));
    assert_eq!(people(&world), (None, None, name("ops")));
    world.restart_coordinator();
    assert_eq!(people(&world), (None, None, name("ops")), "it is stored");
    world.connect("a");
    assert_eq!(world.core.node("a").unwrap().state, NodeState::Ready);
}

#[test]
fn only_operators_submit_above_the_highest_priority() {
    let mut world = World::default();
    let of = |priority| JobSpec { priority, ..spec(1, 1) };
    submit(&mut world, owner("ann"), None, of(100)).unwrap();
    let refused = submit(&mut world, owner("ann"), None, of(101)).unwrap_err();
    assert_eq!(refused, Refusal::Priority { asked: 101, most: 100 });
    assert!(refused.to_string().contains("priority 101 is above 100"), "{refused}");
    submit(&mut world, operator("ops"), None, of(i32::MAX)).unwrap();
}

#[test]
fn what_waits_is_bounded_for_each_owner_and_for_all() {
    let mut world = World::default();
    let bytes = spec(1, 1).bytes();
    world.config.queue_max = QueueMax { jobs: 3, bytes: 5 * bytes, owner_jobs: 2, owner_bytes: 3 * bytes };
    world.restart_coordinator();
    let large = JobSpec { env: [("A".to_owned(), "x".repeat(2 * bytes))].into(), ..spec(1, 1) };
    let asked = large.bytes();
    let first = submit(&mut world, owner("ann"), Some("r1"), spec(1, 1)).unwrap();
    let full = |owner, waiting, most| Refusal::QueueFull(QueueFull::Bytes { owner, waiting, asked, most });
    let refused = submit(&mut world, owner("ann"), None, large.clone()).unwrap_err();
    assert_eq!(refused, full(name("ann"), bytes, 3 * bytes));
    submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap();
    let refused = submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap_err();
    assert_eq!(refused, Refusal::QueueFull(QueueFull::Jobs { owner: name("ann"), waiting: 2, most: 2 }));
    assert!(
        refused.to_string().contains("2 jobs of ann are waiting already, and at most 2 may of one owner")
    );
    let again = submit(&mut world, owner("ann"), Some("r1"), spec(1, 1)).unwrap();
    assert_eq!(again.id, first.id, "what is there already is given whatever waits");
    submit(&mut world, operator("bob"), None, spec(1, 1)).unwrap();
    let refused = submit(&mut world, Caller::trusted(), None, spec(1, 1)).unwrap_err();
    assert_eq!(refused, Refusal::QueueFull(QueueFull::Jobs { owner: None, waiting: 3, most: 3 }));
    // Whatever ceases to wait makes room: by its end, or by a node.
    cancel(&mut world, owner("ann"), &first, "").unwrap();
    submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap();
    world.connect("a");
    submit(&mut world, owner("ann"), None, spec(1, 1)).unwrap();
    world.restart_coordinator();
    let refused = submit(&mut world, Caller::trusted(), None, spec(1, 1)).unwrap_err();
    assert_eq!(refused, Refusal::QueueFull(QueueFull::Jobs { owner: None, waiting: 3, most: 3 }));
}
