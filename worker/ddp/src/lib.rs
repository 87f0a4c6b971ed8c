//! DistributedDataParallel for [`tch`], on libtorch's own c10d.
//!
//! The gradients of every rank are averaged while backward still runs, by the very `Reducer` that
//! PyTorch's `DistributedDataParallel` drives; only Python is absent. A training program is an ordinary
//! tch program plus three lines:
//!
//! ```no_run
//! # use muster_ddp::{Ddp, Options, ProcessGroup};
//! # use tch::{Device, Kind, Tensor, nn, nn::{Module, OptimizerConfig}};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let group = ProcessGroup::from_env()?;
//! let vs = nn::VarStore::new(Device::Cpu);
//! let net = nn::linear(vs.root(), 8, 1, Default::default());
//! let mut optimizer = nn::Sgd::default().build(&vs, 0.1)?;
//! let mut ddp = Ddp::new(&vs, &group, Options::default())?;
//! # let (x, y) = (Tensor::rand([4, 8], (Kind::Float, Device::Cpu)), Tensor::zeros([4, 1], (Kind::Float, Device::Cpu)));
//! ddp.zero_grad()?;
//! let loss = ddp.backward(|| net.forward(&x).mse_loss(&y, tch::Reduction::Mean))?;
//! optimizer.step();
//! # Ok(()) }
//! ```
//!
//! What this crate owns: the process group, the reducer and when it is called, the sampler that shares a
//! data set out, checkpoints ([`checkpoint`]), and the client of Muster's telemetry socket. What it never does: own the model, the
//! optimizer or the loop; panic on what a peer does; wait longer than the timeout.
//!
//! # Failures
//!
//! A dead peer is an [`Error`] in a fraction of a second, a hung one at the timeout; see
//! [`Error::is_peer_lost`] and [`Error::is_timeout`]. After either, drop the [`Ddp`], then the
//! [`ProcessGroup`], and rebuild both, or exit and let the launcher restart the gang. [`record`] around `main` tells the launcher
//! why.

mod ddp;
mod env;
mod error;
mod group;
mod listener;
mod memory;
mod model;
mod record;
mod sampler;
mod state;
mod telemetry;
mod verify;

pub use c10d_sys::{Failure, FailureKind, ReduceOp};
pub use ddp::{Ddp, Loss, Options};
pub use error::{Error, Operation};
pub use group::ProcessGroup;
pub use muster_checkpoint as checkpoint;
pub use record::record;
pub use sampler::{Batch, DistributedSampler, Share};
pub use state::{model_parts, restore_model, restore_tensor, tensor_part};
pub use telemetry::Telemetry;

/// Loads libtorch's CUDA half if it is installed; an error means CPU, and says why.
///
/// Call it first thing in `main`, before any other use of torch: operators register when it loads.
pub fn load_cuda() -> Result<(), Failure> {
    // Without a driver the library cannot be of use, and mapping its 456 MB costs every rank of a machine
    // without GPUs 20 ms. The first device is a Linux driver's, the second that of Windows' subsystem.
    if !["/dev/nvidiactl", "/dev/dxg"].iter().any(|device| std::path::Path::new(device).exists()) {
        let message = "there is no NVIDIA driver on this machine".to_owned();
        return Err(Failure { kind: FailureKind::Other, message });
    }
    c10d_sys::load_cuda()
}
