//! Whether there is a coordinator at all.
//!
//! A node that cannot renew its lease must stop its ranks, because a coordinator that hears nothing of it starts them
//! elsewhere. But if no coordinator runs, nobody does, and training should go on. What counts as proof: the
//! coordinator's machine refuses the connection (nothing listens there), or takes it and then nobody answers, on a
//! connection made for this attempt nor on yet another one (the process hangs; when it goes on it sees that it was away, and
//! extends every lease). Only the address at which it listens itself can prove so much: a proxy refuses for its own reasons.
//! A connection that cannot be made proves nothing, and any word proves that somebody is there: a
//! coordinator whose disk is slow may owe an answer for long, and counts leases meanwhile.

use std::net::SocketAddr;
use std::time::Duration;

use muster_core::types::Millis;
use muster_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::connection::{Known, Reached, connect};
use super::{CONNECT_MAX, Event};
use crate::clock::boot_now;

/// What comes of a question on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The connection was taken, and nothing came.
    Silence,
    /// There was no connection, or it broke.
    Unreachable,
    Words,
}

/// What the attempts so far say.
pub(super) struct Signs {
    /// The lease's length, once a coordinator has said it.
    pub lease: Millis,
    /// The coordinator that is being tried.
    pub current: usize,
    urls: Vec<String>,
    known: Known,
    /// For each coordinator, when it was last found to be gone, unless something else was found later.
    gone: Vec<Option<Millis>>,
    events: mpsc::Sender<Event>,
}

impl Signs {
    pub fn new(urls: Vec<String>, known: Known, events: mpsc::Sender<Event>) -> Self {
        Self { lease: Millis::from_secs(10), current: 0, gone: vec![None; urls.len()], urls, known, events }
    }

    /// The lease as a duration.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease.0)
    }

    /// How long a coordinator may be silent before that says something.
    pub fn patience(&self) -> Duration {
        (self.lease() / 12).min(CONNECT_MAX)
    }

    /// How long it may owe an answer while it shows that it is there.
    fn answer_max(&self) -> Duration {
        (self.lease() / 2).max(CONNECT_MAX)
    }

    /// The endpoint, with probes that end a connection which stalls while there is time for another in the lease.
    pub fn probed(&self, endpoint: &Endpoint) -> Endpoint {
        let probe = self.lease() / 8;
        endpoint.clone().http2_keep_alive_interval(probe).keep_alive_timeout(probe)
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
                let asked = boot_now();
                (asked, self.ask_anew(endpoint).await)
            };
            let (asked, found) = tokio::select! {
                answer = &mut call => {
                    return answer.map_err(|_| Status::deadline_exceeded("the coordinator does not answer"));
                }
                found = probe => found,
            };
            self.note((found == Answer::Silence).then_some(asked)).await;
            // A sign is good for a lease. Ten thousand nodes that ask more often keep a coordinator that is merely slow
            // from answering any of them. But it must be young enough, should this connection break, to last until there
            // is another.
            wait = (wait * 2).min(self.lease() / 8);
        }
    }

    /// Asks on a connection of its own whether the process is well, which it answers without its store. Anything that
    /// comes back shows that somebody is there.
    async fn ask_anew(&self, endpoint: &Endpoint) -> Answer {
        let Ok((Ok(channel), reached)) = tokio::time::timeout(self.patience(), connect(endpoint)).await
        else {
            return Answer::Unreachable;
        };
        if !reached.peer.is_some_and(|peer| self.testifies(peer)) {
            return Answer::Unreachable;
        }
        let mut client = HealthClient::new(channel);
        match tokio::time::timeout(self.patience(), client.check(HealthCheckRequest::default())).await {
            Err(_) => Answer::Silence,
            Ok(Err(status)) if is_broken(&status) => Answer::Unreachable,
            Ok(_) => Answer::Words,
        }
    }

    /// Whether this is where the coordinator that is being tried listens itself.
    fn testifies(&self, address: SocketAddr) -> bool {
        self.urls.get(self.current).is_some_and(|url| self.known.testifies(url, address))
    }

    /// It could not be reached then, for what that says.
    pub async fn refused(&mut self, at: Millis, reached: &Reached) {
        let refused = reached.refused.iter().any(|address| self.testifies(*address));
        self.note(refused.then_some(at)).await;
    }

    /// It has answered a Join.
    pub async fn joined(&mut self, reached: &Reached, joined: &v1::JoinResponse) {
        if let Some(url) = self.urls.get(self.current) {
            self.known.joined(url, reached, joined);
        }
        self.note(None).await;
    }

    /// The coordinator that is being tried was gone then, or was not.
    pub async fn note(&mut self, gone: Option<Millis>) {
        self.gone[self.current] = gone;
        let all: Option<Vec<Millis>> = self.gone.iter().copied().collect();
        // Only if every one is gone, and only as of the least recent sign of it.
        if let Some(at) = all.and_then(|all| all.into_iter().min()) {
            self.events.send(Event::CoordinatorGone { at }).await.ok();
        }
    }
}

/// Whether this is no answer but the end of the connection.
pub(super) fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// The error at the bottom of a failed connection.
pub(super) fn root_cause<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_coordinators_must_be_gone_as_of_the_oldest_sign() {
        let (sender, mut events) = mpsc::channel(8);
        let (urls, known) = known(&["http://a:1", "http://b:1"]);
        let mut signs = Signs::new(urls, known, sender);
        let mut found = Vec::new();
        for (current, gone) in
            [(0, Some(5)), (1, None), (1, Some(9)), (0, None), (1, Some(11)), (0, Some(12))]
        {
            signs.current = current;
            signs.note(gone.map(Millis)).await;
            found.push(match events.try_recv() {
                Ok(Event::CoordinatorGone { at }) => Some(at.0),
                _ => None,
            });
        }
        assert_eq!(found, [None, None, Some(5), None, None, Some(11)]);
    }

    fn known(urls: &[&str]) -> (Vec<String>, Known) {
        let dir = tempfile::tempdir().unwrap();
        let known = Known::load(dir.path().to_owned(), "boot".to_owned());
        (urls.iter().copied().map(str::to_owned).collect(), known)
    }

    #[tokio::test]
    async fn a_port_without_a_listener_refuses_and_one_with_a_silent_one_does_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let endpoint = Endpoint::from_shared(url.clone()).unwrap();
        let (urls, known) = known(&[&url]);
        let (sender, mut events) = mpsc::channel(8);
        let mut signs = Signs::new(urls, known, sender);
        signs.lease = Millis(800);
        assert_eq!(signs.ask_anew(&endpoint).await, Answer::Unreachable, "something may stand between");
        let joined = |accepted_at: &str| v1::JoinResponse {
            accepted_at: accepted_at.to_owned(),
            boot_id: "boot".to_owned(),
            ..v1::JoinResponse::default()
        };
        let reached = Reached { peer: Some(address), refused: Vec::new() };
        signs.joined(&reached, &joined(&address.to_string())).await;
        assert_eq!(signs.ask_anew(&endpoint).await, Answer::Silence);
        drop(listener);
        assert_eq!(signs.ask_anew(&endpoint).await, Answer::Unreachable);
        let (_, refused) = connect(&endpoint).await;
        signs.refused(Millis(7), &refused).await;
        assert!(matches!(events.try_recv(), Ok(Event::CoordinatorGone { at: Millis(7) })));
        signs.joined(&reached, &joined("10.0.0.1:7070")).await;
        signs.refused(Millis(9), &refused).await;
        assert!(events.try_recv().is_err(), "a tunnel's end refuses for its own reasons");
    }
}
