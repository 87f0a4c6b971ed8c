//! muster-ddp with real processes over real sockets: each test starts this very binary once per rank.
#![expect(clippy::unwrap_used, reason = "a test program: helpers may panic as tests may")]

mod collectives;
mod failures;
mod gradients;
mod graphs;
mod harness;
mod models;

#[path = "../../examples/minimal.rs"]
mod minimal;

use muster_ddp::{Error, ProcessGroup};
use serde_json::Value;

/// What a rank of each case does. It runs inside a child process.
fn case(name: &str, group: &ProcessGroup) -> Result<Value, Error> {
    match name {
        "collectives" => collectives::collectives(group),
        "again" => collectives::again(group),
        "gradients" => gradients::gradients(group),
        "no_sync" => gradients::no_sync(group),
        "buffers" => graphs::buffers(group),
        "unused" => graphs::unused(group),
        "unused_unannounced" => graphs::unused_unannounced(group),
        "static_graph" => graphs::static_graph(group),
        "mismatch_shape" => failures::mismatch(group, failures::Mismatch::Shape),
        "mismatch_count" => failures::mismatch(group, failures::Mismatch::Count),
        "mismatch_name" => failures::mismatch(group, failures::Mismatch::Name),
        "nothing_to_train" => failures::nothing_to_train(group),
        "bad_loss" => failures::bad_loss(group),
        "train_until_killed" => failures::train_until_killed(group),
        "train_until_hung" => failures::train_until_hung(group),
        other => panic!("no case {other}"),
    }
}

/// Not a test of its own: the entry of a child process. Without a case in the environment, nothing.
#[test]
fn child() {
    harness::child(case);
}
