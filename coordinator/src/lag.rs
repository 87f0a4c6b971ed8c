//! Whether this coordinator answers as soon as its nodes expect: it asks itself as they do when they doubt it, on a
//! connection made for that.
//!
//! A node whose ranks are about to lose their lease, and to which nothing comes on a new connection for a twelfth of it,
//! takes the coordinator for one that hangs, and trusts that no lease ends before another whole one has passed. A process
//! that was paused knows that it was, and sees to it (`driver.rs`). One that has more to do than it can, as when ten thousand
//! nodes come back at once, runs all the time; and that it has not yet read what nodes sent is not their fault.

use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tracing::{debug, warn};

/// An answer is late after this part of the lease: half of a node's patience, for a node has a longer way, and may have to
/// agree on keys.
const LATE_PART: u32 = 24;

/// Asks by way of the Unix socket, and calls `extend` whenever an answer is late and as long as it is. Never ends.
pub(crate) async fn watch<F: Future<Output = ()>>(socket: &Path, lease: Duration, extend: impl Fn() -> F) {
    let late = lease / LATE_PART;
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()));
    let mut was_late = false;
    loop {
        sleep(late).await;
        let Ok(endpoint) = &endpoint else { continue };
        let asked = Instant::now();
        let mut answer = std::pin::pin!(timeout(lease, ask(endpoint)));
        let mut is_late = false;
        loop {
            let answered = timeout(late, answer.as_mut()).await;
            // The answer may have come while this task had to wait for its turn, as that of others do.
            if answered.is_err() || asked.elapsed() > late {
                if !was_late {
                    let waited_ms = asked.elapsed().as_millis();
                    warn!(waited_ms, "the coordinator is slow to answer; leases are extended while it is");
                }
                (is_late, was_late) = (true, true);
                extend().await;
            }
            if let Ok(answered) = answered {
                if let Ok(Err(error)) = answered {
                    debug!(%error, "the coordinator could not ask itself whether it answers");
                }
                break;
            }
        }
        was_late = is_late;
    }
}

/// Anything that comes back is an answer; an error is that there was no connection.
async fn ask(endpoint: &Endpoint) -> Result<(), tonic::transport::Error> {
    let mut client = HealthClient::new(endpoint.connect().await?);
    client.check(HealthCheckRequest::default()).await.ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::UnixListener;
    use tonic::transport::Server;

    use super::*;

    const LEASE: Duration = Duration::from_millis(2400);

    /// How often leases are extended within a lease.
    async fn extended(socket: &Path) -> usize {
        let extended = AtomicUsize::new(0);
        let watched = watch(socket, LEASE, || async {
            extended.fetch_add(1, Ordering::Relaxed);
        });
        timeout(LEASE / 2, watched).await.ok();
        extended.into_inner()
    }

    #[tokio::test]
    async fn leases_are_extended_while_no_answer_comes() {
        let dir = tempfile::tempdir().unwrap();
        let [nobody, silent, well] = ["nobody", "silent", "well"].map(|name| dir.path().join(name));
        let _silent = UnixListener::bind(&silent).unwrap();
        let listener = UnixListener::bind(&well).unwrap();
        let (_, health) = tonic_health::server::health_reporter();
        let server = Server::builder().add_service(health);
        tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener)));
        assert_eq!(extended(&nobody).await, 0, "that there is no socket says nothing");
        // Once each twenty-fourth, while it waits for the same answer.
        assert!(extended(&silent).await >= 5);
        assert!(extended(&well).await <= 2, "a busy machine may be late once");
    }
}
