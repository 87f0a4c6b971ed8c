//! A C ABI over libtorch's own c10d, with the thinnest safe Rust on top: store, process group, reducer.
//!
//! This crate owns every `unsafe` of the DDP stack. It decides nothing: which store, which network
//! interface and when a gradient is reduced are the business of `muster-ddp`. It never throws, never
//! panics on what a peer does, and never reads the environment.
#![expect(unsafe_code, reason = "the FFI boundary to libtorch; every other crate of the DDP stack denies it")]

mod failure;
mod ffi;
mod group;
mod reducer;
mod store;

pub use failure::{Failure, FailureKind};
pub use group::{Device, Group, ReduceOp};
pub use reducer::{Reducer, ReducerOptions, backward, clear_grads};
pub use store::Store;

/// Loads libtorch's CUDA half into this process, if it is installed.
///
/// One binary serves both machines: the linker drops `libtorch_cuda` because nothing names a symbol of
/// it, so it has to be asked for. Call it first thing in `main`: operators register when it loads. An error
/// means that training runs on CPU; it carries the dynamic linker's own words.
pub fn load_cuda() -> Result<(), Failure> {
    // SAFETY: no arguments but the place for the message.
    failure::call(|message| unsafe { ffi::muster_c10d_load_cuda(message) })
}

/// `sizeof(ProcessGroupGloo)` as the shim was compiled: 488 for libtorch 2.11.0.
///
/// The shim allocates that class itself from stub headers, so another size would be memory corruption.
pub fn gloo_size_bytes() -> usize {
    // SAFETY: a function of nothing that returns a compile-time constant.
    unsafe { ffi::muster_c10d_gloo_size() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn stub_headers_describe_the_class_that_libtorch_allocates() {
        assert_eq!(super::gloo_size_bytes(), 488);
    }
}
