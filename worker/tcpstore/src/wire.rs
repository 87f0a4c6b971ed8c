//! Requests as torch's clients encode them.
//!
//! A request is a byte that names the query, then its fields one after the other: integers in the order of the
//! machine, which is little-endian on all that torch is built for; keys and values behind their length in 64 bits;
//! several keys behind their count in 64 bits. No field says how long a request is, so [`Scan`] finds its end, and
//! checks every length against the limits before a byte is kept for it. The numbers of the queries are those of
//! torch 2.9 to 2.13: 17 came with 2.10, and 18 with 2.12.

use std::sync::Arc;

use crate::limits::Limits;
use crate::refusal::Refusal;

/// The number that torch's clients send first.
pub const MAGIC: u32 = 0x3C85_F7CE;

/// A key; a client puts a slash before those of its user.
pub type Key = Arc<[u8]>;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Must hold [`MAGIC`]; has no reply.
    Validate(u32),
    /// Sets a key; has no reply.
    Set(Key, Vec<u8>),
    /// Sets a key if its value is the first, or if it has none and the first is empty.
    CompareSet(Key, Vec<u8>, Vec<u8>),
    /// The value of a key, empty if it has none.
    Get(Key),
    /// Adds to a counter.
    Add(Key, i64),
    /// Whether all keys are there.
    Check(Vec<Key>),
    /// Answered once all keys are there.
    Wait(Vec<Key>),
    /// How many keys there are.
    NumKeys,
    /// Removes a key.
    Delete(Key),
    /// Adds to the end of a value; has no reply.
    Append(Key, Vec<u8>),
    /// Several values, empty where there is none.
    MultiGet(Vec<Key>),
    /// Sets several keys; has no reply.
    MultiSet(Vec<(Key, Vec<u8>)>),
    /// Ends the wait, if there is one.
    CancelWait,
    /// Answered with its number: the id of the client's process, as all known versions send it.
    Ping(u32),
    /// Adds to the end of a queue; has no reply.
    QueuePush(Key, Vec<u8>),
    /// Takes the first of a queue.
    QueuePop(Key),
    /// How many a queue has.
    QueueLen(Key),
    /// All keys.
    ListKeys,
    /// Counts the client as arrived, and is answered once so many are.
    Barrier(Key, i64),
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Word32,
    Word64,
    Key,
    Value,
}

use Field::{Key as K, Value as V, Word32, Word64};

/// What a query consists of: whether there is a count before its fields, which then repeat, and the fields.
fn shape(query: u8) -> Option<(bool, &'static [Field])> {
    Some(match query {
        0 | 13 => (false, &[Word32]),
        1 | 9 | 14 => (false, &[K, V]),
        2 => (false, &[K, V, V]),
        3 | 8 | 15 | 16 => (false, &[K]),
        4 | 18 => (false, &[K, Word64]),
        5 | 6 | 10 => (true, &[K]),
        11 => (true, &[K, V]),
        7 | 12 | 17 => (false, &[]),
        _ => return None,
    })
}

/// Where the end of a request is, as far as it has come in. Goes on where it stopped, so that a request that comes in
/// small pieces costs no more than one that comes whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scan {
    fields: &'static [Field],
    /// The count is not read yet.
    uncounted: bool,
    items_left: u64,
    /// The next field of the item.
    field: usize,
    /// Bytes that were understood.
    at: usize,
}

/// What a scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The request has so many bytes.
    Whole(usize),
    /// It has at least so many.
    AtLeast(usize),
}

impl Scan {
    /// Of a request that begins with this byte.
    pub fn new(query: u8) -> Result<Self, Refusal> {
        let (uncounted, fields) = shape(query).ok_or(Refusal::UnknownQuery(query))?;
        Ok(Self { fields, uncounted, items_left: 1, field: 0, at: 1 })
    }

    /// Looks at the request as far as it is there, from its first byte.
    pub fn look(&mut self, bytes: &[u8], limits: &Limits) -> Result<Found, Refusal> {
        if self.uncounted {
            let Some(keys) = word64(bytes, self.at) else { return Ok(Found::AtLeast(self.at + 8)) };
            let max = limits.keys_per_request_max;
            if keys > max as u64 {
                return Err(Refusal::TooManyKeys { keys, max });
            }
            (self.uncounted, self.items_left, self.at) = (false, keys, self.at + 8);
        }
        while self.items_left > 0 {
            while let Some(field) = self.fields.get(self.field) {
                let Some(end) = self.end_of(*field, bytes, limits)? else {
                    return Ok(Found::AtLeast(self.at + 8));
                };
                if end > limits.request_bytes_max {
                    return Err(Refusal::RequestTooLong { bytes: end, max: limits.request_bytes_max });
                }
                if end > bytes.len() {
                    return Ok(Found::AtLeast(end));
                }
                (self.at, self.field) = (end, self.field + 1);
            }
            (self.items_left, self.field) = (self.items_left - 1, 0);
        }
        Ok(Found::Whole(self.at))
    }

