//! A whole distributed training program. Run it alone, or `muster submit --nproc-per-node 2 -- …`.

use muster_ddp::{Ddp, DistributedSampler, Options, ProcessGroup, Telemetry};
use tch::nn::{self, Module as _, OptimizerConfig as _};
use tch::{Device, Kind, Reduction, Tensor};

/// Learns to add up ten numbers.
pub fn main() -> Result<(), Box<dyn std::error::Error>> {
    let group = ProcessGroup::from_env()?;
    let telemetry = Telemetry::from_env();
    tch::manual_seed(1);
    let x = Tensor::randn([1000, 10], (Kind::Float, Device::Cpu));
    let y = x.sum_dim_intlist(-1, true, Kind::Float);

    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 10, 1, nn::LinearConfig::default());
    let mut optimizer = nn::Sgd::default().build(&vs, 0.1)?;
    let mut ddp = Ddp::new(&vs, &group, Options::default())?;
    let sampler = DistributedSampler::new(1000, group.share(), 1)?;
    for (step, batch) in (0..5).flat_map(|epoch| sampler.batches(epoch, 32)).enumerate() {
        let rows = Tensor::from_slice(&batch.indices);
        let (x, y) = (x.index_select(0, &rows), y.index_select(0, &rows));
        ddp.zero_grad()?;
        let loss = ddp.backward(|| net.forward(&x).mse_loss(&y, Reduction::Mean) * batch.weight)?;
        optimizer.step();
        telemetry.record(step as u64 + 1, &[("loss", loss.value())]);
    }
    Ok(())
}
