//! What the shim's status and message become in Rust.

use crate::ffi;
use std::ffi::{CStr, CString, c_char};
use std::ptr;

/// Why an operation failed, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// A peer or the store did not answer in time: it hangs, or it never came.
    Timeout,
    /// The connection to a peer or to the store broke: it is dead.
    PeerLost,
    /// Anything else: a wrong argument, a shape mismatch, no such network interface.
    Other,
}

/// A failed c10d operation, in libtorch's own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The class of the failure.
    pub kind: FailureKind,
    /// libtorch's message, without its C++ backtrace.
    pub message: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Other, message: message.into() }
    }
}

/// Runs one shim function and takes over its message.
pub fn call(function: impl FnOnce(*mut *mut c_char) -> i32) -> Result<(), Failure> {
    let mut message: *mut c_char = ptr::null_mut();
    let kind = match function(&raw mut message) {
        0 => return Ok(()),
        1 => FailureKind::Timeout,
        2 => FailureKind::PeerLost,
        _ => FailureKind::Other,
    };
    if message.is_null() {
        return Err(Failure { kind, message: "out of memory".to_owned() });
    }
    // SAFETY: on a status other than 0 the shim leaves a NUL-terminated string that is ours to free once.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: as above; `text` is a copy.
    unsafe { ffi::muster_c10d_message_free(message) };
    // A C++ backtrace may follow the message proper; it means nothing to the person who reads this.
    let text = text.split("\nException raised from").next().unwrap_or_default().trim_end().to_owned();
    Err(Failure { kind, message: text })
}

/// A C string, or a failure that names the text that cannot be one.
pub fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::other(format!("{text:?} holds a NUL byte")))
}

/// A timeout as the shim takes it.
pub fn millis(timeout: std::time::Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX).max(1)
}
