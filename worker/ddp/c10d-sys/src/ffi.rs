//! The extern declarations, kept in step with `shim/c10d_shim.h`.

use std::ffi::{c_char, c_void};

/// tch's pointer to an `at::Tensor`.
pub type RawTensor = *mut c_void;

/// An opaque `MusterStore`.
#[repr(C)]
pub struct RawStore {
    _private: [u8; 0],
}

/// An opaque `MusterGroup`.
#[repr(C)]
pub struct RawGroup {
    _private: [u8; 0],
}

/// An opaque `MusterReducer`.
#[repr(C)]
pub struct RawReducer {
    _private: [u8; 0],
}

/// `MusterReducerOptions`, field by field.
#[repr(C)]
pub struct RawReducerOptions {
    pub bucket_cap_bytes: i64,
    pub first_bucket_bytes: i64,
    pub bucket_cap_is_default: i32,
    pub find_unused_parameters: i32,
    pub gradient_as_bucket_view: i32,
    pub static_graph: i32,
    pub broadcast_buffers: i32,
}

// SAFETY: each signature is that of the header of the same name, compiled into this crate by build.rs.
// Every function catches all exceptions, so none unwinds into Rust.
unsafe extern "C" {
    pub fn muster_c10d_message_free(message: *mut c_char);
    pub fn muster_c10d_load_cuda(message: *mut *mut c_char) -> i32;
    pub fn muster_c10d_gloo_size() -> usize;

    pub fn muster_c10d_store_tcp(
        host: *const c_char,
        port: u16,
        is_server: i32,
        world_size: usize,
        timeout_ms: i64,
        out: *mut *mut RawStore,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_hash(timeout_ms: i64, out: *mut *mut RawStore, message: *mut *mut c_char)
    -> i32;
    pub fn muster_c10d_store_port(store: *mut RawStore, out: *mut u16, message: *mut *mut c_char) -> i32;
    pub fn muster_c10d_store_prefix(
        store: *mut RawStore,
        prefix: *const c_char,
        out: *mut *mut RawStore,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_set(
        store: *mut RawStore,
        key: *const c_char,
        data: *const u8,
        len: usize,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_get(
        store: *mut RawStore,
        key: *const c_char,
        out: *mut *mut u8,
        len: *mut usize,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_add(
        store: *mut RawStore,
        key: *const c_char,
        amount: i64,
        out: *mut i64,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_check(
        store: *mut RawStore,
        key: *const c_char,
        out: *mut i32,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_wait(
        store: *mut RawStore,
        key: *const c_char,
        timeout_ms: i64,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_store_free(store: *mut RawStore);
    pub fn muster_c10d_bytes_free(bytes: *mut u8);

    pub fn muster_c10d_group_new(
        store: *mut RawStore,
        rank: i32,
        size: i32,
        hostname: *const c_char,
        interface_name: *const c_char,
        timeout_ms: i64,
        out: *mut *mut RawGroup,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_group_all_reduce(
        group: *mut RawGroup,
        tensor: RawTensor,
        op: i32,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_group_broadcast(
        group: *mut RawGroup,
        tensor: RawTensor,
        root: i32,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_group_all_gather(
        group: *mut RawGroup,
        outputs: *const RawTensor,
        count: usize,
        input: RawTensor,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_group_barrier(group: *mut RawGroup, message: *mut *mut c_char) -> i32;
    pub fn muster_c10d_group_broadcast_coalesced(
        group: *mut RawGroup,
        tensors: *const RawTensor,
        count: usize,
        buffer_bytes: usize,
        root: i32,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_group_verify_params(
        group: *mut RawGroup,
        params: *const RawTensor,
        count: usize,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_group_free(group: *mut RawGroup);

    pub fn muster_c10d_reducer_new(
        group: *mut RawGroup,
        params: *const RawTensor,
        names: *const *const c_char,
        count: usize,
        options: *const RawReducerOptions,
        out: *mut *mut RawReducer,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_reducer_prepare_for_forward(
        reducer: *mut RawReducer,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_reducer_rebuild_buckets(
        reducer: *mut RawReducer,
        rebuilt: *mut i32,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_reducer_prepare_for_backward(
        reducer: *mut RawReducer,
        outputs: *const RawTensor,
        count: usize,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_reducer_delay_all_reduce(reducer: *mut RawReducer, message: *mut *mut c_char) -> i32;
    pub fn muster_c10d_reducer_bucket_sizes(
        reducer: *mut RawReducer,
        out: *mut i64,
        capacity: usize,
        count: *mut usize,
        message: *mut *mut c_char,
    ) -> i32;
    pub fn muster_c10d_reducer_free(reducer: *mut RawReducer);

    pub fn muster_c10d_backward(loss: RawTensor, message: *mut *mut c_char) -> i32;
    pub fn muster_c10d_clear_grads(params: *const RawTensor, count: usize, message: *mut *mut c_char) -> i32;
}
