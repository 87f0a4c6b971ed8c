//! RendezvousService: the stream of each agent that Muster did not start.

use std::time::Duration;

use muster_core::agents::Said;
use muster_core::{Caller, Rights};
use muster_proto::convert;
use muster_proto::v1::{self, rendezvous_service_server::RendezvousService};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, Stream, caller};
use crate::access::Identity;
use crate::agents::{Joined, OUTBOX_MAX};

/// A stream that opens and then says nothing is not held open for longer.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

#[tonic::async_trait]
impl RendezvousService for Api {
    type JoinStream = Stream<v1::RendezvousServiceJoinResponse>;

    async fn join(
        &self,
        request: Request<Streaming<v1::RendezvousServiceJoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let by = agent(&caller(&request)?);
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(HELLO_WITHIN, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no hello came within {HELLO_WITHIN:?}")))??;
        let hello =
            convert::agent_first_from_wire(first).map_err(|error| convert::invalid_argument(&[error]))?;
        let (outbox, stream) = mpsc::channel(OUTBOX_MAX);
        let joined = self.office.reign()?.agents.join(hello, &by, outbox.clone()).await?;
        // Weak: the stream ends when its run lets go of it.
        tokio::spawn(listen(joined, incoming, outbox.downgrade()));
        Ok(Response::new(Stream::new(stream)))
    }
}

/// Returns whom a run belongs to that this caller begins, and what it may do with those of others: a node is trusted with
/// the ranks of anybody, and the agents on it may join any run.
pub(super) fn agent(identity: &Identity) -> Caller {
    match identity {
        Identity::Node(_) => Caller { rights: Rights::All, ..identity.caller() },
        Identity::Local(_) | Identity::Bearer(_) => identity.caller(),
    }
}

/// Passes on what an agent says, until its stream ends or its run is done with it.
async fn listen(
    joined: Joined,
    mut incoming: Streaming<v1::RendezvousServiceJoinRequest>,
    outbox: mpsc::WeakSender<Result<v1::RendezvousServiceJoinResponse, Status>>,
) {
    loop {
        let message = tokio::select! {
            message = incoming.message() => message,
            () = joined.over.cancelled() => break,
        };
        let said = match message {
            Ok(Some(message)) => convert::agent_said_from_wire(message),
            Ok(None) | Err(_) => break,
        };
        match said {
            Ok(None) => {}
            Ok(Some(said)) => {
                let last = matches!(said, Said::Leave(_));
                if !joined.say(said).await || last {
                    return;
                }
            }
            Err(error) => {
                if let Some(outbox) = outbox.upgrade() {
                    outbox.try_send(Err(convert::invalid_argument(&[error]))).ok();
                }
                break;
            }
        }
    }
    joined.say(Said::Gone).await;
}
