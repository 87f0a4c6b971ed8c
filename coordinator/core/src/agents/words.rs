//! What agents say, and are told.

use std::net::SocketAddr;

use crate::types::{Incarnation, Millis, NodeName, RequestId};

/// What the agents of a run agree in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Fewest agents of a round, at least 1.
    pub min: u32,
    /// Most, at least as many and at most [`NODES_MAX`](crate::types::limits::NODES_MAX).
    pub max: u32,
    /// How long the first round waits for more than the fewest.
    pub last_call: Millis,
}

/// An agent's place in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which round, from 1.
    pub round: u64,
    /// Of the agent, below `world_size`.
    pub rank: u32,
    /// Agents in the round.
    pub world_size: u32,
    /// Who serves the store, below `world_size`.
    pub store_rank: u32,
    /// Where.
    pub store: SocketAddr,
}

/// How an agent begins a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Whom it wants to meet.
    pub run: RequestId,
    /// Who it is.
    pub agent: Incarnation,
    /// Where it is.
    pub node: NodeName,
    /// What it expects.
    pub spec: Spec,
    /// The place that it has, if its workers run.
    pub held: Option<Place>,
}

/// What an agent says then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It has no workers and wants a place; at this address it will serve the store if it is told to.
    Enter(SocketAddr),
    /// It ends, because of a failure or, with no words, because it has finished.
    Leave(String),
    /// Its stream has ended.
    Gone,
}

/// What an agent is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tell {
    /// Why there is no round yet.
    Waiting(String),
    /// The round begins.
    Place(Place),
    /// The round is over, for this reason.
    Recall(String),
    /// The run is over, for this failure or for none. Nothing comes after it.
    Closed(String),
}

/// Number of a stream, not used again.
pub type Link = u64;
/// What is to be sent.
pub type Tells = Vec<(Link, Tell)>;
