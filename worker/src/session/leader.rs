//! The newest time of leading that this node knows of. Whoever led before it says nothing any more.

use std::path::PathBuf;

use muster_proto::v1;
use serde::{Deserialize, Serialize};
use tonic::Status;
use tracing::warn;

use crate::data_dir;

/// A time of leading. Kept on the disk: a daemon that begins must not fall for a deposed one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leader {
    cluster_id: String,
    term: u64,
}

/// The newest one.
#[derive(Debug)]
pub(super) struct Newest {
    data_dir: PathBuf,
    known: Leader,
}

impl Newest {
    /// What an earlier daemon knew.
    pub fn load(data_dir: PathBuf) -> Self {
        let known = data_dir::leader(&data_dir);
        Self { data_dir, known }
    }

    /// A coordinator has answered a Join. Refused if another one has led since it did.
    pub fn joined(&mut self, joined: &v1::JoinResponse) -> Result<(), Status> {
        let said = Leader { cluster_id: joined.cluster_id.clone(), term: joined.term };
        // One of an older version says nothing of it.
        if said.term == 0 || said == self.known {
            return Ok(());
        }
        if said.cluster_id == self.known.cluster_id && said.term < self.known.term {
            return Err(Status::aborted(format!(
                "this coordinator leads for the {}. time, and this node has been with a later leader, of time {}: it was \
                 deposed, or its store was restored from a backup; if that was meant, stop this node's ranks and remove \
                 leader.json from its data directory",
                said.term, self.known.term
            )));
        }
        self.known = said;
        if let Err(error) = data_dir::keep_leader(&self.data_dir, &self.known) {
            warn!(%error, "the coordinator's time of leading could not be noted for the next daemon");
        }
        Ok(())
    }

    /// Whether a message of this time of leading counts.
    pub fn counts(&self, term: u64) -> bool {
        term == 0 || term >= self.known.term
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deposed_leader_is_refused_also_by_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let load = || Newest::load(dir.path().to_owned());
        let joined = |cluster: &str, term| v1::JoinResponse {
            cluster_id: cluster.to_owned(),
            term,
            ..v1::JoinResponse::default()
        };
        let mut newest = load();
        for (cluster, term, ok) in
            [("a", 2, true), ("a", 2, true), ("a", 5, true), ("a", 4, false), ("", 0, true), ("a", 5, true)]
        {
            assert_eq!(newest.joined(&joined(cluster, term)).is_ok(), ok, "{cluster} {term}");
        }
        assert_eq!([0, 4, 5, 6].map(|term| newest.counts(term)), [true, false, true, true]);
        let mut next = load();
        assert!(next.joined(&joined("a", 4)).unwrap_err().message().contains("leader.json"));
        assert!(next.joined(&joined("b", 1)).is_ok(), "another cluster counts for itself");
    }
}
