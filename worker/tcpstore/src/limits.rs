//! What one store takes of its clients, and the memory that they share.
//!
//! Torch bounds keys and values, and not what it holds in all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::refusal::Refusal;

/// Bounds of one store. Whoever goes beyond one is disconnected, for the protocol has no reply that says no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once. Every rank holds one for its process group and one for each copy that it makes of it.
    pub connections_max: usize,
    /// Longest key, in bytes, with the slash that clients put before it: torch's own limit.
    pub key_bytes_max: usize,
    /// Longest value, in bytes. Torch stops at 8 MiB.
    pub value_bytes_max: usize,
    /// Keys in one request: torch's own limit.
    pub keys_per_request_max: usize,
    /// Longest request, in bytes: two values of the longest, or many keys.
    pub request_bytes_max: usize,
    /// Bytes of everything that is held: keys, values, queues, waits, requests that are not whole yet and replies
    /// that nobody takes.
    pub held_bytes_max: usize,
    /// Time from the connection to its first request; clients send that at once.
    pub handshake_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 65_536,
            key_bytes_max: 8 << 10,
            value_bytes_max: 64 << 20,
            keys_per_request_max: 128 << 10,
            request_bytes_max: 130 << 20,
            held_bytes_max: 1 << 30,
            handshake_max: Duration::from_secs(30),
        }
    }
}

/// The bytes that may be held, shared by all who hold any.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    held_bytes: AtomicUsize,
    held_bytes_max: usize,
}

impl Budget {
    /// Nothing is held yet.
    pub fn new(held_bytes_max: usize) -> Self {
        Self(Arc::new(Shared { held_bytes: AtomicUsize::new(0), held_bytes_max }))
    }

    /// Bytes held now.
    pub fn held_bytes(&self) -> usize {
        self.0.held_bytes.load(Ordering::Relaxed)
    }

    /// Holds so many bytes until what it gives is dropped.
    pub(crate) fn hold(&self, bytes: usize) -> Result<Hold, Refusal> {
        let mut hold = Hold { budget: self.clone(), bytes: 0 };
        hold.resize(bytes)?;
        Ok(hold)
    }
}

/// A part of the budget.
#[derive(Debug)]
pub(crate) struct Hold {
    budget: Budget,
    bytes: usize,
}

impl Hold {
    /// Holds more or less than before; if there is no room for more, as much as before.
    pub fn resize(&mut self, bytes: usize) -> Result<(), Refusal> {
        let Shared { held_bytes, held_bytes_max } = &*self.budget.0;
        if let Some(more) = bytes.checked_sub(self.bytes) {
            let room = |held: usize| held.checked_add(more).filter(|sum| sum <= held_bytes_max);
            let full = |held| Refusal::Full { wanted: more, held, max: *held_bytes_max };
            held_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).map_err(full)?;
        } else {
            held_bytes.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.budget.0.held_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A value, shared by the store and by the replies that carry it; held in the budget until the last of them is gone.
#[derive(Clone, Debug)]
pub struct Value(Arc<Held>);

#[derive(Debug)]
struct Held {
    bytes: Vec<u8>,
    hold: Hold,
}

impl Value {
    pub(crate) fn new(budget: &Budget, bytes: Vec<u8>) -> Result<Self, Refusal> {
        let hold = budget.hold(bytes.capacity())?;
        Ok(Self(Arc::new(Held { bytes, hold })))
    }

    /// Adds to its end: in place where nobody else has it, as torch does, for some append a byte at a time.
    pub(crate) fn append(&mut self, more: &[u8]) -> Result<(), Refusal> {
        let length = self.len() + more.len();
        if let Some(held) = Arc::get_mut(&mut self.0) {
            if length > held.bytes.capacity() {
                let capacity = length.max(2 * held.bytes.capacity());
                held.hold.resize(capacity)?;
                held.bytes.reserve_exact(capacity - held.bytes.len());
            }
            held.bytes.extend_from_slice(more);
            return Ok(());
        }
        let hold = self.0.hold.budget.hold(length)?;
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(self);
        bytes.extend_from_slice(more);
        self.0 = Arc::new(Held { bytes, hold });
        Ok(())
    }
}

impl std::ops::Deref for Value {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_held_until_the_last_who_has_it_lets_go() {
        let budget = Budget::new(100);
        let value = Value::new(&budget, vec![1; 60]).unwrap();
        let reply = value.clone();
        drop(value);
        assert_eq!(budget.held_bytes(), 60);
        assert_eq!(
            Value::new(&budget, vec![1; 41]).unwrap_err(),
            Refusal::Full { wanted: 41, held: 60, max: 100 }
        );
        drop(reply);
        assert_eq!(budget.held_bytes(), 0);
    }

    #[test]
    fn appending_does_not_change_what_a_reply_carries() {
        let budget = Budget::new(1000);
        let mut value = Value::new(&budget, b"a".to_vec()).unwrap();
        let reply = value.clone();
        value.append(b"b").unwrap();
        value.append(b"c").unwrap();
        assert_eq!((&*value, &*reply), (&b"abc"[..], &b"a"[..]));
        assert!(value.append(&[0; 2000]).is_err());
        assert_eq!(&*value, b"abc");
        drop((value, reply));
        assert_eq!(budget.held_bytes(), 0);
    }
}
