//! `muster-trainer vision`: a small convolutional network on images of clothes.
//!
//! Owns the loop. Which samples a rank gets, how gradients are averaged and where metrics go is
//! muster-ddp's; nothing here knows about sockets.

mod net;
mod resume;
mod sgd;
mod stop;

use crate::data::{self, DataSet};
use anyhow::Context as _;
use clap::Args;
use muster_ddp::{Ddp, DistributedSampler, Loss, Options, ProcessGroup, ReduceOp, Telemetry};
use net::Net;
use resume::Position;
use sgd::Sgd;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use stop::Stop;
use tch::nn;
use tch::{Device, Kind};

/// Steps between two reports: often enough for a smooth curve, and the one extra all-reduce is not felt.
const REPORT_STEPS: u64 = 10;
/// Test images per forward pass.
const EVAL_BATCH: usize = 500;

/// The flags of `muster-trainer vision`.
#[derive(Debug, Args)]
pub struct Flags {
    /// Directory with train-images-idx3-ubyte.gz and its three companions [default: $MUSTER_DATA, else
    /// .deps/data of a parent directory, else Debian's dataset-fashion-mnist].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Passes over the training images.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    epochs: u64,
    /// Images of one step over all ranks together, so that the result hardly depends on their number.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    global_batch_size: u64,
    /// Peak of the learning rate, which warms up and then falls to zero along a cosine.
    #[arg(long, default_value_t = 0.06)]
    learning_rate: f64,
    /// Decides the initial weights and the order of images: same seed, same ranks, same result.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Train on the first N images only, for a short demonstration.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Directory for checkpoints, best one that every node sees. A start that finds one there goes on from it. Without
    /// it none are written. With it, SIGTERM is answered with one.
    #[arg(long, env = "MUSTER_CHECKPOINT_DIR", value_name = "DIR")]
    checkpoint_dir: Option<PathBuf>,
    /// Steps between two checkpoints; the end of each pass is one more.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_steps: u64,
    /// Fail (exit code 1) if the last test accuracy is below this fraction.
    #[arg(long, value_name = "FRACTION")]
    target_accuracy: Option<f64>,
}

/// Trains. `cuda_loaded` says whether a GPU could be used at all.
pub fn train(flags: &Flags, cuda_loaded: bool) -> anyhow::Result<()> {
    // Found and read before the ranks meet: a missing file is then an error at once, everywhere.
    let dir = data::find(flags.data.as_deref())?;
    let data = DataSet::read(&dir, flags.limit.map(|n| n as usize))?;
    let group = ProcessGroup::from_env().context("failed to join the other ranks")?;
    let telemetry = Telemetry::from_env();
    if group.is_first() {
        if cuda_loaded && tch::Cuda::is_available() {
            println!("a GPU is present and stays unused: gradients are reduced over Gloo, on the CPU");
        }
        println!(
            "training on {} images of {}, testing on {}; {} ranks, {} threads each",
            data.train.len(),
            dir.display(),
            data.test.len(),
            group.world_size(),
            tch::get_num_threads(),
        );
    }

    tch::manual_seed(flags.seed as i64);
    let vs = nn::VarStore::new(Device::Cpu);
    let net = Net::new(&vs.root(), data.train.size(), data.classes);
    let mut sgd = Sgd::new(&vs);
    let (saver, position) = resume::prepare(flags.checkpoint_dir.as_deref(), &group, &vs, &mut sgd)?;
    let mut ddp = Ddp::new(&vs, &group, Options::default()).context("failed to set up training")?;

    let sampler = DistributedSampler::new(data.train.len(), group.share(), flags.seed)?;
    let batch_size = (flags.global_batch_size as usize).div_ceil(group.world_size());
    let steps_per_epoch = sampler.steps(batch_size) as u64;
    let steps_total = steps_per_epoch * flags.epochs;
    let resumed = resume::share(position, steps_per_epoch, &group, &mut sgd)?;
    let stop = if flags.checkpoint_dir.is_some() { Stop::listen()? } else { Stop::default() };
    let started = now();
    let mut report = Report {
        stop,
        group: &group,
        telemetry: &telemetry,
        steps_total,
        loss: 0.0,
        images: 0.0,
        steps: 0,
        since: started,
    };
    let mut step = resumed.total().min(steps_total);
    let first_step = step + 1;
    let mut accuracy = 0.0;
    // One that was trained to the end is evaluated once more.
    for epoch in (resumed.epochs + 1).min(flags.epochs)..=flags.epochs {
        let done = step - (epoch - 1) * steps_per_epoch;
        for batch in sampler.batches(epoch, batch_size).skip(done as usize) {
            let learning_rate = flags.learning_rate * schedule(step, steps_total);
            let (images, labels) = data.train.batch(&batch.indices);
            ddp.zero_grad()?;
            let loss = ddp
                .backward(|| net.forward(&images, true).cross_entropy_for_logits(&labels) * batch.weight)
                .with_context(|| format!("failed in step {}", step + 1))?;
            sgd.step(learning_rate);
            step += 1;
            report.add(&loss, batch.indices.len());
            // The first one tells when training really began.
            let is_reported = step == first_step || step % REPORT_STEPS == 0 || step == steps_total;
            let is_last = is_reported && report.send(step, epoch, learning_rate)? && step < steps_total;
            let steps = step - (epoch - 1) * steps_per_epoch;
            let is_due = step % flags.checkpoint_steps == 0 || steps == steps_per_epoch || is_last;
            if let Some(saver) = saver.as_ref().filter(|_| is_due) {
                saver.save(Position { epochs: epoch - 1, steps, steps_per_epoch }, &vs, &sgd)?;
            }
            if is_last {
                eprintln!("asked to end, after step {step}");
                stop::end();
            }
        }
        let training_paused = now();
        ddp.sync_buffers()?;
        accuracy = evaluate(&net, &data, &group)?;
        telemetry.record(step, &[("accuracy", accuracy), ("epoch", epoch as f64)]);
        if group.is_first() {
            let seconds = started.elapsed().as_secs_f64();
            println!("epoch {epoch}/{} accuracy {accuracy:.4} after {seconds:.1} s", flags.epochs);
        }
        // Evaluation is not training: it must not count as slow steps.
        report.since += training_paused.elapsed();
    }
    match flags.target_accuracy {
        Some(target) if accuracy < target => {
            anyhow::bail!("failed to reach the target accuracy: {accuracy:.4} is below {target}")
        }
        _ => Ok(()),
    }
}

