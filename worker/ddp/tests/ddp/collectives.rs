//! The process group by itself, and the smallest whole program.

use crate::harness::{child_command, eventually, run};
use muster_ddp::{Error, ProcessGroup, ReduceOp, Telemetry};
use serde_json::{Value, json};
use std::net::TcpListener;
use tch::{Device, Kind, Tensor};

pub fn collectives(group: &ProcessGroup) -> Result<Value, Error> {
    let rank = group.rank() as f64;
    let mut reduced = Vec::new();
    for op in [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max] {
        let [value] = group.all_reduce_values([rank + 1.0], op)?;
        reduced.push(value);
    }
    let mut tensor = Tensor::from_slice(&[group.rank() as i64; 3]);
    group.broadcast(&mut tensor, 1)?;
    let gathered: Vec<f64> = group
        .all_gather(&Tensor::full([2], rank, (Kind::Float, Device::Cpu)))?
        .iter()
        .map(|tensor| tensor.sum(Kind::Double).double_value(&[]))
        .collect();
    group.barrier()?;
    let mut strided = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).slice(1, 0, 4, 2);
    let _ = strided.fill_(1.0);
    group.all_reduce(&mut strided, ReduceOp::Sum)?;
    let strided = strided.sum(Kind::Double).double_value(&[]);
    Ok(
        json!({ "reduced": reduced, "broadcast": tensor.int64_value(&[2]), "gathered": gathered, "strided": strided }),
    )
}

/// A second group in the same process, over the same store: what a rebuild after a failure does.
pub fn again(group: &ProcessGroup) -> Result<Value, Error> {
    group.barrier()?;
    let second = ProcessGroup::from_env()?;
    let [sum] = second.all_reduce_values([1.0], ReduceOp::Sum)?;
    Ok(json!(sum))
}

#[test]
fn collectives_agree_on_every_rank() {
    for report in run("collectives", 4) {
        assert_eq!(report["reduced"], json!([10.0, 2.5, 1.0, 4.0]));
        assert_eq!(report["broadcast"], 1);
        assert_eq!(report["gathered"], json!([0.0, 2.0, 4.0, 6.0]));
        assert_eq!(report["strided"], 32.0, "a view with gaps, 4 rows of 2, is reduced like any other");
    }
}

#[test]
fn a_group_can_be_built_again_in_the_same_process() {
    assert_eq!(run("again", 2), [json!(2.0), json!(2.0)]);
}

#[test]
fn minimal_example_trains_on_two_ranks() {
    run("minimal", 2);
}

#[test]
fn rank_0_hosts_the_store_where_the_launcher_does_not() {
    // The port may be taken between here and rank 0, by anyone: then another one is tried.
    for attempt in 0.. {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut children: Vec<_> = (0..2)
            .map(|rank| {
                let mut command = child_command("minimal", rank, 2, port);
                command.env("MUSTER_TIMEOUT_SECONDS", "20").env_remove("TORCHELASTIC_USE_AGENT_STORE");
                command.spawn().unwrap()
            })
            .collect();
        // Each is waited for, whatever became of the one before it.
        let ends: Vec<bool> = children
            .iter_mut()
            .map(|child| {
                eventually("the rank ends", || child.try_wait().unwrap().is_some());
                child.wait().unwrap().success()
            })
            .collect();
        if ends == [true, true] {
            return;
        }
        assert!(attempt < 2, "failed on three ports");
    }
}

/// Not the peers' fault, so not [`Error::PeerLost`].
#[test]
fn an_interface_that_is_not_there_is_refused_by_its_name() {
    let store = c10d_sys::Store::in_process(std::time::Duration::from_secs(1)).unwrap();
    let device = c10d_sys::Device::Interface("nosuch0".to_owned());
    let failure = c10d_sys::Group::new(&store, 0, 1, &device, std::time::Duration::from_secs(1)).unwrap_err();
    assert_eq!(failure.kind, c10d_sys::FailureKind::Other);
    assert!(failure.message.contains("nosuch0"), "{failure}");
}

#[test]
fn a_group_of_one_needs_no_launcher_and_no_network() {
    let group = ProcessGroup::single().unwrap();
    assert_eq!((group.rank(), group.world_size(), group.is_first()), (0, 1, true));
    let same = group.all_reduce_values([2.0, 3.0], ReduceOp::Average).unwrap();
    assert_eq!(json!(same), json!([2.0, 3.0]));
    group.barrier().unwrap();
}

#[test]
fn telemetry_without_a_socket_is_nothing() {
    if std::env::var_os("MUSTER_TELEMETRY").is_none() {
        let telemetry = Telemetry::from_env();
        telemetry.record(1, &[("loss", 1.0)]);
        assert!(!telemetry.is_enabled());
        assert_eq!(telemetry.dropped(), 0);
    }
}
