//! The process group: collectives over Gloo.

use crate::failure::{Failure, c_string, call, millis};
use crate::ffi::{self, RawGroup, RawTensor};
use crate::store::Store;
use std::ptr;
use std::time::Duration;
use tch::Tensor;

/// Which network device Gloo listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// The device that holds this address or resolvable name.
    Hostname(String),
    /// The network interface of this name.
    Interface(String),
}

/// How an all-reduce combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum over ranks.
    Sum,
    /// The sum divided by the number of ranks.
    Average,
    /// The least.
    Min,
    /// The greatest.
    Max,
}

/// A `c10d::ProcessGroup` with a `ProcessGroupGloo` for CPU tensors.
#[derive(Debug)]
pub struct Group {
    raw: *mut RawGroup,
}

pub(crate) fn raw_tensors(tensors: &[Tensor]) -> Vec<RawTensor> {
    tensors.iter().map(raw_tensor).collect()
}

pub(crate) fn raw_tensor(tensor: &Tensor) -> RawTensor {
    tensor.as_ptr().cast_mut().cast()
}

impl Group {
    /// Connects `size` ranks through `store`. Every collective fails after `timeout`.
    pub fn new(
        store: &Store,
        rank: i32,
        size: i32,
        device: &Device,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let (hostname, interface) = match device {
            Device::Hostname(name) => (Some(c_string(name)?), None),
            Device::Interface(name) => (None, Some(c_string(name)?)),
        };
        let pointer = |name: &Option<std::ffi::CString>| name.as_ref().map_or(ptr::null(), |n| n.as_ptr());
        let mut raw = ptr::null_mut();
        // SAFETY: the store is live, the strings outlive the call, exactly one of them is not null.
        call(|message| unsafe {
            ffi::muster_c10d_group_new(
                store.raw(),
                rank,
                size,
                pointer(&hostname),
                pointer(&interface),
                millis(timeout),
                &raw mut raw,
                message,
            )
        })?;
        Ok(Self { raw })
    }

    /// Combines `tensor` over all ranks, in place. It must be contiguous and the same shape everywhere.
    pub fn all_reduce(&self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), Failure> {
        let op = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Average => 1,
            ReduceOp::Min => 2,
            ReduceOp::Max => 3,
        };
        // SAFETY: group and tensor are live; the call returns only when Gloo is done with the tensor.
        call(|message| unsafe {
            ffi::muster_c10d_group_all_reduce(self.raw, raw_tensor(tensor), op, message)
        })
    }

    /// Overwrites `tensor` with that of rank `root`.
    pub fn broadcast(&self, tensor: &mut Tensor, root: i32) -> Result<(), Failure> {
        // SAFETY: as in `all_reduce`.
        call(|message| unsafe {
            ffi::muster_c10d_group_broadcast(self.raw, raw_tensor(tensor), root, message)
        })
    }

    /// Fills `outputs`, one per rank in rank order, with every rank's `input`.
    pub fn all_gather(&self, outputs: &mut [Tensor], input: &Tensor) -> Result<(), Failure> {
        let outputs = raw_tensors(outputs);
        // SAFETY: the pointers are those of live tensors, and their number is passed along.
        call(|message| unsafe {
            ffi::muster_c10d_group_all_gather(
                self.raw,
                outputs.as_ptr(),
                outputs.len(),
                raw_tensor(input),
                message,
            )
        })
    }

    /// Waits for every rank.
    pub fn barrier(&self) -> Result<(), Failure> {
        // SAFETY: the group is live.
        call(|message| unsafe { ffi::muster_c10d_group_barrier(self.raw, message) })
    }

    /// Overwrites all `tensors` with those of rank `root`, flattened into buffers of `buffer_bytes`.
    pub fn broadcast_coalesced(
        &self,
        tensors: &[Tensor],
        buffer_bytes: usize,
        root: i32,
    ) -> Result<(), Failure> {
        let tensors = raw_tensors(tensors);
        // SAFETY: as in `all_gather`; the shim writes through detached aliases of the tensors.
        call(|message| unsafe {
            ffi::muster_c10d_group_broadcast_coalesced(
                self.raw,
                tensors.as_ptr(),
                tensors.len(),
                buffer_bytes,
                root,
                message,
            )
        })
    }

    /// `verify_params_across_processes` of c10d: an error where this rank's parameters differ from rank 0's.
    pub fn verify_params(&self, params: &[Tensor]) -> Result<(), Failure> {
        let params = raw_tensors(params);
        // SAFETY: as in `all_gather`.
        call(|message| unsafe {
            ffi::muster_c10d_group_verify_params(self.raw, params.as_ptr(), params.len(), message)
        })
    }

    pub(crate) fn raw(&self) -> *mut RawGroup {
        self.raw
    }
}

impl Drop for Group {
    /// Closes the connections. It waits for collectives under way, so at most the timeout.
    fn drop(&mut self) {
        // SAFETY: the handle is ours and is freed once; a reducer made from it holds its own reference.
        unsafe { ffi::muster_c10d_group_free(self.raw) };
    }
}
