//! What went wrong, said at the end: the first exit that was observed, and what its program left in its error file.

use muster_core::types::{Generation, NodeName};
use muster_proto::v1;
use muster_worker::Attached;
use serde_json::Value;

use crate::output::{quoted, say, say_lines};

/// Largest error file that is shown.
const ERROR_BYTES_MAX: u64 = 1 << 20;

/// Prints the end of a job that did not succeed.
pub(super) fn print(job: &v1::Job, node: &NodeName, attached: &Attached) {
    say!("muster run: {}", job.reason);
    let Some(exit) = &job.exit else { return };
    let world = job.world_size.unwrap_or(0);
    let local = |placement: &v1::NodePlacement| {
        let first = placement.first_rank.unwrap_or(0);
        exit.rank.and_then(|rank| rank.checked_sub(first)).filter(|local| *local < placement.procs)
    };
    let local_rank = job.placement.iter().find_map(local).unwrap_or(0);
    let dir = attached.rank_dir(Generation(exit.generation), local_rank);
    let is_here = exit.node_name == node.as_str();
    if let Some(stack) = call_stack(&dir.join("error.json")).filter(|_| is_here) {
        say_lines(quoted(&stack));
    } else if !exit.stderr_tail.trim().is_empty() {
        say!("its last words on standard error:");
        say_lines(quoted(&exit.stderr_tail));
    }
    let (rank, attempt) = (exit.rank.unwrap_or(0), exit.generation.saturating_sub(1));
    let place = if is_here { "here".to_owned() } else { format!("on {}", exit.node_name) };
    say!("  first to fail: rank {rank} of {world}, {place} (local rank {local_rank}, attempt {attempt})");
}

/// What Python's @record wrote.
fn call_stack(path: &std::path::Path) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(ERROR_BYTES_MAX).read_to_string(&mut text).ok()?;
    let json: Value = serde_json::from_str(&text).ok()?;
    let stack = json.pointer("/message/extraInfo/py_callstack").or_else(|| json.pointer("/message/message"));
    stack.and_then(Value::as_str).or_else(|| json.get("message")?.as_str()).map(str::to_owned)
}
