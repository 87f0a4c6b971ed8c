//! What goes into the core: requests of users, what nodes say, and the passing of time.

use crate::access::{Digest, NewToken};
use crate::health::Finding;
use crate::inventory::Inventory;
use crate::node::Join;
use crate::owners::Caller;
use crate::types::{
    GangReport, Incarnation, JobSpec, Millis, NodeName, Owner, RequestId, Session, StopSignal, TokenName,
};

/// The newest heartbeat of a session.
#[derive(Clone, Debug)]
pub struct Heard {
    /// The node.
    pub node: NodeName,
    /// The session it came on.
    pub session: Session,
    /// When it was heard.
    pub at: Millis,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A user submits a job.
    Submit {
        /// Who it is.
        by: Caller,
        /// Makes a repetition harmless.
        request_id: Option<RequestId>,
        /// The checked spec.
        spec: Box<JobSpec>,
    },
    /// A user stops a job.
    Cancel {
        /// Who it is.
        by: Caller,
        /// The job's id as given.
        job: String,
        /// In words.
        reason: String,
        /// Asks the ranks to end; none stands for the job's own.
        signal: Option<StopSignal>,
    },
    /// A user takes a node out of scheduling or gives it back.
    SetCordon {
        /// Who it is, where that is known.
        by: Option<Owner>,
        /// The node's name as given.
        node: String,
        /// Why; none gives it back.
        cordon: Option<String>,
    },
    /// A user empties a node.
    Drain {
        /// Who it is, where that is known.
        by: Option<Owner>,
        /// The node's name as given.
        node: String,
        /// In words.
        reason: String,
        /// Longest time until ranks that do not end are killed; none leaves each job its own.
        timeout: Option<Millis>,
    },
    /// A token is made.
    CreateToken(Box<NewToken>),
    /// A token is refused from now on.
    RevokeToken {
        /// Its name as given.
        name: String,
    },
    /// A node asks for a certificate with a token.
    SpendToken {
        /// The token's name.
        name: TokenName,
        /// Hash of the secret that was shown.
        hash: Digest,
    },
    /// The certificates that a node has are refused from now on.
    BarNode(NodeName),
    /// A daemon registers.
    Join(Box<Join>),
    /// A daemon opens its session and says everything it observes.
    Hello {
        /// The node.
        node: NodeName,
        /// As in its Join.
        incarnation: Incarnation,
        /// Every gang it holds anything of.
        gangs: Vec<GangReport>,
        /// Why it is about to end, if it is.
        leaving: Option<String>,
        /// Counts the hellos of this daemon, from 1.
        number: u64,
    },
    /// A daemon is about to end in good order.
    Leaving {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
        /// In words.
        reason: String,
    },
    /// Heartbeats that the pulses of sessions have acknowledged.
    Heartbeats(Vec<Heard>),
    /// A gang's part on a node changed.
    Report {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
        /// What the node observes.
        report: Box<GangReport>,
    },
    /// What a node has found to be wrong with it, all of it.
    Health {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
        /// What is wrong.
        findings: Vec<Finding>,
        /// What the machine has, if that has changed.
        inventory: Option<Box<Inventory>>,
    },
    /// A session's stream broke.
    Disconnected {
        /// The node.
        node: NodeName,
        /// The session.
        session: Session,
    },
    /// A daemon ends in good order; its ranks are gone.
    Goodbye {
        /// The node.
        node: NodeName,
        /// The session it came on.
        session: Session,
    },
    /// The driver did not run for a while (a suspended machine, say) and heard no heartbeat meanwhile: every
    /// node gets a whole lease to be heard again.
    Stalled,
    /// A deadline has passed.
    Tick,
}