/// What is gathered between two reports.
struct Report<'a> {
    group: &'a ProcessGroup,
    telemetry: &'a Telemetry,
    steps_total: u64,
    /// The sum of this rank's weighted losses.
    loss: f64,
    images: f64,
    steps: u64,
    since: Instant,
    stop: Stop,
}

impl Report<'_> {
    fn add(&mut self, loss: &Loss, images: usize) {
        self.loss += loss.value();
        self.images += images as f64;
        self.steps += 1;
    }

    /// A collective: every rank sends, and every rank knows the global numbers.
    /// Gives whether one of them was asked to end.
    fn send(&mut self, step: u64, epoch: u64, learning_rate: f64) -> anyhow::Result<bool> {
        let asked = f64::from(u8::from(self.stop.is_asked()));
        let [loss, images, asked] =
            self.group.all_reduce_values([self.loss, self.images, asked], ReduceOp::Sum)?;
        let loss = loss / (self.steps * self.group.world_size() as u64) as f64;
        let elapsed = self.since.elapsed().max(Duration::from_micros(1));
        let images_per_second = images / elapsed.as_secs_f64();
        self.telemetry.record(
            step,
            &[
                ("loss", loss),
                ("images_per_second", images_per_second),
                ("epoch", epoch as f64),
                ("steps_total", self.steps_total as f64),
                ("learning_rate", learning_rate),
            ],
        );
        if self.group.is_first() {
            println!(
                "step {step}/{} epoch {epoch} loss {loss:.4} {images_per_second:.0} images/s",
                self.steps_total
            );
        }
        (self.loss, self.images, self.steps, self.since) = (0.0, 0.0, 0, now());
        Ok(asked > 0.0)
    }
}

/// The fraction of test images named rightly. A collective: each rank tests its share.
fn evaluate(net: &Net, data: &DataSet, group: &ProcessGroup) -> anyhow::Result<f64> {
    let share = group.share();
    // By hand rather than by a sampler: a test set smaller than the number of ranks is no reason to fail.
    let mine: Vec<i64> = (share.rank..data.test.len()).step_by(share.world_size).map(|i| i as i64).collect();
    let correct: f64 = tch::no_grad(|| {
        mine.chunks(EVAL_BATCH)
            .map(|indices| {
                let (images, labels) = data.test.batch(indices);
                let named = net.forward(&images, false).argmax(-1, false).eq_tensor(&labels);
                named.sum(Kind::Int64).int64_value(&[]) as f64
            })
            .sum()
    });
    let [correct, count] = group.all_reduce_values([correct, mine.len() as f64], ReduceOp::Sum)?;
    Ok(correct / count)
}

/// The learning rate of a step as a fraction of its peak: a tenth of the steps up, then a cosine down.
fn schedule(step: u64, steps_total: u64) -> f64 {
    let (step, total) = (step as f64, steps_total as f64);
    let warm_up = (total / 10.0).clamp(1.0, 200.0);
    if step < warm_up {
        return (step + 1.0) / (warm_up + 1.0);
    }
    let progress = (step - warm_up) / (total - warm_up).max(1.0);
    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

#[expect(clippy::disallowed_methods, reason = "a training program is its own driver; it measures itself")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::schedule;

    #[test]
    fn learning_rate_rises_to_its_peak_and_falls_to_nothing() {
        for total in [1, 2, 10, 100, 5000] {
            let rates: Vec<f64> = (0..total).map(|step| schedule(step, total)).collect();
            assert!(rates.iter().all(|rate| *rate > 0.0 && *rate <= 1.0), "{total}: {rates:?}");
        }
        assert!(schedule(0, 1000) < 0.05);
        assert!(schedule(100, 1000) > 0.99);
        assert!(schedule(999, 1000) < 0.001);
    }
}
