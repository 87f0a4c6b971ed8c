//! The one error type: which operation failed, and whether a peer is dead, slow, or blameless.

use c10d_sys::{Failure, FailureKind};

/// What was being done when something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Reaching the store at MASTER_ADDR:MASTER_PORT.
    Rendezvous,
    /// Connecting to every other rank.
    Connect,
    /// [`crate::ProcessGroup::all_reduce`].
    AllReduce,
    /// [`crate::ProcessGroup::broadcast`].
    Broadcast,
    /// [`crate::ProcessGroup::all_gather`].
    AllGather,
    /// [`crate::ProcessGroup::barrier`].
    Barrier,
    /// Comparing the model across ranks in [`crate::Ddp::new`].
    VerifyModel,
    /// Copying rank 0's parameters and buffers to every rank in [`crate::Ddp::new`].
    BroadcastModel,
    /// Hooking the reducer onto the parameters in [`crate::Ddp::new`].
    BuildReducer,
    /// Everything before the forward pass, which includes copying rank 0's buffers.
    PrepareForward,
    /// Between forward and backward.
    PrepareBackward,
    /// The backward pass, during which gradients are reduced.
    Backward,
    /// Dropping gradients.
    ZeroGrad,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Rendezvous => "rendezvous at the store",
            Self::Connect => "connecting to the other ranks",
            Self::AllReduce => "all_reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::Barrier => "barrier",
            Self::VerifyModel => "comparing the model across ranks",
            Self::BroadcastModel => "copying rank 0's model to every rank",
            Self::BuildReducer => "building the reducer",
            Self::PrepareForward => "preparing the forward pass",
            Self::PrepareBackward => "preparing the backward pass",
            Self::Backward => "the backward pass",
            Self::ZeroGrad => "dropping gradients",
        })
    }
}

/// Why distributed training cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Only some of the launcher's variables are set.
    #[error(
        "{name} is not set: start the program with `muster submit` or torchrun, or unset RANK, WORLD_SIZE, \
         MASTER_ADDR and MASTER_PORT to train alone"
    )]
    MissingVariable {
        /// The variable's name.
        name: &'static str,
    },
    /// A variable holds something else than it should.
    #[error("{name} is {value:?}, which is not {expected}")]
    BadVariable {
        /// The variable's name.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold, in words.
        expected: &'static str,
    },
    /// This machine has no address to reach the master from.
    #[error(
        "found no route to MASTER_ADDR {master:?}: check the name, or set GLOO_SOCKET_IFNAME to the network interface that ranks share"
    )]
    NoRoute {
        /// MASTER_ADDR.
        master: String,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The connection to a peer broke: it died, or left.
    #[error("lost a peer during {operation}")]
    PeerLost {
        /// What was being done.
        operation: Operation,
        /// libtorch's words.
        #[source]
        source: Failure,
    },
    /// A peer did not answer within the timeout: it hangs, or never came.
    #[error("a peer did not answer in time during {operation}")]
    Timeout {
        /// What was being done.
        operation: Operation,
        /// libtorch's words.
        #[source]
        source: Failure,
    },
    /// libtorch refused, and no peer is to blame.
    #[error("libtorch refused {operation}")]
    Refused {
        /// What was being done.
        operation: Operation,
        /// libtorch's words.
        #[source]
        source: Failure,
    },
    /// The ranks do not hold the same model. Every rank gets this error.
    #[error("the ranks hold different models: {reason}")]
    ModelMismatch {
        /// Which rank and which parameter.
        reason: String,
    },
    /// No parameter of the model requires a gradient.
    #[error("the model has no trainable parameter, so there is nothing to reduce")]
    NothingToTrain,
    /// A parameter is not on the CPU, and gradients travel over Gloo.
    #[error("parameter {name} is on {device}: gradients are reduced on the CPU only")]
    UnsupportedDevice {
        /// The parameter's name.
        name: String,
        /// Where it is.
        device: String,
    },
    /// The closure returned something that backward cannot start from.
    #[error("the loss must be one number that depends on a parameter, not {found}")]
    BadLoss {
        /// What it returned.
        found: String,
    },
    /// An earlier step failed, and what is in the buckets is anyone's guess.
    #[error("an earlier step failed: drop this Ddp and its ProcessGroup, and build both anew")]
    Broken,
    /// A checkpoint is of another model.
    #[error("the checkpoint {path} is not of this model: {reason}")]
    CheckpointMismatch {
        /// The checkpoint.
        path: std::path::PathBuf,
        /// The first difference.
        reason: String,
    },
    /// Fewer samples than ranks, so some rank would have none.
    #[error("{len} samples cannot be shared out among {world_size} ranks: each needs at least one")]
    TooFewSamples {
        /// The samples.
        len: usize,
        /// The ranks.
        world_size: usize,
    },
}

impl Error {
    /// Whether a peer's connection broke. The root cause is to be looked for on that peer.
    pub fn is_peer_lost(&self) -> bool {
        matches!(self, Self::PeerLost { .. })
    }

    /// Whether a peer was silent for the whole timeout.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }
}

/// Names the operation that failed.
pub trait During<T> {
    /// Turns libtorch's failure into ours.
    fn during(self, operation: Operation) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, Failure> {
    fn during(self, operation: Operation) -> Result<T, Error> {
        self.map_err(|source| match source.kind {
            FailureKind::Timeout => Error::Timeout { operation, source },
            FailureKind::PeerLost => Error::PeerLost { operation, source },
            FailureKind::Other => Error::Refused { operation, source },
        })
    }
}
