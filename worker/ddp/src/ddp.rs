//! Data-parallel training: one model replica per rank, gradients averaged during backward.
//!
//! The order of calls is that of PyTorch 2.11's `distributed.py`; whoever changes it here reads it there.

use crate::error::{During, Error, Operation};
use crate::group::ProcessGroup;
use crate::model::Model;
use crate::verify;
use c10d_sys::{Reducer, ReducerOptions};
use tch::{Device, Tensor, nn};

/// The bucket that is ready first is small, so that communication starts early (PyTorch's value).
const FIRST_BUCKET_BYTES: i64 = 1024 * 1024;
/// PyTorch's default `bucket_cap_mb`.
const BUCKET_CAP_MB_DEFAULT: f64 = 25.0;
/// The buffer that the initial model travels in (PyTorch's value).
const BROADCAST_BUFFER_BYTES: usize = 250 * 1024 * 1024;

/// How [`Ddp`] works. The defaults are PyTorch's.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are PyTorch's own independent switches")]
pub struct Options {
    /// The largest bucket in MiB; `None` is 25 with a first bucket of 1.
    pub bucket_cap_mb: Option<f64>,
    /// Search the graph for parameters that the loss does not depend on, in every step. Needed when some
    /// rank skips a part of the model; without it, such a step fails at the next forward pass.
    pub find_unused_parameters: bool,
    /// Promise that every step has the graph of the first one, unused parameters included.
    pub static_graph: bool,
    /// Let `.grad` be a view into the reduction buckets: saves a copy and the memory of all gradients.
    pub gradient_as_bucket_view: bool,
    /// Copy rank 0's buffers (running means and the like) to every rank before each forward pass.
    pub broadcast_buffers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bucket_cap_mb: None,
            find_unused_parameters: false,
            static_graph: false,
            gradient_as_bucket_view: false,
            broadcast_buffers: true,
        }
    }
}

/// Keeps the replicas of a model in step.
///
/// It borrows the group, so the compiler sees to it that the group goes last.
#[derive(Debug)]
pub struct Ddp<'group> {
    reducer: Reducer,
    group: &'group ProcessGroup,
    parameters: Vec<Tensor>,
    buffers: Vec<Tensor>,
    options: Options,
    /// PyTorch's `require_forward_param_sync`: buffers cannot have drifted while nothing was synchronised.
    buffers_stale: bool,
    /// A static graph's first backward reduces nothing by itself.
    delayed_all_reduce_due: bool,
    broken: bool,
}

impl<'group> Ddp<'group> {
    /// Checks that all ranks hold the same model, copies rank 0's values to every rank, and hooks the
    /// reducer onto the trainable parameters of `vs`.
    ///
    /// A collective. Freeze or unfreeze layers before, not after. If shapes, names, kinds or the number
    /// of variables differ anywhere, every rank gets [`Error::ModelMismatch`].
    pub fn new(vs: &nn::VarStore, group: &'group ProcessGroup, options: Options) -> Result<Self, Error> {
        let Model { parameters, parameter_names, frozen, frozen_names, buffers, buffer_names } =
            Model::of(vs);
        let misplaced = parameters.iter().zip(&parameter_names).find(|(p, _)| p.device() != Device::Cpu);
        if let Some((parameter, name)) = misplaced {
            let device = format!("{:?}", parameter.device());
            return Err(Error::UnsupportedDevice { name: name.clone(), device });
        }

        let state: Vec<Tensor> =
            parameters.iter().chain(&frozen).chain(&buffers).map(Tensor::detach).collect();
        let names = [&parameter_names[..], &frozen_names, &buffer_names].concat();
        verify::same_model(group, &names, &state)?;
        // After the comparison: then all ranks agree that there is nothing, and none waits for another.
        if parameters.is_empty() {
            return Err(Error::NothingToTrain);
        }
        group.inner.verify_params(&parameters).during(Operation::VerifyModel)?;
        group
            .inner
            .broadcast_coalesced(&state, BROADCAST_BUFFER_BYTES, 0)
            .during(Operation::BroadcastModel)?;

        let bucket_cap_mb = options.bucket_cap_mb.unwrap_or(BUCKET_CAP_MB_DEFAULT);
        let reducer = Reducer::new(
            &group.inner,
            &parameters,
            &parameter_names,
            &ReducerOptions {
                bucket_cap_bytes: ((bucket_cap_mb * 1024.0 * 1024.0) as i64).max(1),
                first_bucket_bytes: FIRST_BUCKET_BYTES,
                bucket_cap_is_default: options.bucket_cap_mb.is_none(),
                find_unused_parameters: options.find_unused_parameters,
                gradient_as_bucket_view: options.gradient_as_bucket_view,
                static_graph: options.static_graph,
                broadcast_buffers: options.broadcast_buffers,
            },
        )
        .during(Operation::BuildReducer)?;
        let delayed_all_reduce_due = options.static_graph;
        Ok(Self {
            reducer,
            group,
            parameters,
            buffers,
            options,
            buffers_stale: true,
            delayed_all_reduce_due,
            broken: false,
        })
    }

