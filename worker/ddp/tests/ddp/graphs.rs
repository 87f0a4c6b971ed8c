//! Models that are more than a chain of layers: buffers, parts unused on some rank, a static graph.

use crate::harness::run;
use crate::models::{Branches, bits, bits_of, branches, loss_t, normalised, samples};
use muster_ddp::{Ddp, Error, Options, ProcessGroup, ReduceOp};
use serde_json::{Value, json};
use tch::nn::{self, Module as _, OptimizerConfig as _};
use tch::{Device, Kind, Tensor};

pub fn buffers(group: &ProcessGroup) -> Result<Value, Error> {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = normalised(&vs);
    let mut ddp = Ddp::new(&vs, group, Options::default())?;
    let mut optimizer = nn::Sgd::default().build(&vs, 0.1).unwrap();
    let (x, _) = samples(16);
    let mine = x * (1.0 + group.rank() as f64);
    let running_mean = || bits_of(&vs.variables()["norm.running_mean"]);
    let (mut seen, mut left) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        ddp.zero_grad()?;
        ddp.backward(|| {
            seen.push(running_mean());
            loss_t(&net, &mine)
        })?;
        left.push(running_mean());
        optimizer.step();
    }
    ddp.sync_buffers()?;
    Ok(json!({ "seen": seen, "left": left, "bits": bits(&vs) }))
}

fn branch(net: &Branches, number: usize, x: &Tensor) -> Tensor {
    if number == 0 { net.even.forward(x) } else { net.odd.forward(x) }.square().mean(Kind::Float)
}

pub fn unused(group: &ProcessGroup) -> Result<Value, Error> {
    tch::manual_seed(3);
    let vs = nn::VarStore::new(Device::Cpu);
    let net = branches(&vs);
    let options = Options { find_unused_parameters: true, ..Options::default() };
    let mut ddp = Ddp::new(&vs, group, options)?;
    let (x, _) = samples(8);
    let mut worst: f64 = 0.0;
    for step in 0..4 {
        ddp.zero_grad()?;
        // Each rank takes the other branch than its neighbour, and another one in every step.
        ddp.backward(|| branch(&net, (group.rank() + step) % 2, &x))?;
        for (number, layer) in [(0, &net.even), (1, &net.odd)] {
            let reduced = layer.ws.grad().copy();
            let users = (0..group.world_size()).filter(|rank| (rank + step) % 2 == number).count();
            let alone = Tensor::run_backward(&[branch(&net, number, &x)], &[&layer.ws], false, false);
            let expected = &alone[0] * (users as f64 / group.world_size() as f64);
            worst = worst.max((reduced - expected).abs().max().double_value(&[]));
        }
    }
    Ok(json!({ "worst": worst, "never_defined": net.never.ws.grad().defined() }))
}

pub fn unused_unannounced(group: &ProcessGroup) -> Result<Value, Error> {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = branches(&vs);
    let mut ddp = Ddp::new(&vs, group, Options::default())?;
    let (x, _) = samples(8);
    ddp.backward(|| branch(&net, 0, &x))?;
    ddp.backward(|| branch(&net, 0, &x))?;
    Ok(json!("the second step should have failed"))
}

pub fn static_graph(group: &ProcessGroup) -> Result<Value, Error> {
    tch::manual_seed(4);
    let vs = nn::VarStore::new(Device::Cpu);
    let net = branches(&vs);
    let options = Options { static_graph: true, bucket_cap_mb: Some(0.0001), ..Options::default() };
    let mut ddp = Ddp::new(&vs, group, options)?;
    let mut optimizer = nn::Sgd::default().build(&vs, 0.05).unwrap();
    let (x, _) = samples(8 * group.world_size() as i64);
    let mine = x.narrow(0, 8 * group.rank() as i64, 8);
    let both = |x: &Tensor| branch(&net, 0, x) + branch(&net, 1, x);
    let mut worst: f64 = 0.0;
    for _ in 0..5 {
        ddp.zero_grad()?;
        ddp.backward(|| both(&mine))?;
        for layer in [&net.even, &net.odd] {
            let reduced = layer.ws.grad().copy();
            let alone = Tensor::run_backward(&[both(&x)], &[&layer.ws], false, false);
            worst = worst.max((reduced - &alone[0]).abs().max().double_value(&[]));
        }
        optimizer.step();
    }
    let [highest] = group.all_reduce_values([worst], ReduceOp::Max)?;
    Ok(json!({ "worst": highest, "bits": bits(&vs) }))
}

#[test]
fn every_forward_pass_sees_the_buffers_of_rank_0() {
    let ranks = run("buffers", 2);
    assert_eq!(ranks[0]["seen"], ranks[1]["seen"]);
    assert_ne!(ranks[0]["left"], ranks[1]["left"], "the ranks' own statistics do differ");
    assert_eq!(ranks[0]["bits"], ranks[1]["bits"], "sync_buffers makes the models equal");
    assert_eq!(ranks[0]["left"][0], ranks[1]["seen"][1]);
}

#[test]
fn parameters_unused_on_some_ranks_are_averaged_over_all() {
    for report in run("unused", 4) {
        assert!(report["worst"].as_f64().unwrap_or(1.0) < 1e-5, "{report}");
        assert_eq!(report["never_defined"], false);
    }
}

#[test]
fn unused_parameters_that_nobody_announced_are_an_error_that_says_so() {
    for report in run("unused_unannounced", 2) {
        let source = report["source"].as_str().unwrap_or_else(|| panic!("{report}"));
        assert!(source.contains("find_unused_parameters"), "{source}");
        assert_eq!((&report["timeout"], &report["peer_lost"]), (&json!(false), &json!(false)), "{report}");
    }
}

#[test]
fn static_graph_reduces_from_the_first_step_with_unused_parameters() {
    let ranks = run("static_graph", 2);
    assert_eq!(ranks[0]["bits"], ranks[1]["bits"]);
    for report in ranks {
        assert!(report["worst"].as_f64().unwrap_or(1.0) < 1e-5, "{report}");
    }
}
