//! What a decoder is to the tests: a function that takes any bytes. Each crate lists its own in a module `fuzz`, and
//! both the property tests and the fuzzer (`tests/fuzz`) go by that list, so that neither can forget one.
//!
//! This crate decodes nothing itself.

#[cfg(not(fuzzing))]
mod mutate;

#[cfg(not(fuzzing))]
pub use mutate::check;

/// Headers that gRPC's C core takes by default; Python's clients are built on it.
const HEADER_BYTES_MAX: usize = 8 << 10;

/// Checks that a refusal says why and reaches whoever asked, however long what it quotes: `details` are those of
/// its status, encoded.
pub fn check_refusal(message: &str, details: &[u8]) {
    assert!(!message.is_empty(), "a refusal says why");
    let encoded = |byte: u8| if byte.is_ascii_graphic() && byte != b'%' { 1 } else { 3 };
    let bytes = message.bytes().map(encoded).sum::<usize>() + details.len().div_ceil(3) * 4 + 128;
    assert!(bytes <= HEADER_BYTES_MAX, "a refusal takes {bytes} bytes of headers: {message}");
}

/// One reader of bytes that come from the network or the disk.
#[derive(Clone, Copy, Debug)]
pub struct Decoder {
    /// Its name among all decoders, in snake case.
    pub name: &'static str,
    /// Decodes, and panics if what was accepted does not hold what it should. Refusing is always right.
    pub decode: fn(&[u8]),
    /// Encodings that are accepted: where mutations start.
    pub samples: fn() -> Vec<Vec<u8>>,
}
