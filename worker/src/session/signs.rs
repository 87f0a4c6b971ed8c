//! Whether there is a coordinator at all.
//!
//! A node that cannot renew its lease must stop its ranks, because a coordinator that hears nothing of it starts them
//! elsewhere. But if no coordinator runs, nobody does, and training should go on. What counts as proof: the
//! coordinator's machine refuses the connection (nothing listens there), or takes it and then nobody answers, on a
//! connection made for this attempt, while yet another one is taken at once (the process hangs; when it
//! goes on it sees that it was away, and extends every lease). A connection that cannot be made proves nothing, and a
//! refusal in words proves that somebody is there.

use std::io;
use std::time::Duration;

use muster_core::types::Millis;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::Endpoint;

use super::{CONNECT_MAX, Event};
use crate::clock::boot_now;

/// What the attempts so far say.
pub(super) struct Signs {
    /// The lease's length, once a coordinator has said it.
    pub lease: Millis,
    /// The coordinator that is being tried.
    pub current: usize,
    /// For each coordinator, when it was last found to be gone, unless something else was found later.
    gone: Vec<Option<Millis>>,
    events: mpsc::Sender<Event>,
}

impl Signs {
    pub fn new(coordinators: usize, events: mpsc::Sender<Event>) -> Self {
        Self { lease: Millis::from_secs(10), current: 0, gone: vec![None; coordinators], events }
    }

    /// The lease as a duration.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease.0)
    }

    /// How long a coordinator may be silent before that says something.
    pub fn patience(&self) -> Duration {
        (self.lease() / 8).min(CONNECT_MAX)
    }

    /// Waits for an answer on a connection that was made, and learns from it if none comes.
    pub async fn watch<T>(
        &mut self,
        endpoint: &Endpoint,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Result<T, Status>, Status> {
        let call = tokio::time::timeout(CONNECT_MAX, call);
        tokio::pin!(call);
        loop {
            let asked = boot_now();
            tokio::select! {
                answer = &mut call => {
                    return answer.map_err(|_| Status::deadline_exceeded("the coordinator does not answer"));
                }
                // It took the connection and says nothing.
                () = tokio::time::sleep(self.patience()) => {
                    let takes = takes_connections(endpoint, self.patience()).await;
                    self.note(takes.then_some(asked)).await;
                }
            }
        }
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

/// Whether the machine answered that nothing listens there.
pub(super) fn is_refused(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Whether a connection is made within this time.
async fn takes_connections(endpoint: &Endpoint, limit: Duration) -> bool {
    let uri = endpoint.uri();
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let connect = TcpStream::connect((host, uri.port_u16().unwrap_or(80)));
    matches!(tokio::time::timeout(limit, connect).await, Ok(Ok(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_coordinators_must_be_gone_as_of_the_oldest_sign() {
        let (sender, mut events) = mpsc::channel(8);
        let mut signs = Signs::new(2, sender);
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

    #[tokio::test]
    async fn a_port_without_a_listener_refuses_and_one_with_a_silent_one_does_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
        assert!(takes_connections(&endpoint, Duration::from_secs(1)).await);
        drop(listener);
        assert!(!takes_connections(&endpoint, Duration::from_secs(1)).await);
        let error = endpoint.connect().await.unwrap_err();
        assert!(is_refused(root_cause(&error)), "{error:?}");
    }
}
