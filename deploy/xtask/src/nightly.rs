//! What is worth running every night and too long for each change.

use crate::test::{Stage, run_stages};
use anyhow::Result;

/// Each is a command that can be typed alone; a new one is a line here.
const STAGES: [(&str, &str); 7] = [
    ("simulation", "cargo xtask sim --seeds 200000 --first 1000000"),
    ("network", "env MUSTER_NETWORK_SEEDS=300 cargo test -p muster-network"),
    ("fuzz", "cargo xtask fuzz --seconds 60"),
    ("build", "cargo build -p muster-cli"),
    ("failover", "env MUSTER_FAULTS=60 cargo test -p muster-tests --test failover -- --nocapture"),
    ("every write", "cargo test -p muster-tests --test writes -- --ignored"),
    // A workspace of its own, with a licence of its own. Not locked: its lock follows that of the checkout.
    (
        "fuzz licences",
        ".deps/bin/cargo-deny --manifest-path tests/fuzz/Cargo.toml --config deny.toml check bans licenses sources",
    ),
];

/// Runs every stage until one fails.
pub fn run() -> Result<()> {
    run_stages(&STAGES.map(|(name, words)| Stage::new(name, words)))
}
