//! Points from the ranks: JSON lines on a Unix socket per rank, numbered and kept in a file by the shim, and sent
//! from there by the daemon.
//!
//! A rank connects to the socket named in MUSTER_TELEMETRY and writes lines such as
//! `{"step":1,"values":{"loss":2.3}}`, with an optional `"time"` in Unix seconds. Of a program that knows nothing of it,
//! the shim [follows](follow) the TensorBoard event files or matches the lines of its output.

pub(crate) mod events;
mod file;
mod follow;
mod outbox;
mod output;
pub(crate) mod parse;
mod socket;
mod source;

pub(crate) use events::EventDir;
#[cfg(any(test, fuzzing))]
pub(crate) use file::numbers;
pub(crate) use follow::{Followed, Follower, Looker};
pub(crate) use outbox::Outbox;
#[cfg(any(test, fuzzing))]
pub(crate) use output::lines;
pub(crate) use socket::{RankSocket, Sockets};
pub(crate) use source::Changes;

#[cfg(test)]
mod tests {
    //! What the tests of this module share.

    use std::collections::BTreeMap;
    use std::path::Path;

    use super::file::{Line, Position, path_in, read};

    /// The steps and values of all points that lie in a directory.
    pub fn points(log_dir: &Path) -> Vec<(u64, BTreeMap<String, f64>)> {
        let (mut found, mut at) = (Vec::new(), Position::default());
        loop {
            let look = read(&path_in(log_dir), at).unwrap();
            at = look.lines.back().map_or(at, |(after, _)| *after);
            let points = look.lines.into_iter().filter_map(|(_, line)| match line {
                Some(Line::Point { step, values, .. }) => Some((step, values)),
                Some(Line::Dropped { .. }) | None => None,
            });
            found.extend(points);
            if !look.more {
                return found;
            }
        }
    }
}
