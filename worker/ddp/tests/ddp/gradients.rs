//! The point of it all: many ranks train as one process with the whole batch would.

use crate::harness::run;
use crate::models::{bits, gradient_difference, loss, mlp, samples};
use muster_ddp::{Ddp, DistributedSampler, Error, Options, ProcessGroup};
use serde_json::{Value, json};
use tch::nn::{self, OptimizerConfig as _};
use tch::{Device, Tensor};

const STEPS: u64 = 6;
/// Single precision leaves a few 1e-7; a wrong average would be off by a factor.
const DIFFERENCE_MAX: f64 = 1e-5;

/// A replica whose initial values differ on every rank, which only the broadcast makes equal.
fn replica(rank: usize) -> (nn::VarStore, nn::Sequential) {
    tch::manual_seed(1000 + rank as i64);
    let vs = nn::VarStore::new(Device::Cpu);
    let net = mlp(&vs);
    (vs, net)
}

pub fn gradients(group: &ProcessGroup) -> Result<Value, Error> {
    let mut outcomes = Vec::new();
    for gradient_as_bucket_view in [false, true] {
        for bucket_cap_mb in [None, Some(0.001)] {
            let options = Options { gradient_as_bucket_view, bucket_cap_mb, ..Options::default() };
            outcomes.push(train(group, options)?);
        }
    }
    Ok(json!(outcomes))
}

fn train(group: &ProcessGroup, options: Options) -> Result<Value, Error> {
    let (vs, net) = replica(group.rank());
    let mut ddp = Ddp::new(&vs, group, options)?;
    let mut optimizer = nn::Sgd { momentum: 0.9, ..nn::Sgd::default() }.build(&vs, 0.1).unwrap();
    // 45 samples over 2 or 4 ranks: batches of unequal size, which the weight has to make up for.
    let (x, y) = samples(45);
    let sampler = DistributedSampler::new(45, group.share(), 5)?;
    let (mut worst, mut losses) = (0.0, Vec::new());
    for epoch in 0..STEPS {
        let (mut alone, net_alone) = replica(0);
        alone.copy(&vs).unwrap();
        let loss_alone = loss(&net_alone, &x, &y);
        loss_alone.backward();

        ddp.zero_grad()?;
        let mine = sampler.batches(epoch, 45).next().unwrap();
        let rows = Tensor::from_slice(&mine.indices);
        let (x, y) = (x.index_select(0, &rows), y.index_select(0, &rows));
        let loss = ddp.backward(|| loss(&net, &x, &y) * mine.weight)?;
        worst = gradient_difference(&vs, &alone).max(worst);
        let [mean] = group.all_reduce_values([loss.value()], muster_ddp::ReduceOp::Average)?;
        worst = (mean - loss_alone.double_value(&[])).abs().max(worst);
        losses.push(mean);
        optimizer.step();
    }
    let buckets = ddp.bucket_sizes_bytes()?.len();
    Ok(json!({ "worst": worst, "bits": bits(&vs), "losses": losses, "buckets": buckets }))
}

pub fn no_sync(group: &ProcessGroup) -> Result<Value, Error> {
    let (vs, net) = replica(group.rank());
    let mut ddp = Ddp::new(&vs, group, Options::default())?;
    let (rank, world_size) = (group.rank() as i64, group.world_size() as i64);
    let (x, y) = samples(24 * world_size);
    let mut worst = 0.0;
    let mut apart = 0.0;
    for _ in 0..3 {
        ddp.zero_grad()?;
        for micro_batch in 0..3 {
            let (start, len) = (rank * 24 + micro_batch * 8, 8);
            let (x, y) = (x.narrow(0, start, len), y.narrow(0, start, len));
            let forward = || loss(&net, &x, &y) / 3.0;
            if micro_batch < 2 {
                ddp.no_sync(forward)?;
                let mine = vs.trainable_variables()[0].grad().abs().sum(tch::Kind::Double).double_value(&[]);
                let [mean] = group.all_reduce_values([mine], muster_ddp::ReduceOp::Average)?;
                apart = (mine - mean).abs().max(apart);
            } else {
                ddp.backward(forward)?;
            }
        }
        let (mut alone, net_alone) = replica(0);
        alone.copy(&vs).unwrap();
        loss(&net_alone, &x, &y).backward();
        worst = gradient_difference(&vs, &alone).max(worst);
    }
    Ok(json!({ "worst": worst, "apart": apart }))
}

#[test]
fn gradients_are_those_of_one_process_with_the_whole_batch() {
    for world_size in [2, 4] {
        let ranks = run("gradients", world_size);
        let first = ranks[0].as_array().unwrap_or_else(|| panic!("{}", ranks[0]));
        for (rank, outcomes) in ranks.iter().enumerate() {
            for (i, outcome) in outcomes.as_array().unwrap_or_else(|| panic!("{outcomes}")).iter().enumerate()
            {
                let worst = outcome["worst"].as_f64().unwrap();
                assert!(worst < DIFFERENCE_MAX, "rank {rank}, options {i}: {worst}");
                assert_eq!(outcome["bits"], first[i]["bits"], "rank {rank}, options {i}");
                let losses = outcome["losses"].as_array().unwrap();
                assert!(losses[losses.len() - 1].as_f64() < losses[0].as_f64(), "{losses:?}");
            }
        }
        let buckets: Vec<u64> = first.iter().map(|outcome| outcome["buckets"].as_u64().unwrap()).collect();
        assert_eq!((buckets[0], buckets[2]), (1, 1), "{buckets:?}");
        assert!(
            buckets[1] > 1 && buckets[3] > 1,
            "small buckets are what lets reduction overlap: {buckets:?}"
        );
    }
}

#[test]
fn no_sync_adds_up_locally_and_the_next_step_averages_the_sum() {
    for (rank, report) in run("no_sync", 2).iter().enumerate() {
        assert!(report["worst"].as_f64().unwrap() < DIFFERENCE_MAX, "rank {rank}: {report}");
        assert!(report["apart"].as_f64().unwrap() > 1e-4, "rank {rank} talked during no_sync: {report}");
    }
}
