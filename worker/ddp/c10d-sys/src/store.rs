//! The key-value store that ranks meet at.

use crate::failure::{Failure, c_string, call, millis};
use crate::ffi::{self, RawStore};
use std::ptr;
use std::time::Duration;

/// A c10d store. Not `Sync`: one thread at a time talks on its connection.
#[derive(Debug)]
pub struct Store {
    raw: *mut RawStore,
}

impl Store {
    /// Connects to the TCPStore at `host:port`, waiting at most `timeout` for it to be there.
    pub fn tcp_client(host: &str, port: u16, world_size: usize, timeout: Duration) -> Result<Self, Failure> {
        Self::tcp(host, port, false, world_size, timeout)
    }

    /// Hosts a TCPStore in this process and waits for `world_size` ranks; 0 waits for nobody, and a port of
    /// 0 takes a free one (see [`Store::port`]).
    pub fn tcp_server(host: &str, port: u16, world_size: usize, timeout: Duration) -> Result<Self, Failure> {
        Self::tcp(host, port, true, world_size, timeout)
    }

    fn tcp(
        host: &str,
        port: u16,
        server: bool,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let host = c_string(host)?;
        let mut raw = ptr::null_mut();
        // SAFETY: `host` outlives the call and `raw` is a valid place for the handle.
        call(|message| unsafe {
            ffi::muster_c10d_store_tcp(
                host.as_ptr(),
                port,
                i32::from(server),
                world_size,
                millis(timeout),
                &raw mut raw,
                message,
            )
        })?;
        Ok(Self { raw })
    }

    /// A store inside this process, for a group of one.
    pub fn in_process(timeout: Duration) -> Result<Self, Failure> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a valid place for the handle.
        call(|message| unsafe { ffi::muster_c10d_store_hash(millis(timeout), &raw mut raw, message) })?;
        Ok(Self { raw })
    }

    /// The same store, with `prefix/` before every key.
    pub fn with_prefix(&self, prefix: &str) -> Result<Self, Failure> {
        let prefix = c_string(prefix)?;
        let mut raw = ptr::null_mut();
        // SAFETY: `self.raw` is a live store; the new handle holds its own reference to it.
        call(|message| unsafe {
            ffi::muster_c10d_store_prefix(self.raw, prefix.as_ptr(), &raw mut raw, message)
        })?;
        Ok(Self { raw })
    }

    /// The port of a TCPStore.
    pub fn port(&self) -> Result<u16, Failure> {
        let mut port = 0;
        // SAFETY: `self.raw` is a live store and `port` a valid place.
        call(|message| unsafe { ffi::muster_c10d_store_port(self.raw, &raw mut port, message) })?;
        Ok(port)
    }

    /// Sets a key.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Failure> {
        let key = c_string(key)?;
        // SAFETY: the pointer and the length are those of one slice, which outlives the call.
        call(|message| unsafe {
            ffi::muster_c10d_store_set(self.raw, key.as_ptr(), value.as_ptr(), value.len(), message)
        })
    }

    /// Waits for a key, at most the store's timeout, and reads it.
    pub fn get(&self, key: &str) -> Result<Vec<u8>, Failure> {
        let key = c_string(key)?;
        let (mut bytes, mut len) = (ptr::null_mut(), 0);
        // SAFETY: both out-places are valid.
        call(|message| unsafe {
            ffi::muster_c10d_store_get(self.raw, key.as_ptr(), &raw mut bytes, &raw mut len, message)
        })?;
        // SAFETY: on success the shim left `len` bytes at `bytes`, never null, that are ours to free once.
        let value = unsafe { std::slice::from_raw_parts(bytes, len) }.to_vec();
        // SAFETY: as above; `value` is a copy.
        unsafe { ffi::muster_c10d_bytes_free(bytes) };
        Ok(value)
    }

    /// Adds to a counter, which starts at 0, and returns its new value.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Failure> {
        let key = c_string(key)?;
        let mut sum = 0;
        // SAFETY: `key` outlives the call and `sum` is a valid place.
        call(|message| unsafe {
            ffi::muster_c10d_store_add(self.raw, key.as_ptr(), amount, &raw mut sum, message)
        })?;
        Ok(sum)
    }

    /// Whether a key is set, without waiting.
    pub fn check(&self, key: &str) -> Result<bool, Failure> {
        let key = c_string(key)?;
        let mut present = 0;
        // SAFETY: `key` outlives the call and `present` is a valid place.
        call(|message| unsafe {
            ffi::muster_c10d_store_check(self.raw, key.as_ptr(), &raw mut present, message)
        })?;
        Ok(present != 0)
    }

    /// Waits until a key is set, at most `timeout`.
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<(), Failure> {
        let key = c_string(key)?;
        // SAFETY: `key` outlives the call.
        call(|message| unsafe {
            ffi::muster_c10d_store_wait(self.raw, key.as_ptr(), millis(timeout), message)
        })
    }

    pub(crate) fn raw(&self) -> *mut RawStore {
        self.raw
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and is freed once; a group made from it holds its own reference.
        unsafe { ffi::muster_c10d_store_free(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FailureKind;

    #[test]
    fn tcp_store_sets_gets_adds_checks_and_times_out() {
        let second = Duration::from_secs(1);
        let server = Store::tcp_server("127.0.0.1", 0, 0, second).unwrap();
        let client = Store::tcp_client("127.0.0.1", server.port().unwrap(), 0, second).unwrap();
        server.set("name", b"muster\0!").unwrap();
        assert_eq!(client.get("name").unwrap(), b"muster\0!");
        server.set("empty", b"").unwrap();
        assert_eq!(client.get("empty").unwrap(), b"");
        assert_eq!((client.add("n", 2).unwrap(), server.add("n", 3).unwrap()), (2, 5));
        assert!(client.check("name").unwrap());
        assert!(!client.check("absent").unwrap());
        assert_eq!(client.wait("absent", Duration::from_millis(50)).unwrap_err().kind, FailureKind::Timeout);
        assert_eq!(client.get("absent").unwrap_err().kind, FailureKind::Timeout);
        assert!(client.set("a\0b", b"").is_err());
        let inner = client.with_prefix("run").unwrap();
        inner.set("key", b"value").unwrap();
        assert_eq!(server.get("run/key").unwrap(), b"value");
        assert!(inner.port().is_err());
    }

    #[test]
    fn nobody_listening_is_an_error_within_the_timeout() {
        // Port 1 of loopback: reserved, and never served on a machine that runs these tests.
        let failure = Store::tcp_client("127.0.0.1", 1, 0, Duration::from_millis(300)).unwrap_err();
        assert_ne!(failure.kind, FailureKind::Other, "{failure}");
    }
}
