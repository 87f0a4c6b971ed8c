//! Whether there is a coordinator at all.
//!
//! A node that cannot renew its lease must stop its ranks, because a coordinator that hears nothing of it starts them
//! elsewhere. But if no coordinator runs, nobody does, and training should go on. What counts as proof: the
//! coordinator's machine refuses the connection (nothing listens there), or takes it and then nobody answers, on a
//! connection made for this attempt nor on yet another one (the process hangs; when it goes on it sees that it was away, and
//! extends every lease). Only the address at which it listens itself can prove so much: a proxy refuses for its own reasons.
//! A connection that cannot be made proves nothing, and any word proves that somebody is there: a
//! coordinator whose disk is slow may owe an answer for long, and counts leases meanwhile.
//!
//! Of several coordinators one leads, and it alone counts leases. One that says itself that it does not lead is as good
//! as one that is gone: should it lead later, it starts then, and gives every node a whole lease. So if each of them is
//! gone or says so, nobody can replace the ranks. It must be each of them, and they say how many they are: one that this
//! node does not know may lead.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use muster_core::types::Millis;
use muster_proto::convert::NotLeader;
use muster_proto::v1::{self, cluster_service_client::ClusterServiceClient};
use tokio::sync::{mpsc, watch};
use tonic::Status;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::connection::{Known, Reached, connect};
use super::leader::Newest;
use super::{CONNECT_MAX, Event};
use crate::Config;
use crate::clock::boot_now;
use crate::trust::{Trust, causes};

/// What comes of a question on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The connection was taken, and nothing came.
    Silence,
    /// There was no connection, or it broke.
    Unreachable,
    Words,
}

/// Who shows that a coordinator does not lead.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Witness {
    /// Its machine, by what this address of its own does.
    Address(SocketAddr),
    /// The coordinator of this identity, by its word.
    Word(String),
}

/// That a coordinator did not lead then.
#[derive(Clone, Debug)]
struct Sign {
    at: Millis,
    witness: Witness,
    /// How many there are, as it says.
    coordinators: u32,
}

/// What the attempts so far say.
pub(super) struct Signs {
    /// The lease's length, once a coordinator has said it.
    pub lease: Millis,
    /// The coordinator that is being tried; none if it is none of those that were configured.
    pub current: Option<usize>,
    urls: Vec<String>,
    trust: Trust,
    known: Known,
    newest: Newest,
    /// How many there are, as the last leader said.
    coordinators: u32,
    /// For each coordinator, when it was last found not to lead, unless something else was found later.
    gone: Vec<Option<Sign>>,
    events: mpsc::Sender<Event>,
    /// When ranks are asked to end without a sign.
    fenced_at: watch::Receiver<Option<Millis>>,
}

impl Signs {
    pub fn new(
        config: &Config,
        known: Known,
        newest: Newest,
        events: mpsc::Sender<Event>,
        fenced_at: watch::Receiver<Option<Millis>>,
    ) -> Self {
        let (urls, trust) = (config.coordinators.clone(), config.trust.clone());
        let (lease, gone) = (Millis::from_secs(10), vec![None; urls.len()]);
        Self { lease, current: Some(0), coordinators: 1, gone, urls, trust, known, newest, events, fenced_at }
    }

