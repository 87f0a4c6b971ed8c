//! The models and the comparisons that the cases share.

use tch::nn::{self, Module as _, ModuleT as _};
use tch::{Device, Kind, Tensor};

/// Three linear layers: enough parameters for several small buckets.
pub fn mlp(vs: &nn::VarStore) -> nn::Sequential {
    let (root, config) = (vs.root(), nn::LinearConfig::default());
    nn::seq()
        .add(nn::linear(&root / "a", 12, 33, config))
        .add_fn(Tensor::tanh)
        .add(nn::linear(&root / "b", 33, 21, config))
        .add_fn(Tensor::tanh)
        .add(nn::linear(&root / "c", 21, 3, config))
}

/// Two linear layers that are used or not, and one that never is.
pub struct Branches {
    pub even: nn::Linear,
    pub odd: nn::Linear,
    pub never: nn::Linear,
}

pub fn branches(vs: &nn::VarStore) -> Branches {
    let (root, config) = (vs.root(), nn::LinearConfig::default());
    Branches {
        even: nn::linear(&root / "even", 12, 3, config),
        odd: nn::linear(&root / "odd", 12, 3, config),
        never: nn::linear(&root / "never", 12, 3, config),
    }
}

/// A model with buffers: running mean and variance.
pub fn normalised(vs: &nn::VarStore) -> nn::SequentialT {
    let root = vs.root();
    nn::seq_t().add(nn::linear(&root / "a", 12, 8, nn::LinearConfig::default())).add(nn::batch_norm1d(
        &root / "norm",
        8,
        nn::BatchNormConfig::default(),
    ))
}

/// Samples and targets, the same in every process.
pub fn samples(count: i64) -> (Tensor, Tensor) {
    tch::manual_seed(99);
    let float = (Kind::Float, Device::Cpu);
    (Tensor::randn([count, 12], float), Tensor::randn([count, 3], float))
}

pub fn loss(net: &nn::Sequential, x: &Tensor, y: &Tensor) -> Tensor {
    net.forward(x).mse_loss(y, tch::Reduction::Mean)
}

pub fn loss_t(net: &nn::SequentialT, x: &Tensor) -> Tensor {
    net.forward_t(x, true).square().mean(Kind::Float)
}

/// The largest difference between the gradients of two models of the same making.
pub fn gradient_difference(a: &nn::VarStore, b: &nn::VarStore) -> f64 {
    let pairs = a.trainable_variables().into_iter().zip(b.trainable_variables());
    pairs.map(|(a, b)| (a.grad() - b.grad()).abs().max().double_value(&[])).fold(0.0, f64::max)
}

/// All values of a model, bit by bit.
pub fn bits(vs: &nn::VarStore) -> Vec<u32> {
    let mut variables: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    variables.iter().flat_map(|(_, tensor)| bits_of(tensor)).collect()
}

/// All values of a tensor, bit by bit.
pub fn bits_of(tensor: &Tensor) -> Vec<u32> {
    let flat = tensor.detach().contiguous().view(-1).to_kind(Kind::Float);
    let mut values = vec![0f32; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values.into_iter().map(f32::to_bits).collect()
}
