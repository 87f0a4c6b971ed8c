//! Who leads, as this coordinator knows it, and what its handlers may do.
//!
//! A coordinator that leads has a driver. One that does not refuses every call with the leader's address; only where no
//! leader can be found, because etcd is in trouble, one that has led shows what it knew last, and says so.

use std::net::SocketAddr;
use std::sync::Arc;

use muster_core::types::Millis;
use muster_proto::convert::NotLeader;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpConnectInfo;
use tonic::{Request, Status};

use crate::agents::Runs;
use crate::clock::Clock;
use crate::driver::Handle;

/// Header of a response that shows what may no longer be so: why, in words.
pub(crate) const STALE: &str = "muster-stale";
/// Longest such header: as much as a message has.
const STALE_BYTES_MAX: usize = 768;

/// A time of leading.
#[derive(Clone, Debug)]
pub(crate) struct Reign {
    pub driver: Handle,
    pub agents: Runs,
    /// Its number, which every message to a node carries.
    pub term: u64,
    /// Coordinators that stand for election.
    pub coordinators: u32,
    /// Identity of the cluster.
    pub cluster_id: Arc<str>,
    /// Ends every stream that rests on it.
    pub over: CancellationToken,
}

/// A time of not leading.
#[derive(Clone, Debug, Default)]
pub(crate) struct Following {
    pub leader: Option<String>,
    pub coordinators: u32,
    /// What is wrong with etcd, if something is.
    pub trouble: Option<String>,
    /// What this coordinator knew when it last led, and when that was.
    pub last: Option<(Reign, Millis)>,
}

/// One of the two.
#[derive(Clone, Debug)]
pub(crate) enum Standing {
    Leading(Reign),
    Following(Following),
}

/// Shared by the handlers. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Office {
    standing: watch::Receiver<Standing>,
    clock: Clock,
    /// This start of the process.
    id: Arc<str>,
    /// The kernel's id of this boot; empty where there is none.
    boot_id: Arc<str>,
}

impl Office {
    pub fn new(standing: watch::Receiver<Standing>, clock: Clock) -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { standing, clock, id: uuid::Uuid::new_v4().to_string().into(), boot_id: boot_id.trim().into() }
    }

    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The present time of leading; none if another coordinator is to be asked.
    pub fn reign(&self) -> Result<Reign, Status> {
        self.reign_for(None)
    }

    /// The same for a call over a connection that was taken at this address.
    pub fn reign_for(&self, accepted_at: Option<SocketAddr>) -> Result<Reign, Status> {
        match &*self.standing.borrow() {
            Standing::Leading(reign) => Ok(reign.clone()),
            Standing::Following(following) => match shown(following) {
                // Its driver shows what was, and refuses everything else.
                Some((reign, _)) => Ok(reign.clone()),
                None => {
                    Err(self.refusal(following, accepted_at.map(|at| at.to_string()).unwrap_or_default()))
                }
            },
        }
    }

    /// Whether it leads.
    pub fn leads(&self) -> bool {
        matches!(&*self.standing.borrow(), Standing::Leading(_))
    }

    /// Whether it leads; if not, why, in words.
    pub fn ready(&self) -> Result<(), String> {
        match &*self.standing.borrow() {
            Standing::Leading(_) => Ok(()),
            Standing::Following(following) => {
                let leader = following.leader.as_ref().map(|leader| format!("{leader} leads"));
                let trouble =
                    following.trouble.clone().unwrap_or_else(|| "no coordinator leads yet".to_owned());
                Err(leader.unwrap_or(trouble))
            }
        }
    }

    /// Each change of the standing.
    pub fn changes(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Lets a call through to its handler, or says whom to call instead.
    pub fn admit(&self, request: &Request<()>) -> Result<(), Status> {
        match &*self.standing.borrow() {
            Standing::Leading(_) => Ok(()),
            Standing::Following(following) if shown(following).is_some() => Ok(()),
            Standing::Following(following) => {
                let connection = request.extensions().get::<TcpConnectInfo>();
                let accepted_at = connection.and_then(|info| info.local_addr).map(|at| at.to_string());
                Err(self.refusal(following, accepted_at.unwrap_or_default()))
            }
        }
    }

    /// Only a leader takes nodes and agents in, whatever else is shown.
    pub fn admit_to_lead(&self, request: &Request<()>) -> Result<(), Status> {
        match &*self.standing.borrow() {
            Standing::Leading(_) => Ok(()),
            Standing::Following(following) => {
                let connection = request.extensions().get::<TcpConnectInfo>();
                let accepted_at = connection.and_then(|info| info.local_addr).map(|at| at.to_string());
                Err(self.refusal(following, accepted_at.unwrap_or_default()))
            }
        }
    }

    fn refusal(&self, following: &Following, accepted_at: String) -> Status {
        let says = NotLeader {
            leader: following.leader.clone().unwrap_or_default(),
            coordinator: self.id.to_string(),
            coordinators: following.coordinators,
            accepted_at,
            boot_id: self.boot_id.to_string(),
        };
        says.to_status(following.trouble.as_deref().unwrap_or_default())
    }

    /// Why what is read now may no longer be so, in words; none if it is so.
    pub fn stale(&self) -> Option<http::HeaderValue> {
        let words = match &*self.standing.borrow() {
            Standing::Leading(reign) => reign.driver.trouble()?,
            Standing::Following(following) => {
                let (_, since) = shown(following)?;
                let ago = self.clock.now().since(*since).0 / 1000;
                let why = following.trouble.as_deref().unwrap_or("no coordinator leads");
                format!("as known {ago} s ago: {why}")
            }
        };
        let ascii: String = words
            .chars()
            .map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' })
            .take(STALE_BYTES_MAX)
            .collect();
        http::HeaderValue::from_str(&ascii).ok()
    }
}

/// What may be shown though it may no longer be so: only while nobody who knows better can be found.
fn shown(following: &Following) -> Option<&(Reign, Millis)> {
    following.last.as_ref().filter(|_| following.leader.is_none() && following.trouble.is_some())
}
