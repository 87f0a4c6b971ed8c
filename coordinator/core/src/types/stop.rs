//! How ranks are asked to end, and when nobody asks them.

use serde::{Deserialize, Serialize};

use super::Millis;

/// Signals that ask a rank to end, with their numbers on Linux.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "the names are the signals'")]
pub enum StopSignal {
    SigHup = 1,
    SigInt = 2,
    SigQuit = 3,
    SigUsr1 = 10,
    SigUsr2 = 12,
    #[default]
    SigTerm = 15,
}

impl StopSignal {
    /// Every one of them.
    pub const ALL: [Self; 6] =
        [Self::SigTerm, Self::SigInt, Self::SigHup, Self::SigQuit, Self::SigUsr1, Self::SigUsr2];

    /// Its name, such as `SIGTERM`.
    pub fn name(self) -> &'static str {
        match self {
            Self::SigHup => "SIGHUP",
            Self::SigInt => "SIGINT",
            Self::SigQuit => "SIGQUIT",
            Self::SigUsr1 => "SIGUSR1",
            Self::SigUsr2 => "SIGUSR2",
            Self::SigTerm => "SIGTERM",
        }
    }
}

/// What becomes of ranks when no coordinator runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorLoss {
    /// They run on: nobody can replace them.
    #[default]
    Run,
    /// They are stopped when the lease ends.
    Stop,
}

/// How ranks are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopMode {
    /// Asks them to end.
    #[serde(default)]
    pub signal: StopSignal,
    /// Time between the stop signal and SIGKILL.
    pub grace: Millis,
    /// Whether each rank's stacks are written to its standard error first, because it hangs.
    pub dump_stacks: bool,
}
