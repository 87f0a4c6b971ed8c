//! Newtypes for everything that names or numbers something.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest node name in bytes, the limit of a DNS name.
pub const NODE_NAME_BYTES_MAX: usize = 253;
/// Longest job id in bytes. Ours have 8; the bound is for what arrives from outside.
pub const JOB_ID_BYTES_MAX: usize = 64;
/// Longest name of a token in bytes.
pub const TOKEN_NAME_BYTES_MAX: usize = 64;
/// Longest name of a user in bytes, as useradd has it.
pub const USER_NAME_BYTES_MAX: usize = 32;
/// Longest name of an owner in bytes: a node's, with what says that it is one.
pub const OWNER_BYTES_MAX: usize = NODE_NAME_BYTES_MAX + 8;
/// Longest request id in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        // What comes from the disk is checked as what comes from the network.
        #[serde(try_from = "String")]
        pub struct $name(String);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                Self::new(text)
            }
        }

        impl $name {
            /// Checks length and characters. The error says what is wrong, in words for the user.
            pub fn new(text: impl Into<String>) -> Result<Self, String> {
                let text = text.into();
                if text.is_empty() {
                    return Err(concat!($what, " is empty").to_owned());
                }
                if text.len() > $max {
                    return Err(format!("{} has {} bytes; at most {} are allowed", $what, text.len(), $max));
                }
                let valid: fn(char) -> bool = $valid;
                if let Some(bad) = text.chars().find(|c| !valid(*c)) {
                    return Err(format!("{} contains {bad:?}, which is not allowed there", $what));
                }
                // The text becomes part of file names on nodes and coordinator.
                if text.starts_with('.') {
                    return Err(concat!($what, " starts with a dot").to_owned());
                }
                Ok(Self(text))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// Characters allowed in names that end up in paths, labels and log lines.
pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

text_id!(
    /// Identity of a job: given by the core, never used again.
    JobId, "job_id", JOB_ID_BYTES_MAX, is_name_char
);
text_id!(
    /// Name of a node, unique in the cluster.
    NodeName, "node_name", NODE_NAME_BYTES_MAX, is_name_char
);
text_id!(
    /// What makes a repeated submission harmless; chosen by the caller.
    RequestId, "request_id", REQUEST_ID_BYTES_MAX, |c| !c.is_control()
);
text_id!(
    /// Name of a token.
    TokenName, "name", TOKEN_NAME_BYTES_MAX, |c| is_name_char(c) && c != '.'
);
text_id!(
    /// Name of a user of the nodes, as whom ranks run.
    UserName, "name of a user", USER_NAME_BYTES_MAX, is_name_char
);
text_id!(
    /// Whose a job is: the name of a token or of a user of the coordinator's machine, or `node:NAME`.
    Owner, "owner", OWNER_BYTES_MAX, |c| !c.is_control()
);
text_id!(
    /// One start of a node daemon.
    Incarnation, "incarnation", JOB_ID_BYTES_MAX, is_name_char
);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number_id!(
    /// The fencing token: one number per (re)start of a gang, from 1, rising, never reused in its job.
    Generation, u32
);
number_id!(
    /// Global rank of a process in its gang, from 0.
    Rank, u32
);
number_id!(
    /// Number of a node's session, rising over the life of the cluster.
    Session, u64
);

/// One start of one job's gang.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GangId {
    /// The job.
    pub job: JobId,
    /// Which of its starts.
    pub generation: Generation,
}

impl fmt::Display for GangId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.job, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_escape_a_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "a\0", &"x".repeat(65)] {
            assert!(JobId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["k3v9x2ma", "a.b_c-d"] {
            assert_eq!(JobId::new(good).unwrap().as_str(), good);
        }
    }
}
