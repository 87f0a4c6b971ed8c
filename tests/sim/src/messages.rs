//! What travels between a daemon and the coordinator.

use muster_core::Join;
use muster_core::types::{Assignment, GangReport, Incarnation};

/// From a daemon.
#[derive(Clone, Debug)]
pub enum Up {
    Join(Box<Join>),
    Hello {
        incarnation: Incarnation,
        gangs: Vec<GangReport>,
        leaving: Option<String>,
        number: u64,
    },
    Heartbeat(u64),
    Report(Box<GangReport>),
    Leaving(String),
    Goodbye,
    /// The daemon has closed the connection, or its end has.
    Closed,
}

/// From the coordinator.
#[derive(Clone, Debug)]
pub enum Down {
    Joined,
    /// The session is open; what the node shall do comes when it is durable.
    Opened,
    Refused,
    Welcome(Vec<Assignment>),
    Assign(Box<Assignment>),
    Ack(u64),
    Closed,
}

impl Up {
    /// Whether it does no harm to say it twice, or late within its session.
    pub fn is_level(&self) -> bool {
        matches!(self, Self::Report(_) | Self::Heartbeat(_))
    }
}

impl Down {
    /// Whether it does no harm to say it twice, or late within its session.
    pub fn is_level(&self) -> bool {
        matches!(self, Self::Assign(_) | Self::Ack(_))
    }
}
