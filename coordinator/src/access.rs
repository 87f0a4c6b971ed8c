//! Who calls, and whether they may.

use std::collections::HashMap;

use muster_core::Core;
use muster_core::access::{Digest, Token};

/// The tokens, by the hash of their secret. Every one of them is stored.
#[derive(Debug, Default)]
pub(crate) struct Tokens(HashMap<Digest, Token>);

impl Tokens {
    pub fn of(core: &Core) -> Self {
        Self(core.tokens().values().map(|token| (token.hash.clone(), token.clone())).collect())
    }
}
