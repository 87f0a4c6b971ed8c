//! Why a checkpoint was not written or read, and whether training may go on without it.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Why a checkpoint was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This process has been replaced, and has to end.
    #[error("{ours} may write no checkpoint into {dir}: {newer} has taken it over")]
    Superseded {
        /// The directory.
        dir: PathBuf,
        /// Who wanted to write.
        ours: String,
        /// Who writes there now.
        newer: String,
    },
    /// The file system refused.
    #[error("failed to {what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Two parts of one name could not be told apart when they are read.
    #[error("the checkpoint has two parts named {0:?}")]
    TwoParts(String),
}

impl Error {
    /// Whether a later start of the job, or another job, writes there now.
    pub fn is_superseded(&self) -> bool {
        matches!(self, Self::Superseded { .. })
    }

    /// Whether the disk is full: training can go on, without new checkpoints.
    pub fn is_full(&self) -> bool {
        let full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
        matches!(self, Self::Io { source, .. } if full.contains(&source.kind()))
    }
}

/// Names what failed.
pub(crate) trait During<T> {
    fn during(self, what: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what, path: path.to_owned(), source })
    }
}
