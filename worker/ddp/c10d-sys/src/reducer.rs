//! The reducer: DDP's engine, hooked into autograd.

use crate::failure::{Failure, c_string, call};
use crate::ffi::{self, RawReducer, RawReducerOptions};
use crate::group::{Group, raw_tensor, raw_tensors};
use std::ptr;
use tch::Tensor;

/// What c10d's reducer can be told.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are PyTorch's own independent switches")]
pub struct ReducerOptions {
    /// The largest bucket.
    pub bucket_cap_bytes: i64,
    /// The bucket that becomes ready first, kept small so that communication starts early.
    pub first_bucket_bytes: i64,
    /// Whether `bucket_cap_bytes` is PyTorch's default, which brings `first_bucket_bytes` into play.
    pub bucket_cap_is_default: bool,
    /// Look for parameters that the loss does not depend on, in every step.
    pub find_unused_parameters: bool,
    /// Gradients are views into the buckets instead of copies.
    pub gradient_as_bucket_view: bool,
    /// The graph of the first step is that of every step.
    pub static_graph: bool,
    /// Only recorded for libtorch's own logging.
    pub broadcast_buffers: bool,
}

/// A `c10d::Reducer` and its logger. Its hooks sit on the parameters until it is dropped.
#[derive(Debug)]
pub struct Reducer {
    raw: *mut RawReducer,
}

impl Reducer {
    /// Hooks a reducer onto `params`, a list in the same order on every rank; `names` has one for each.
    pub fn new(
        group: &Group,
        params: &[Tensor],
        names: &[String],
        options: &ReducerOptions,
    ) -> Result<Self, Failure> {
        if names.len() != params.len() {
            return Err(Failure::other(format!("{} names for {} parameters", names.len(), params.len())));
        }
        let params = raw_tensors(params);
        let names = names.iter().map(|name| c_string(name)).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
        let options = RawReducerOptions {
            bucket_cap_bytes: options.bucket_cap_bytes,
            first_bucket_bytes: options.first_bucket_bytes,
            bucket_cap_is_default: options.bucket_cap_is_default.into(),
            find_unused_parameters: options.find_unused_parameters.into(),
            gradient_as_bucket_view: options.gradient_as_bucket_view.into(),
            static_graph: options.static_graph.into(),
            broadcast_buffers: options.broadcast_buffers.into(),
        };
        let mut raw = ptr::null_mut();
        // SAFETY: both arrays hold `params.len()` live pointers; the shim copies all it keeps.
        call(|message| unsafe {
            ffi::muster_c10d_reducer_new(
                group.raw(),
                params.as_ptr(),
                names.as_ptr(),
                params.len(),
                &raw const options,
                &raw mut raw,
                message,
            )
        })?;
        Ok(Self { raw })
    }

    /// Before a forward pass whose backward is to be reduced.
    pub fn prepare_for_forward(&self) -> Result<(), Failure> {
        // SAFETY: the reducer is live.
        call(|message| unsafe { ffi::muster_c10d_reducer_prepare_for_forward(self.raw, message) })
    }

    /// Sorts the buckets by the order in which the first backward pass produced gradients; once.
    pub fn rebuild_buckets(&self) -> Result<bool, Failure> {
        let mut rebuilt = 0;
        // SAFETY: the reducer is live and `rebuilt` a valid place.
        call(|message| unsafe {
            ffi::muster_c10d_reducer_rebuild_buckets(self.raw, &raw mut rebuilt, message)
        })?;
        Ok(rebuilt != 0)
    }

    /// After a forward pass. `outputs` are searched for parameters they do not depend on; none, no search.
    pub fn prepare_for_backward(&self, outputs: &[Tensor]) -> Result<(), Failure> {
        let outputs = raw_tensors(outputs);
        // SAFETY: `outputs` holds as many live pointers as is said.
        call(|message| unsafe {
            ffi::muster_c10d_reducer_prepare_for_backward(self.raw, outputs.as_ptr(), outputs.len(), message)
        })
    }

    /// After the first backward pass of a static graph: reduces everything that pass left behind.
    pub fn delay_all_reduce(&self) -> Result<(), Failure> {
        // SAFETY: the reducer is live.
        call(|message| unsafe { ffi::muster_c10d_reducer_delay_all_reduce(self.raw, message) })
    }

    /// The size of each bucket in bytes, in the order of reduction.
    pub fn bucket_sizes_bytes(&self) -> Result<Vec<i64>, Failure> {
        // More buckets than any model has: at 25 MB each, a hundred gigabytes of gradients.
        const BUCKETS_MAX: usize = 4096;
        let mut sizes = vec![0; BUCKETS_MAX];
        let mut count = 0;
        // SAFETY: the shim writes at most `BUCKETS_MAX` sizes.
        call(|message| unsafe {
            ffi::muster_c10d_reducer_bucket_sizes(
                self.raw,
                sizes.as_mut_ptr(),
                sizes.len(),
                &raw mut count,
                message,
            )
        })?;
        sizes.truncate(count);
        Ok(sizes)
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and is freed once; this also takes its hooks off the parameters.
        unsafe { ffi::muster_c10d_reducer_free(self.raw) };
    }
}

/// Runs backward from a scalar. Unlike tch's, a lost peer is an error of its own kind and not a panic.
pub fn backward(loss: &Tensor) -> Result<(), Failure> {
    // SAFETY: the tensor is live; autograd runs, and ends, inside the call.
    call(|message| unsafe { ffi::muster_c10d_backward(raw_tensor(loss), message) })
}

/// Drops the gradients of `params`.
pub fn clear_grads(params: &[Tensor]) -> Result<(), Failure> {
    let params = raw_tensors(params);
    // SAFETY: `params` holds as many live pointers as is said.
    call(|message| unsafe { ffi::muster_c10d_clear_grads(params.as_ptr(), params.len(), message) })
}
