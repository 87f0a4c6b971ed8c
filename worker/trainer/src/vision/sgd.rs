//! Stochastic gradient descent with Nesterov's momentum, as torch has it. Its state can be saved, which tch's cannot.

use muster_ddp::checkpoint::{Checkpoint, Part};
use muster_ddp::{ProcessGroup, restore_tensor, tensor_part};
use tch::{Tensor, nn};

const MOMENTUM: f64 = 0.9;
const WEIGHT_DECAY: f64 = 1e-4;

/// The trained tensors, each with its momentum.
#[derive(Debug)]
pub struct Sgd(Vec<(Tensor, Tensor)>);

impl Sgd {
    /// For all that is trained in `vs`, at rest.
    pub fn new(vs: &nn::VarStore) -> Self {
        let trained = vs.trainable_variables().into_iter();
        Self(trained.map(|parameter| (parameter.shallow_clone(), parameter.detach().zeros_like())).collect())
    }

    /// Follows the gradients by one step.
    pub fn step(&mut self, learning_rate: f64) {
        tch::no_grad(|| {
            for (parameter, momentum) in &mut self.0 {
                let gradient = parameter.grad() + &*parameter * WEIGHT_DECAY;
                let _ = momentum.g_mul_scalar_(MOMENTUM);
                let _ = momentum.g_add_(&gradient);
                let _ = parameter.g_sub_(&((gradient + &*momentum * MOMENTUM) * learning_rate));
            }
        });
    }

    /// Its state, for a checkpoint.
    pub fn parts(&self) -> Vec<Part> {
        self.0.iter().enumerate().map(|(nth, (_, momentum))| tensor_part(&name(nth), momentum)).collect()
    }

    /// Takes its state up again.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), muster_ddp::Error> {
        let momenta = self.0.iter_mut().enumerate();
        momenta
            .into_iter()
            .try_for_each(|(nth, (_, momentum))| restore_tensor(momentum, checkpoint, &name(nth)))
    }

    /// Takes rank 0's state. A collective.
    pub fn broadcast(&mut self, group: &ProcessGroup) -> Result<(), muster_ddp::Error> {
        self.0.iter_mut().try_for_each(|(_, momentum)| group.broadcast(momentum, 0))
    }
}

/// Parameters come in the order in which the network makes them.
fn name(nth: usize) -> String {
    format!("momentum/{nth}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::OptimizerConfig as _;
    use tch::{Device, Kind};

    #[test]
    fn it_steps_as_torch_does() {
        let trained = |ours: bool| {
            let vs = nn::VarStore::new(Device::Cpu);
            let mut weight = vs.root().zeros("weight", &[3]);
            tch::no_grad(|| weight.copy_(&Tensor::from_slice(&[1.0f32, -2.0, 3.0])));
            let torch =
                nn::Sgd { momentum: MOMENTUM, wd: WEIGHT_DECAY, nesterov: true, ..nn::Sgd::default() };
            let (mut torch, mut sgd) = (torch.build(&vs, 0.1).unwrap(), Sgd::new(&vs));
            for _ in 0..5 {
                weight.zero_grad();
                (&weight * &weight).sum(Kind::Float).backward();
                if ours { sgd.step(0.1) } else { torch.step() }
            }
            weight.detach()
        };
        let difference = (trained(true) - trained(false)).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{difference}");
    }
}