    fn end_of(&self, field: Field, bytes: &[u8], limits: &Limits) -> Result<Option<usize>, Refusal> {
        let length = match field {
            Word32 => return Ok(Some(self.at + 4)),
            Word64 => return Ok(Some(self.at + 8)),
            K | V => word64(bytes, self.at),
        };
        let Some(length) = length else { return Ok(None) };
        let (key_max, value_max) = (limits.key_bytes_max, limits.value_bytes_max);
        match field {
            K if length > key_max as u64 => Err(Refusal::KeyTooLong { bytes: length, max: key_max }),
            V if length > value_max as u64 => Err(Refusal::ValueTooLong { bytes: length, max: value_max }),
            // It is at most a `usize`, as its limit is.
            _ => Ok(Some(self.at.saturating_add(8).saturating_add(length as usize))),
        }
    }
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads a request of which [`Scan`] has found the end; none if it is not whole.
pub(crate) fn parse(bytes: &[u8]) -> Option<Request> {
    let (query, rest) = bytes.split_first()?;
    let mut from = Reader(rest);
    Some(match query {
        0 => Request::Validate(from.word32()?),
        1 => Request::Set(from.key()?, from.value()?),
        2 => Request::CompareSet(from.key()?, from.value()?, from.value()?),
        3 => Request::Get(from.key()?),
        4 => Request::Add(from.key()?, from.word64()?.cast_signed()),
        5 => Request::Check(from.keys()?),
        6 => Request::Wait(from.keys()?),
        7 => Request::NumKeys,
        8 => Request::Delete(from.key()?),
        9 => Request::Append(from.key()?, from.value()?),
        10 => Request::MultiGet(from.keys()?),
        11 => {
            let count = from.word64()?;
            Request::MultiSet((0..count).map(|_| Some((from.key()?, from.value()?))).collect::<Option<_>>()?)
        }
        12 => Request::CancelWait,
        13 => Request::Ping(from.word32()?),
        14 => Request::QueuePush(from.key()?, from.value()?),
        15 => Request::QueuePop(from.key()?),
        16 => Request::QueueLen(from.key()?),
        17 => Request::ListKeys,
        18 => Request::Barrier(from.key()?, from.word64()?.cast_signed()),
        _ => return None,
    })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn word32(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn word64(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.word64()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn key(&mut self) -> Option<Key> {
        self.bytes().map(Key::from)
    }

    fn value(&mut self) -> Option<Vec<u8>> {
        self.bytes().map(<[u8]>::to_vec)
    }

    fn keys(&mut self) -> Option<Vec<Key>> {
        // Collecting asks for no memory that the bytes do not stand for: it stops where they end.
        let count = self.word64()?;
        (0..count).map(|_| self.key()).collect()
    }
}

impl Request {
    /// As a client sends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let count = |out: &mut Vec<u8>, count: usize| out.extend((count as u64).to_le_bytes());
        let bytes = |out: &mut Vec<u8>, bytes: &[u8]| {
            out.extend((bytes.len() as u64).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        out.push(self.query());
        match self {
            Self::Validate(number) | Self::Ping(number) => out.extend(number.to_le_bytes()),
            Self::Set(key, value) | Self::Append(key, value) | Self::QueuePush(key, value) => {
                bytes(out, key);
                bytes(out, value);
            }
            Self::CompareSet(key, expected, desired) => {
                bytes(out, key);
                bytes(out, expected);
                bytes(out, desired);
            }
            Self::Get(key) | Self::Delete(key) | Self::QueuePop(key) | Self::QueueLen(key) => bytes(out, key),
            Self::Add(key, number) | Self::Barrier(key, number) => {
                bytes(out, key);
                out.extend(number.to_le_bytes());
            }
            Self::Check(keys) | Self::Wait(keys) | Self::MultiGet(keys) => {
                count(out, keys.len());
                for key in keys {
                    bytes(out, key);
                }
            }
            Self::MultiSet(pairs) => {
                count(out, pairs.len());
                for (key, value) in pairs {
                    bytes(out, key);
                    bytes(out, value);
                }
            }
            Self::NumKeys | Self::CancelWait | Self::ListKeys => {}
        }
    }

    fn query(&self) -> u8 {
        match self {
            Self::Validate(_) => 0,
            Self::Set(..) => 1,
            Self::CompareSet(..) => 2,
            Self::Get(_) => 3,
            Self::Add(..) => 4,
            Self::Check(_) => 5,
            Self::Wait(_) => 6,
            Self::NumKeys => 7,
            Self::Delete(_) => 8,
            Self::Append(..) => 9,
            Self::MultiGet(_) => 10,
            Self::MultiSet(_) => 11,
            Self::CancelWait => 12,
            Self::Ping(_) => 13,
            Self::QueuePush(..) => 14,
            Self::QueuePop(_) => 15,
            Self::QueueLen(_) => 16,
            Self::ListKeys => 17,
            Self::Barrier(..) => 18,
        }
    }
}
