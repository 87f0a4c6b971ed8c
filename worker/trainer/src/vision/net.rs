//! The network: two convolutions and two linear layers, for grey images of any size.

use tch::nn::{self, Module as _, ModuleT as _};
use tch::{Kind, Tensor};

/// Wide enough for nine out of ten on Fashion-MNIST, narrow enough for a minute on two CPU cores.
const CHANNELS: (i64, i64) = (16, 32);
const HIDDEN: i64 = 64;

/// Two 3x3 convolutions, each with batch normalisation and 2x2 pooling, then two linear layers.
#[derive(Debug)]
pub struct Net {
    conv1: nn::Conv2D,
    norm1: nn::BatchNorm,
    conv2: nn::Conv2D,
    norm2: nn::BatchNorm,
    hidden: nn::Linear,
    output: nn::Linear,
}

impl Net {
    /// A network for images of this height and width (at least 4) and this many classes.
    pub fn new(path: &nn::Path<'_>, (height, width): (i64, i64), classes: i64) -> Self {
        let same = nn::ConvConfig { padding: 1, bias: false, ..nn::ConvConfig::default() };
        let features = CHANNELS.1 * (height / 4) * (width / 4);
        Self {
            conv1: nn::conv2d(path / "conv1", 1, CHANNELS.0, 3, same),
            norm1: nn::batch_norm2d(path / "norm1", CHANNELS.0, nn::BatchNormConfig::default()),
            conv2: nn::conv2d(path / "conv2", CHANNELS.0, CHANNELS.1, 3, same),
            norm2: nn::batch_norm2d(path / "norm2", CHANNELS.1, nn::BatchNormConfig::default()),
            hidden: nn::linear(path / "hidden", features, HIDDEN, nn::LinearConfig::default()),
            output: nn::linear(path / "output", HIDDEN, classes, nn::LinearConfig::default()),
        }
    }

    /// `[n, 1, height, width]` to `[n, classes]` logits. `train` makes normalisation use the batch's own
    /// statistics and remember them.
    pub fn forward(&self, images: &Tensor, train: bool) -> Tensor {
        let x = self.norm1.forward_t(&self.conv1.forward(images), train).max_pool2d_default(2).relu();
        let x = self.norm2.forward_t(&self.conv2.forward(&x), train).max_pool2d_default(2).relu();
        let x = self.hidden.forward(&x.flat_view()).relu();
        self.output.forward(&x).to_kind(Kind::Float)
    }
}
