//! Replies as torch's clients read them, and those that wait for a slow reader.

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::limits::{Budget, Hold, Value};
use crate::refusal::Refusal;
use crate::wire::Key;

/// Values from this length on are sent from where they are; shorter ones are copied, in bytes.
const SHARED_BYTES_MIN: usize = 16 << 10;
/// Pieces that go to the kernel at once, beyond which it gains nothing.
const SLICES_MAX: usize = 64;
/// Replies above this are counted before they are encoded, in bytes; others if their reader does not take them.
const HELD_BYTES_MIN: usize = 4 << 10;

/// An answer to a client.
#[derive(Clone, Debug)]
pub enum Reply {
    /// One byte: whether the keys of a check are there.
    Ready(bool),
    /// One byte: the keys of a wait are there, or as many are at the barrier as it waits for.
    StopWaiting,
    /// One byte: the wait is cancelled, or there was none.
    WaitCanceled,
    /// The number of a ping.
    Pong(u32),
    /// A counter, or how many there are.
    Number(i64),
    /// Values, each behind its length; the length alone for a key without one.
    Values(Vec<Option<Value>>),
    /// The value that a key has now; the expected one where it has none.
    Compared(Result<Value, Vec<u8>>),
    /// How many a queue had, and its first.
    Popped(usize, Option<Value>),
    /// All keys: their count, then each behind its length.
    Keys(Vec<Key>),
}

#[derive(Debug)]
enum Piece {
    Own(Vec<u8>),
    Shared(Value),
}

/// Replies that are encoded and not sent.
#[derive(Debug)]
pub struct Outbox {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are sent.
    sent: usize,
    /// Bytes of the pieces that are its own.
    own_bytes: usize,
    hold: Hold,
}

impl Outbox {
    /// With nothing in it.
    pub fn new(budget: &Budget) -> Result<Self, Refusal> {
        Ok(Self { pieces: VecDeque::new(), sent: 0, own_bytes: 0, hold: budget.hold(0)? })
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Adds a reply. One that takes much memory must fit first: a request of some bytes can ask for the same value many
    /// thousand times.
    pub fn push(&mut self, reply: &Reply) -> Result<(), Refusal> {
        let bytes = own_bytes(reply);
        if bytes > HELD_BYTES_MIN {
            self.hold.resize(self.memory() + bytes)?;
        }
        match reply {
            Reply::Ready(true) | Reply::StopWaiting => self.own(&[0]),
            Reply::Ready(false) | Reply::WaitCanceled => self.own(&[1]),
            Reply::Pong(number) => self.own(&number.to_le_bytes()),
            Reply::Number(number) => self.own(&number.to_le_bytes()),
            Reply::Values(values) => values.iter().for_each(|value| self.value(value.as_ref())),
            Reply::Compared(Ok(value)) => self.value(Some(value)),
            Reply::Compared(Err(expected)) => self.string(expected),
            Reply::Popped(count, value) => {
                self.own(&(*count as u64).to_le_bytes());
                if let Some(value) = value {
                    self.value(Some(value));
                }
            }
            Reply::Keys(keys) => {
                self.own(&(keys.len() as u64).to_le_bytes());
                for key in keys {
                    self.string(key);
                }
            }
        }
        Ok(())
    }

    /// What to send next where that is all in one piece, as most replies are.
    pub(crate) fn slice(&self) -> Option<&[u8]> {
        match self.pieces.front() {
            Some(Piece::Own(bytes)) if self.pieces.len() == 1 => bytes.get(self.sent..),
            Some(_) | None => None,
        }
    }

    /// What to send next, as slices.
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let bytes = self.pieces.iter().take(SLICES_MAX).map(|piece| match piece {
            Piece::Own(bytes) => &bytes[..],
            Piece::Shared(value) => value,
        });
        let skip = std::iter::once(self.sent).chain(std::iter::repeat(0));
        bytes.zip(skip).map(|(bytes, skip)| IoSlice::new(&bytes[skip..])).collect()
    }