    /// Runs the forward pass in `forward` and then backward from the loss it returns, while averaging the
    /// gradients over all ranks. Returns the loss of *this* rank.
    ///
    /// On return every parameter's gradient is the mean over ranks of their gradients, so a loss that is
    /// a mean over the batch gives the gradient of the whole batch (see [`crate::Batch::weight`] for
    /// batches of unequal size). Gradients add up until [`Ddp::zero_grad`].
    pub fn backward(&mut self, forward: impl FnOnce() -> Tensor) -> Result<Loss, Error> {
        self.run(true, forward)
    }

    /// As [`Ddp::backward`], without talking to anyone: the gradients stay this rank's own and are
    /// averaged by the next [`Ddp::backward`], together with its. For accumulation over micro-batches.
    pub fn no_sync(&mut self, forward: impl FnOnce() -> Tensor) -> Result<Loss, Error> {
        self.run(false, forward)
    }

    /// Drops all gradients: `zero_grad(set_to_none=True)`.
    ///
    /// Not tch's `Optimizer::zero_grad`, which panics when gradients are views into buckets.
    pub fn zero_grad(&mut self) -> Result<(), Error> {
        c10d_sys::clear_grads(&self.parameters).during(Operation::ZeroGrad)
    }

    /// Copies rank 0's buffers to every rank, as each forward pass does by itself with
    /// [`Options::broadcast_buffers`]. To be called before evaluating on all ranks, which would otherwise
    /// test as many slightly different models. A collective.
    pub fn sync_buffers(&mut self) -> Result<(), Error> {
        if self.buffers.is_empty() {
            return Ok(());
        }
        self.group
            .inner
            .broadcast_coalesced(&self.buffers, BROADCAST_BUFFER_BYTES, 0)
            .during(Operation::Broadcast)
    }

    /// The group.
    pub fn group(&self) -> &'group ProcessGroup {
        self.group
    }

    /// The size of each bucket in bytes, in the order of reduction. It settles after the first step.
    pub fn bucket_sizes_bytes(&self) -> Result<Vec<i64>, Error> {
        self.reducer.bucket_sizes_bytes().during(Operation::BuildReducer)
    }

    fn run(&mut self, synchronise: bool, forward: impl FnOnce() -> Tensor) -> Result<Loss, Error> {
        if self.broken {
            return Err(Error::Broken);
        }
        // Set until the end: an early return or a panic in `forward` leaves the reducer half-way.
        self.broken = true;
        self.before_forward(synchronise).during(Operation::PrepareForward)?;
        let loss = forward();
        if loss.numel() != 1 || !loss.requires_grad() {
            let grad = if loss.requires_grad() { "" } else { " that requires no gradient" };
            return Err(Error::BadLoss { found: format!("a tensor of shape {:?}{grad}", loss.size()) });
        }
        if synchronise {
            let searched = self.options.find_unused_parameters && !self.options.static_graph;
            let outputs = if searched { vec![loss.shallow_clone()] } else { Vec::new() };
            self.reducer.prepare_for_backward(&outputs).during(Operation::PrepareBackward)?;
        }
        self.buffers_stale = synchronise;
        c10d_sys::backward(&loss).during(Operation::Backward)?;
        if synchronise && self.delayed_all_reduce_due {
            self.reducer.delay_all_reduce().during(Operation::Backward)?;
            self.delayed_all_reduce_due = false;
        }
        self.broken = false;
        Ok(Loss(loss.detach()))
    }

    fn before_forward(&self, synchronise: bool) -> Result<(), c10d_sys::Failure> {
        if synchronise {
            self.reducer.prepare_for_forward()?;
        }
        self.reducer.rebuild_buckets()?;
        if self.options.broadcast_buffers && self.buffers_stale && !self.buffers.is_empty() {
            self.group.inner.broadcast_coalesced(&self.buffers, BROADCAST_BUFFER_BYTES, 0)?;
        }
        Ok(())
    }
}

/// What this rank's forward pass came to; free to be ignored.
#[derive(Debug)]
pub struct Loss(Tensor);

impl Loss {
    /// The number. On an accelerator this would wait for it, so not in every step without a reason.
    pub fn value(&self) -> f64 {
        self.0.double_value(&[])
    }

    /// The tensor, detached from the graph.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}
