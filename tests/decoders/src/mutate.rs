//! The property tests: each decoder on its samples, on samples with mutations, and on random bytes.

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::Decoder;

/// Inputs per decoder: a fraction of a second each, unoptimised. The fuzzer is for more.
const CASES: u32 = 1000;

/// One change to an encoding, at a place relative to its length.
#[derive(Clone, Debug)]
enum Edit {
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// A piece comes twice, as repeated fields do.
    Repeat(Index, usize),
    Truncate(Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let place = any::<Index>;
    prop_oneof![
        (place(), 1_u8..).prop_map(|(at, mask)| Edit::Flip(at, mask)),
        (place(), prop::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (place(), 1_usize..16).prop_map(|(at, count)| Edit::Remove(at, count)),
        (place(), 1_usize..64).prop_map(|(at, count)| Edit::Repeat(at, count)),
        place().prop_map(Edit::Truncate),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    let place = |at: &Index| at.index(bytes.len() + 1);
    let piece = |at: &Index, count: usize| place(at)..bytes.len().min(place(at) + count);
    match edit {
        Edit::Flip(at, mask) => {
            let at = place(at);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= mask;
            }
        }
        Edit::Insert(at, more) => {
            let at = place(at);
            bytes.splice(at..at, more.iter().copied());
        }
        Edit::Remove(at, count) => _ = bytes.drain(piece(at, *count)),
        Edit::Repeat(at, count) => bytes.extend_from_within(piece(at, *count)),
        Edit::Truncate(at) => bytes.truncate(place(at)),
    }
}

/// Tries every decoder on the same inputs in each run.
pub fn check(decoders: &[Decoder]) {
    let mut broken = Vec::new();
    for decoder in decoders {
        let samples = (decoder.samples)();
        assert!(!samples.is_empty(), "{} has no samples", decoder.name);
        let mutated = (prop::sample::select(samples.clone()), prop::collection::vec(edit(), 1..6)).prop_map(
            |(mut bytes, edits)| {
                for edit in &edits {
                    apply(&mut bytes, edit);
                }
                bytes
            },
        );
        let input = prop_oneof![4 => mutated, 1 => prop::collection::vec(any::<u8>(), 0..300)];
        let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
        let case = |bytes: Vec<u8>| {
            (decoder.decode)(&bytes);
            Ok(())
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let whole = samples.into_iter().try_for_each(|sample| runner.run_one(Just(sample), case).map(|_| ()));
        if let Err(error) = whole.and_then(|()| runner.run(&input, case)) {
            broken.push(format!("the decoder {}: {error}", decoder.name));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