    /// So many bytes of it are sent.
    pub fn advance(&mut self, bytes: usize) {
        self.sent += bytes;
        while let Some(first) = self.pieces.front() {
            let (length, own) = match first {
                Piece::Own(bytes) => (bytes.len(), bytes.len()),
                Piece::Shared(value) => (value.len(), 0),
            };
            if self.sent < length {
                break;
            }
            (self.sent, self.own_bytes) = (self.sent - length, self.own_bytes - own);
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() {
            // Less than before always fits.
            self.hold.resize(0).ok();
        }
    }

    /// Counts what is left, for its reader may never take it. Values are counted already, by whoever has them.
    pub(crate) fn hold(&mut self) -> Result<(), Refusal> {
        self.hold.resize(self.memory())
    }

    fn memory(&self) -> usize {
        self.own_bytes + self.pieces.len() * size_of::<Piece>()
    }

    fn value(&mut self, value: Option<&Value>) {
        match value {
            Some(value) if value.len() >= SHARED_BYTES_MIN => {
                self.own(&(value.len() as u64).to_le_bytes());
                self.pieces.push_back(Piece::Shared(value.clone()));
            }
            Some(value) => self.string(value),
            None => self.string(&[]),
        }
    }

    fn string(&mut self, bytes: &[u8]) {
        self.own(&(bytes.len() as u64).to_le_bytes());
        self.own(bytes);
    }

    fn own(&mut self, more: &[u8]) {
        if more.is_empty() {
            return;
        }
        self.own_bytes += more.len();
        if let Some(Piece::Own(bytes)) = self.pieces.back_mut() {
            bytes.extend_from_slice(more);
        } else {
            self.pieces.push_back(Piece::Own(more.to_vec()));
        }
    }
}

/// Memory that a reply takes in an outbox, in bytes.
fn own_bytes(reply: &Reply) -> usize {
    let of = |length: usize| if length < SHARED_BYTES_MIN { 8 + length } else { 8 + 2 * size_of::<Piece>() };
    match reply {
        Reply::Values(values) => values.iter().map(|value| of(value.as_deref().map_or(0, <[u8]>::len))).sum(),
        Reply::Keys(keys) => keys.iter().map(|key| 8 + key.len()).sum(),
        Reply::Compared(Err(expected)) => 8 + expected.len(),
        // At most one short value and a few numbers.
        Reply::Ready(_)
        | Reply::StopWaiting
        | Reply::WaitCanceled
        | Reply::Pong(_)
        | Reply::Number(_)
        | Reply::Compared(Ok(_))
        | Reply::Popped(..) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_encoded_as_torch_encodes_them() {
        let budget = Budget::new(1 << 20);
        let value = |bytes: &[u8]| Value::new(&budget, bytes.to_vec()).unwrap();
        let key = |text: &str| Key::from(text.as_bytes());
        // Recorded between torch's own client and server.
        let table: Vec<(Reply, &[u8])> = vec![
            (Reply::Ready(true), &[0]),
            (Reply::Ready(false), &[1]),
            (Reply::StopWaiting, &[0]),
            (Reply::WaitCanceled, &[1]),
            (Reply::Pong(5028), &[0xa4, 0x13, 0, 0]),
            (Reply::Number(-2), &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            (Reply::Values(vec![Some(value(b"1"))]), b"\x01\0\0\0\0\0\0\x001"),
            (Reply::Values(vec![None, Some(value(b"yy"))]), b"\0\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0yy"),
            (Reply::Compared(Err(b"x".to_vec())), b"\x01\0\0\0\0\0\0\0x"),
            (Reply::Popped(1, Some(value(b"v1"))), b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0v1"),
            (Reply::Popped(0, None), &[0; 8]),
            (Reply::Keys(vec![key("/a")]), b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a"),
        ];
        for (reply, bytes) in table {
            let mut outbox = Outbox::new(&budget).unwrap();
            outbox.push(&reply).unwrap();
            assert_eq!(outbox.slices().iter().flat_map(|slice| slice.to_vec()).collect::<Vec<u8>>(), bytes);
        }
    }

    #[test]
    fn long_values_are_sent_from_where_they_are_in_whatever_steps_the_kernel_takes() {
        let budget = Budget::new(10 << 20);
        let long = Value::new(&budget, (0..100_000_u32).map(|n| n as u8).collect()).unwrap();
        let replies = [
            Reply::Values(vec![Some(long.clone()), None, Some(long.clone())]),
            Reply::Number(7),
            Reply::Popped(2, Some(long.clone())),
        ];
        let mut expected = Vec::new();
        for count in [long.len(), 0, long.len()] {
            expected.extend((count as u64).to_le_bytes());
            if count > 0 {
                expected.extend_from_slice(&long);
            }
        }
        expected.extend(7_i64.to_le_bytes());
        expected.extend(2_i64.to_le_bytes());
        expected.extend((long.len() as u64).to_le_bytes());
        expected.extend_from_slice(&long);
        for step in [1_usize, 13, 50_000, 1 << 20] {
            let mut outbox = Outbox::new(&budget).unwrap();
            for reply in &replies {
                outbox.push(reply).unwrap();
            }
            outbox.hold().unwrap();
            let mut sent = Vec::new();
            while !outbox.is_empty() {
                let next = outbox.slices()[0].to_vec();
                let taken = next.len().min(step);
                sent.extend_from_slice(&next[..taken]);
                outbox.advance(taken);
            }
            assert!(sent == expected, "steps of {step}");
        }
        assert_eq!(budget.held_bytes(), 100_000, "only the value is left");
    }
}
