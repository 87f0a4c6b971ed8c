//! What a step asks of the driver, in the order in which it must be carried out: writes are durable before
//! anything is shown, sent or replied, and who has a reply sees what it speaks of.

use std::collections::BTreeSet;

use crate::access::{Barred, Token};
use crate::core::Meta;
use crate::job::Job;
use crate::node::Node;
use crate::quota::QueueFull;
use crate::types::{Assignment, JobId, NodeName, Owner, Session, TokenName};

/// Everything one step asks for.
#[derive(Debug, Default)]
pub struct Effects {
    /// To be made durable first, all or none.
    pub writes: Vec<Write>,
    /// Then sent, each on the session it names or not at all.
    pub sends: Vec<(NodeName, Session, ToNode)>,
    /// Then answered, if the input was a request.
    pub reply: Option<Result<Reply, Refusal>>,
    /// Whether the report that was the input says something of a gang or of ranks that its node never held. That part of
    /// it has changed nothing.
    pub stranger: bool,
    /// Shown to readers and watchers, once the writes are durable and before anything else leaves.
    pub events: BTreeSet<Event>,
    pub(crate) stored_jobs: BTreeSet<JobId>,
    pub(crate) stored_nodes: BTreeSet<NodeName>,
    pub(crate) stored_tokens: BTreeSet<TokenName>,
    pub(crate) stored_barred: BTreeSet<NodeName>,
    pub(crate) meta_changed: bool,
}

impl Effects {
    /// The job's record must be written again.
    pub(crate) fn store_job(&mut self, id: &JobId) {
        self.stored_jobs.insert(id.clone());
        self.show_job(id);
    }

    /// Something about the job that is not stored has changed.
    pub(crate) fn show_job(&mut self, id: &JobId) {
        self.events.insert(Event::Job(id.clone()));
    }

    /// Details that nodes add to the record of a running gang have changed.
    pub(crate) fn show_job_detail(&mut self, id: &JobId) {
        self.events.insert(Event::JobDetail(id.clone()));
    }

    /// The node's record must be written again.
    pub(crate) fn store_node(&mut self, name: &NodeName) {
        self.stored_nodes.insert(name.clone());
        self.show_node(name);
    }

    /// Something about the node that is not stored has changed.
    pub(crate) fn show_node(&mut self, name: &NodeName) {
        self.events.insert(Event::Node(name.clone()));
    }
}

/// One durable change.
#[derive(Clone, Debug)]
pub enum Write {
    /// Counters and identity of the cluster.
    Meta(Meta),
    /// Put a job.
    Job(Box<Job>),
    /// Remove a job.
    DeleteJob(JobId),
    /// Put a node.
    Node(Box<Node>),
    /// Remove a node.
    DeleteNode(NodeName),
    /// Put a token.
    Token(Box<Token>),
    /// Remove a token.
    DeleteToken(TokenName),
    /// Put a node that was shut out.
    Barred(Barred),
    /// Remove one.
    DeleteBarred(NodeName),
}

/// A message to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToNode {
    /// The whole desired state, first message of a session.
    Welcome(Vec<Assignment>),
    /// The desired state of one gang.
    Assign(Box<Assignment>),
    /// The session is over: a newer one of the same daemon, or another daemon, took its place.
    Close(String),
}

/// A change that watchers see.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// The job changed.
    Job(JobId),
    /// Details that nodes add to the record of the running gang have changed: readers see it, no watcher is told.
    JobDetail(JobId),
    /// The node changed.
    Node(NodeName),
    /// The job is gone; what is kept beside the state (metrics) goes with it.
    JobDeleted(JobId),
}

/// Answer to a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The job as it is once the writes are durable.
    Job(Box<Job>),
    /// The node as it is once the writes are durable.
    Node(Box<Node>),
    /// A session was opened.
    Session(Session),
    /// The token as it is, or was when it was revoked.
    Token(Box<Token>),
    /// The node is shut out.
    Barred(Barred),
}

/// Says of what is not the caller's own whose it is, and who may change it.
pub fn not_owned(owner: Option<&Owner>) -> String {
    let (whose, who) = match owner {
        Some(owner) => (format!("belongs to {owner}"), format!("{owner} or an operator")),
        None => ("has no known owner".to_owned(), "an operator".to_owned()),
    };
    format!(
        "{whose}, and only {who} may change it or see all of it; ask {who}, or use a token of the role \
         operator (`muster token create --role operator`)"
    )
}

/// Why a request is refused, in the words shown to the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such job.
    #[error("no job {0} is known; `muster jobs -a` lists those that are")]
    NoJob(String),
    /// There is no such node.
    #[error("no node {0} is known; `muster nodes` lists those that are")]
    NoNode(String),
    /// The job is somebody else's.
    #[error("job {job} {}", not_owned(.owner.as_ref()))]
    NotOwner {
        /// The job.
        job: JobId,
        /// Whose it is, where that is known.
        owner: Option<Owner>,
    },
    /// The request id was used for something else.
    #[error(
        "request_id {request_id:?} was already used to submit job {job}, with another spec; choose a new one"
    )]
    RequestReused {
        /// The id.
        request_id: String,
        /// The job it made.
        job: JobId,
    },
    /// Too much waits.
    #[error(transparent)]
    QueueFull(#[from] QueueFull),
    /// Only operators have jobs placed so early.
    #[error(
        "priority {asked} is above {most}, and only an operator submits such a job; ask for {most} or less, or \
         use a token of the role operator (`muster token create --role operator`)"
    )]
    Priority {
        /// What was asked for.
        asked: i32,
        /// The highest that others may ask for.
        most: i32,
    },
    /// Too many nodes.
    #[error("{nodes} nodes are known already, the most that are kept")]
    TooManyNodes {
        /// How many there are.
        nodes: usize,
    },
    /// Another live daemon holds the name.
    #[error(
        "node name {0} is held by another live daemon; start this one with another --name, or stop the other"
    )]
    NameHeld(NodeName),
    /// The earlier daemon of the name was cut off; its ranks may run until its lease ends.
    #[error("the lease of the daemon that had the name {node} before ends in {millis} ms; try again then")]
    LeaseHeld {
        /// The node.
        node: NodeName,
        /// Time left.
        millis: u64,
    },
    /// Session without Join, or after another daemon took the name.
    #[error("node {0} has not joined with this incarnation; call Join first")]
    NotJoined(NodeName),
    /// The name of the token is taken.
    #[error("there is a token {0} already; choose another --name, or revoke that one")]
    TokenExists(TokenName),
    /// There is no such token, or it is over.
    #[error(
        "no token {0} is known; it may have been revoked or have expired; `muster token list` shows those that are"
    )]
    NoToken(String),
    /// The token has been spent as often as it could be.
    #[error(
        "the join token {0} has been used already; make another one with `muster token create --role node`"
    )]
    TokenUsedUp(TokenName),
    /// Too many nodes are shut out.
    #[error("{} nodes are shut out already, the most that are kept", crate::access::BARRED_MAX)]
    TooManyBarred,
    /// Too many tokens.
    #[error("{} tokens are known already, the most that are kept; revoke some", crate::access::TOKENS_MAX)]
    TooManyTokens,
    /// A Hello that was held up on its way.
    #[error("this hello of node {0} comes after a later one of the same daemon, and is passed over")]
    LateHello(NodeName),
}
