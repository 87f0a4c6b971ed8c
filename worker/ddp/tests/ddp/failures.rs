//! What goes wrong becomes an error on every rank, of the right kind, in time.

use crate::harness::{eventually, now, ready, report_of, run, start, start_on, store};
use crate::models::{loss, mlp, samples};
use muster_ddp::{Ddp, Error, Options, ProcessGroup};
use serde_json::{Value, json};
use std::time::Duration;
use tch::{Device, nn};

#[derive(Clone, Copy)]
pub enum Mismatch {
    Shape,
    Count,
    Name,
}

pub fn mismatch(group: &ProcessGroup, mismatch: Mismatch) -> Result<Value, Error> {
    let vs = nn::VarStore::new(Device::Cpu);
    let (root, config) = (vs.root(), nn::LinearConfig::default());
    let odd_one = group.rank() == 1;
    let width = if odd_one && matches!(mismatch, Mismatch::Shape) { 9 } else { 8 };
    let name = if odd_one && matches!(mismatch, Mismatch::Name) { "other" } else { "first" };
    let _first = nn::linear(&root / name, 4, width, config);
    if odd_one && matches!(mismatch, Mismatch::Count) {
        let _second = nn::linear(&root / "second", 4, 4, config);
    }
    let error = Ddp::new(&vs, group, Options::default()).unwrap_err();
    assert!(matches!(error, Error::ModelMismatch { .. }), "{error:?}");
    // Nobody was left waiting in a collective: the group still works.
    group.barrier()?;
    Err(error)
}

pub fn nothing_to_train(group: &ProcessGroup) -> Result<Value, Error> {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let _net = mlp(&vs);
    vs.freeze();
    let error = Ddp::new(&vs, group, Options::default()).unwrap_err();
    assert!(matches!(error, Error::NothingToTrain), "{error:?}");
    Err(error)
}

pub fn bad_loss(group: &ProcessGroup) -> Result<Value, Error> {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = mlp(&vs);
    let (x, y) = samples(4);
    for mean in [false, true] {
        let mut ddp = Ddp::new(&vs, group, Options::default())?;
        let forward = || if mean { loss(&net, &x, &y).detach() } else { (&y - &x.narrow(1, 0, 3)).abs() };
        let error = ddp.backward(forward).unwrap_err();
        assert!(matches!(error, Error::BadLoss { .. }), "{error:?}");
        assert!(matches!(ddp.backward(|| loss(&net, &x, &y)), Err(Error::Broken)));
    }
    Ok(json!("refused"))
}

fn train(group: &ProcessGroup, mut before_step: impl FnMut(u64)) -> Result<Value, Error> {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = mlp(&vs);
    let (x, y) = samples(8);
    let mut ddp = Ddp::new(&vs, group, Options::default())?;
    for step in 0.. {
        before_step(step);
        ddp.zero_grad()?;
        let asked = now();
        if let Err(error) = ddp.backward(|| loss(&net, &x, &y)) {
            let mut report = report_of(&error);
            report["seconds"] = json!(asked.elapsed().as_secs_f64());
            assert!(matches!(ddp.backward(|| loss(&net, &x, &y)), Err(Error::Broken)));
            return Ok(report);
        }
    }
    unreachable!("a rank was to fail")
}

pub fn train_until_killed(group: &ProcessGroup) -> Result<Value, Error> {
    train(group, |step| {
        if step == 3 {
            ready();
        }
    })
}

pub fn train_until_hung(group: &ProcessGroup) -> Result<Value, Error> {
    train(group, |step| {
        if step == 3 && group.rank() == 1 {
            // Alive, connected, and silent. The harness ends it.
            loop {
                std::thread::park();
            }
        }
    })
}

#[test]
fn different_models_are_an_error_on_every_rank_that_names_the_difference() {
    for (case, words) in [
        ("mismatch_shape", ["[9", "rank 1"]),
        ("mismatch_count", ["second", "rank 1"]),
        ("mismatch_name", ["other", "rank 1"]),
    ] {
        let ranks = run(case, 2);
        for report in &ranks {
            assert!(report["error"].as_str().unwrap().contains("different models"), "{case}: {report}");
            assert!(report["error"].as_str().unwrap().contains(words[1]), "{case}: {report}");
        }
        let of_odd_one = ranks[1]["error"].as_str().unwrap();
        assert!(of_odd_one.contains(words[0]) || case == "mismatch_shape", "{case}: {of_odd_one}");
    }
}

#[test]
fn a_frozen_model_is_refused() {
    for report in run("nothing_to_train", 2) {
        assert!(report["error"].as_str().unwrap().contains("no trainable parameter"), "{report}");
    }
}

#[test]
fn a_loss_that_is_none_is_refused() {
    assert_eq!(run("bad_loss", 2), [json!("refused"), json!("refused")]);
}

#[test]
fn a_killed_peer_is_an_error_at_once() {
    let mut ranks = start("train_until_killed", 2, Duration::from_secs(30));
    ranks.wait_until_ready(1);
    ranks.kill(1);
    let report = ranks.finish(0);
    assert_eq!(report["peer_lost"], true, "{report}");
    assert!(report["seconds"].as_f64().unwrap() < 5.0, "{report}");
}

#[test]
fn a_killed_peer_among_four_is_an_error_on_every_survivor_within_the_timeout() {
    let mut ranks = start("train_until_killed", 4, Duration::from_secs(4));
    ranks.wait_until_ready(2);
    ranks.kill(2);
    for rank in [0, 1, 3] {
        let report = ranks.finish(rank);
        // Only its neighbours in the ring see it die; the others see a neighbour leave, or time out.
        assert!(report["peer_lost"] == true || report["timeout"] == true, "rank {rank}: {report}");
        assert!(report["seconds"].as_f64().unwrap() < 8.0, "rank {rank}: {report}");
    }
}

#[test]
fn a_hung_peer_is_an_error_at_the_timeout() {
    let mut ranks = start("train_until_hung", 2, Duration::from_secs(2));
    let report = ranks.finish(0);
    assert_eq!(report["timeout"], true, "{report}");
    let seconds = report["seconds"].as_f64().unwrap();
    assert!((1.5..6.0).contains(&seconds), "{report}");
}

#[test]
fn a_rank_of_an_earlier_generation_takes_no_part() {
    let (soon, late) = (Duration::from_secs(3), Duration::from_secs(30));
    let store = store(late);
    // It has come to the store, and said there where it is, well before the others.
    let mut earlier = start_on(&store, 1, "again", (1..2, 2), soon);
    let own = "muster_ddp/job.1/group_0/cpu/0/1";
    eventually("it has said where it is", || store.check(own).unwrap());
    let mut ranks = start_on(&store, 2, "again", (0..2, 2), late);
    assert_eq!(ranks.finish(0), ranks.finish(1));
    assert!(!earlier.end(1).success(), "it waits for its own peers, in vain");
}