    /// The lease as a duration.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease.0)
    }

    /// How long a coordinator may be silent before that says something.
    pub fn patience(&self) -> Duration {
        (self.lease() / 12).min(CONNECT_MAX)
    }

    /// How long it may owe an answer. Whoever gives up loses his place among those that wait.
    fn answer_max(&self) -> Duration {
        self.lease().max(CONNECT_MAX)
    }

    /// How long until it matters whether anybody is there. None if it does not: no rank lives by it.
    ///
    /// A sign is good for a lease. Ten thousand nodes that ask more often than that keep a coordinator that is merely slow
    /// from answering any of them.
    fn asks_in(&self) -> Option<Duration> {
        // Another one may lead already.
        if self.urls.len() > 1 {
            return Some(Duration::ZERO);
        }
        let fenced_at = (*self.fenced_at.borrow())?;
        // In time for a second look, should the first one reach nobody.
        let at = Millis(fenced_at.0.saturating_sub(self.lease.0 / 4));
        Some(Duration::from_millis(at.since(boot_now()).0))
    }

    /// The endpoint, with probes that end a connection which stalls while there is time for another in the lease.
    pub fn probed(&self, endpoint: &Endpoint) -> Endpoint {
        let probe = self.lease() * 3 / 16;
        let endpoint = endpoint.clone().http2_keep_alive_interval(probe).keep_alive_timeout(probe);
        // Where there are others, one whose machine is gone without a word does not cost the lease.
        let connect_max = (self.lease() / 8).min(CONNECT_MAX);
        if self.urls.len() > 1 { endpoint.connect_timeout(connect_max) } else { endpoint }
    }

    /// Waits for an answer on a connection that was made, and learns from it if none comes.
    pub async fn watch<T>(
        &mut self,
        endpoint: &Endpoint,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Result<T, Status>, Status> {
        let call = tokio::time::timeout(self.answer_max(), call);
        tokio::pin!(call);
        let mut wait = self.patience();
        loop {
            // It took the connection and says nothing; or it is slow, or this one connection has stalled on its way.
            // The probes tell these two apart.
            let probe = async {
                tokio::time::sleep(wait).await;
                while let Some(left) = self.asks_in().filter(|left| !left.is_zero()) {
                    tokio::time::sleep(left).await;
                }
                self.asks_in()?;
                let asked = boot_now();
                Some((asked, self.ask_anew(endpoint).await))
            };
            let found = tokio::select! {
                answer = &mut call => {
                    return answer.map_err(|_| Status::deadline_exceeded("the coordinator does not answer"));
                }
                found = probe => found,
            };
            wait = self.lease() / 8;
            let Some((asked, found)) = found else { continue };
            let address = self.url().and_then(|url| self.known.address(url));
            let silent = address.filter(|_| found == Answer::Silence);
            self.note(silent.map(|address| Sign {
                at: asked,
                witness: Witness::Address(address),
                coordinators: 0,
            }))
            .await;
            // Another one may lead already.
            if silent.is_some() && self.urls.len() > 1 {
                return Err(Status::deadline_exceeded("the coordinator hangs"));
            }
        }
    }

    /// Asks on a connection of its own whether the process is well, which it answers without its store. Anything that
    /// comes back shows that somebody is there.
    async fn ask_anew(&self, endpoint: &Endpoint) -> Answer {
        let endpoint = endpoint.clone().connect_timeout(self.patience());
        let (channel, reached) = connect(&endpoint).await;
        if !reached.peer.is_some_and(|peer| self.testifies(peer)) {
            return Answer::Unreachable;
        }
        let channel = match channel {
            Ok(channel) => channel,
            // Nothing came of a TLS handshake, and not for want of time after a long way.
            Err(error)
                if is_late(&error) && reached.taken.is_some_and(|at| at.elapsed() >= self.patience() / 2) =>
            {
                return Answer::Silence;
            }
            Err(_) => return Answer::Unreachable,
        };
        let mut client = HealthClient::new(channel);
        match tokio::time::timeout(self.patience(), client.check(HealthCheckRequest::default())).await {
            Err(_) => Answer::Silence,
            Ok(Err(status)) if is_broken(&status) => Answer::Unreachable,
            Ok(_) => Answer::Words,
        }
    }

    /// The one that is being tried, if it was configured.
    fn url(&self) -> Option<&String> {
        self.urls.get(self.current?)
    }

    /// Whether this is where the coordinator that is being tried listens itself.
    fn testifies(&self, address: SocketAddr) -> bool {
        self.url().is_some_and(|url| self.known.testifies(url, address))
    }

    /// It could not be reached then, for what that says.
    pub async fn refused(&mut self, at: Millis, reached: &Reached) {
        let refused = reached.refused.iter().copied().find(|address| self.testifies(*address));
        self.note(refused.map(|address| Sign { at, witness: Witness::Address(address), coordinators: 0 }))
            .await;
    }

    /// It has answered a Join. Refused if it was deposed.
    pub async fn joined(&mut self, reached: &Reached, joined: &v1::JoinResponse) -> Result<(), Status> {
        if let Some(url) = self.current.and_then(|current| self.urls.get(current)) {
            self.known.answered(url, reached, &joined.accepted_at, &joined.boot_id);
        }
        self.coordinators = joined.coordinators.max(1);
        self.note(None).await;
        self.newest.joined(joined)
    }

    /// It has said that it does not lead, when it was asked then.
    pub async fn does_not_lead(&mut self, at: Millis, reached: &Reached, says: &NotLeader) {
        let mut direct = false;
        if let Some(url) = self.current.and_then(|current| self.urls.get(current)) {
            self.known.answered(url, reached, &says.accepted_at, &says.boot_id);
            // Behind one address that is not its own there may be any of them.
            direct = reached.peer.is_some_and(|peer| self.known.testifies(url, peer));
        }
        let (witness, coordinators) = (Witness::Word(says.coordinator.clone()), says.coordinators);
        self.note(direct.then_some(Sign { at, witness, coordinators })).await;
    }

    /// The coordinator that is being tried did not lead then, or may have.
    async fn note(&mut self, sign: Option<Sign>) {
        let Some(of_current) = self.current.and_then(|current| self.gone.get_mut(current)) else { return };
        *of_current = sign;
        let Some(all) = self.gone.iter().cloned().collect::<Option<Vec<Sign>>>() else { return };
        let witnesses: BTreeSet<&Witness> = all.iter().map(|sign| &sign.witness).collect();
        let said = all.iter().map(|sign| sign.coordinators).max().filter(|said| *said > 0);
        if witnesses.len() < said.unwrap_or(self.coordinators) as usize {
            return;
        }
        // Only if none leads, and only as of the least recent sign of it.
        if let Some(at) = all.iter().map(|sign| sign.at).min() {
            self.events.send(Event::CoordinatorGone { at }).await.ok();
        }
    }

    /// There is somebody, whatever it says.
    pub async fn somebody(&mut self) {
        self.note(None).await;
    }

    /// What a session needs beside its stream: which messages count; and a look at coordinators of which it is not known
    /// where they listen, so that they can testify should the leader be lost. The look never ends.
    pub fn parts(&mut self) -> (&Newest, impl Future<Output = ()>) {
        let Self { newest, known, urls, trust, current, .. } = self;
        let survey = async move {
            for (index, url) in urls.iter().enumerate() {
                let endpoint = trust.endpoint(url);
                if Some(index) != *current
                    && known.address(url).is_none()
                    && let Ok(endpoint) = endpoint
                    && let (Ok(channel), reached) = connect(&endpoint.connect_timeout(CONNECT_MAX)).await
                    && let Err(status) = ClusterServiceClient::new(channel).get_cluster(SURVEY).await
                    && let Some(says) = NotLeader::from_status(&status)
                {
                    known.answered(url, &reached, &says.accepted_at, &says.boot_id);
                }
            }
            std::future::pending::<()>().await;
        };
        (newest, survey)
    }
}

/// What one that does not lead refuses with its details, and the leader answers.
const SURVEY: v1::GetClusterRequest = v1::GetClusterRequest {};

/// Whether this is no answer but the end of the connection.
pub(super) fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Whether it is the time to connect that has run out.
fn is_late(error: &tonic::transport::Error) -> bool {
    causes(error).any(|error| {
        error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::TimedOut)
    })
}

#[cfg(test)]
mod tests;
