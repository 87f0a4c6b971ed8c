//! WorkerService: registration, and the one stream of each node.

use std::sync::Arc;
use std::time::Duration;

use muster_core::health::Finding;
use muster_core::types::{Incarnation, NodeName};
use muster_core::{Input, Inventory, Join};
use muster_monitor::canonical;
use muster_proto::convert::{self, FieldError, field_error};
use muster_proto::v1::{self, session_request::Message, worker_service_server::WorkerService};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{Api, Stream, caller};
use crate::access::{Identity, denied};
use crate::driver::{Handle, Hello};
use crate::intake::Inlet;
use crate::links::{LINK_QUEUE_MAX, Link};
use crate::office::Reign;

/// Longest identity of a boot or a directory.
const TEXT_BYTES_MAX: usize = 1024;
/// Gangs a node reports in Hello.
const GANGS_MAX: usize = 1024;

/// Longest reason of a daemon that ends.
const REASON_CHARS_MAX: usize = 256;

pub(crate) fn reason(leaving: &v1::Leaving) -> String {
    leaving.reason.chars().take(REASON_CHARS_MAX).collect()
}

pub(super) fn invalid(error: FieldError) -> Status {
    convert::invalid_argument(&[error])
}

#[tonic::async_trait]
impl WorkerService for Api {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let identity = caller(&request)?;
        let accepted_at = request.local_addr().map(canonical).map(|at| at.to_string()).unwrap_or_default();
        let join = checked_join(request.into_inner()).map_err(invalid)?;
        let (name, address) = (join.name.clone(), join.address);
        identity.check_node(&name)?;
        let turn = self.arrival().await?;
        let reign = self.office.reign()?;
        reign.driver.join(join).await?;
        drop(turn);
        info!(node = %name, %address, "node joined");
        Ok(Response::new(v1::JoinResponse {
            lease: Some(convert::duration_to_wire_std(self.lease)),
            heartbeat_interval: Some(convert::duration_to_wire_std(self.heartbeat)),
            accepted_at,
            boot_id: self.office.boot_id().to_owned(),
            term: reign.term,
            cluster_id: reign.cluster_id.to_string(),
            coordinators: reign.coordinators,
        }))
    }

    async fn issue_certificate(
        &self,
        request: Request<v1::IssueCertificateRequest>,
    ) -> Result<Response<v1::IssueCertificateResponse>, Status> {
        let identity = caller(&request)?;
        let v1::IssueCertificateRequest { node_name, signing_request } = request.into_inner();
        let node = NodeName::new(node_name).map_err(|why| invalid(field_error("node_name", why)))?;
        let authority = self.authority()?.clone();
        let life = authority.life;
        let prepared = tokio::task::spawn_blocking(move || authority.prepare(&signing_request));
        let signing =
            prepared.await.map_err(|error| Status::internal(format!("failed to sign: {error}")))??;
        let driver = self.driver()?;
        let now = driver.clock().now();
        // A certificate tells the second in which it was issued, and must be told from those that were revoked.
        let barred = driver.tokens().barred_at(&node);
        driver.confirm()?;
        if barred.is_some_and(|at| now.0 / 1000 <= at.0 / 1000) {
            let message = format!("node {node} was shut out just now; try again in a second");
            return Err(convert::unavailable("JUST_SHUT_OUT", message, Duration::from_secs(1)));
        }
        match &identity {
            Identity::Bearer(token) => {
                if let Some(bound) = token.node.as_ref().filter(|_| !token.is_for(&node)) {
                    return Err(denied(format!(
                        "this join token is for node {bound}, and not for node {node}; start the daemon \
                         with --name {bound}, or make a token with `muster token create --role node \
                         --node {node}`"
                    )));
                }
                let spent = Input::SpendToken { name: token.name.clone(), hash: token.hash.clone() };
                self.token(spent).await?;
            }
            Identity::Local(_) | Identity::Node(_) => identity.check_node(&node)?,
        }
        let issued = signing.sign(&node, now, life)?;
        info!(%node, by = %identity, "a certificate was issued");
        Ok(Response::new(v1::IssueCertificateResponse {
            certificate: issued.certificate,
            authority: issued.authority,
            lifetime: Some(convert::duration_to_wire_std(life)),
        }))
    }

    type SessionStream = Stream<v1::SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let identity = caller(&request)?;
        let mut incoming = request.into_inner();
        // A stream that opens and then says nothing is not held open.
        let first = tokio::time::timeout(self.lease, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello came within a lease"))??;
        let Some(Message::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(invalid(field_error("message", "of a session must be hello first")));
        };
        let resends_points = hello.resends_points;
        let hello = checked_hello(hello).map_err(invalid)?;
        let node = hello.node.clone();
        identity.check_node(&node)?;
        let (sender, receiver) = mpsc::channel(LINK_QUEUE_MAX);
        let turn = self.arrival().await?;
        let reign = self.office.reign()?;
        let link = reign.driver.open_session(hello, sender).await?;
        drop(turn);
        let (inlet, batches) = self.intake.open(resends_points);
        // It ends when the session has, and everything that the session brought is written.
        tokio::spawn(self.clone().keep_points(reign.driver.clone(), node.clone(), link.clone(), batches));
        tokio::spawn(self.clone().listen(reign, node, link, incoming, identity, inlet));
        Ok(Response::new(Stream::new(receiver)))
    }
}

impl Api {
    /// Reads a session until it ends, for whatever reason, and says so to the core.
    async fn listen(
        self,
        reign: Reign,
        node: NodeName,
        link: Arc<Link>,
        mut incoming: Streaming<v1::SessionRequest>,
        identity: Identity,
        mut inlet: Inlet,
    ) {
        let session = link.session;
        let clock = reign.driver.clock();
        let expired = async {
            match &identity {
                Identity::Node(own) => {
                    let left = own.expires.since(clock.now());
                    tokio::time::sleep(Duration::from_millis(left.0)).await;
                }
                Identity::Local(_) | Identity::Bearer(_) => std::future::pending().await,
            }
        };
        tokio::pin!(expired);
        let why = loop {
            let next = tokio::select! {
                next = incoming.next() => next,
                () = &mut expired => break "the node's certificate has expired".to_owned(),
                () = reign.over.cancelled() => break "the coordinator stops leading".to_owned(),
            };
            let message = match next {
                Some(Ok(message)) => message.message,
                Some(Err(status)) => break status.message().to_owned(),
                None => break "the node closed it".to_owned(),
            };
            let goodbye = matches!(message, Some(Message::Goodbye(_)));
            if let Err(status) = self.hear(&reign.driver, &node, &link, &mut inlet, message).await {
                warn!(%node, %session, error = status.message(), "session refused");
                let message = status.message().to_owned();
                link.close(status);
                break message;
            }
            if goodbye {
                break "goodbye".to_owned();
            }
        };
        info!(%node, %session, %why, "node disconnected");
        // Told first: a session that cannot be found has no heartbeat that the driver does not
        // know.
        reign.driver.disconnected(&node, &link).await.ok();
        reign.driver.links().remove(&node, session);
        link.close(Status::aborted(why));
    }

    async fn hear(
        &self,
        driver: &Handle,
        node: &NodeName,
        link: &Link,
        inlet: &mut Inlet,
        message: Option<Message>,
    ) -> Result<(), Status> {
        let (name, session) = (node.clone(), link.session);
        match message {
            Some(Message::Heartbeat(heartbeat)) => {
                driver.heartbeat(link, heartbeat.seq)?;
            }
            Some(Message::Gang(report)) => {
                link.pulse.beat(driver.clock().now());
                let report = Box::new(convert::gang_report_from_wire(report).map_err(invalid)?);
                driver.tell(Input::Report { node: name, session, report }).await?;
            }
            Some(Message::Points(batch)) => self.take_points(driver, link, inlet, batch).await?,
            Some(Message::Log(data)) => {
                let kept = link.route_log(data);
                if !kept {
                    self.monitor.too_slow("logs");
                }
            }
            Some(Message::Goodbye(goodbye)) => {
                let reason: String = goodbye.reason.chars().take(REASON_CHARS_MAX).collect();
                info!(%node, %session, %reason, "node says goodbye");
                driver.tell(Input::Goodbye { node: name, session }).await?;
            }
            Some(Message::Leaving(leaving)) => {
                let reason = reason(&leaving);
                driver.tell(Input::Leaving { node: name, session, reason }).await?;
            }
            Some(Message::Health(health)) => {
                let (findings, inventory) = checked_health(health).map_err(invalid)?;
                driver.tell(Input::Health { node: name, session, findings, inventory }).await?;
            }
            Some(Message::Hello(_)) => {
                return Err(invalid(field_error("message", "hello comes once, at the start")));
            }
            // A message of a newer version that this one does not know.
            None => {}
        }
        Ok(())
    }
}

pub(crate) fn checked_hello(wire: v1::Hello) -> Result<Hello, FieldError> {
    if wire.gangs.len() > GANGS_MAX {
        return Err(field_error("hello.gangs", format!("holds more than {GANGS_MAX} gangs")));
    }
    Ok(Hello {
        node: NodeName::new(wire.node_name).map_err(|why| field_error("hello.node_name", why))?,
        incarnation: Incarnation::new(wire.incarnation)
            .map_err(|why| field_error("hello.incarnation", why))?,
        gangs: wire.gangs.into_iter().map(convert::gang_report_from_wire).collect::<Result<_, _>>()?,
        leaving: wire.leaving.as_ref().map(reason),
        number: wire.number,
    })
}

/// What a node has found, and what it has now if it says so.
pub(crate) fn checked_health(
    wire: v1::NodeHealth,
) -> Result<(Vec<Finding>, Option<Box<Inventory>>), FieldError> {
    let findings = convert::findings_from_wire(wire.findings)?;
    let inventory = wire.inventory.map(convert::inventory_from_wire).transpose()?;
    Ok((findings, inventory.map(Box::new)))
}

pub(crate) fn checked_join(wire: v1::JoinRequest) -> Result<Join, FieldError> {
    for (field, text) in [("boot_id", &wire.boot_id), ("data_id", &wire.data_id)] {
        if text.len() > TEXT_BYTES_MAX {
            return Err(field_error(
                field,
                format!("has {} bytes; at most {TEXT_BYTES_MAX} fit", text.len()),
            ));
        }
    }
    Ok(Join {
        name: NodeName::new(wire.node_name).map_err(|why| field_error("node_name", why))?,
        address: (wire.address.parse())
            .map_err(|_| field_error("address", format!("{:?} is not an IP address", wire.address)))?,
        incarnation: Incarnation::new(wire.incarnation).map_err(|why| field_error("incarnation", why))?,
        boot_id: wire.boot_id,
        data_id: wire.data_id,
        inventory: convert::inventory_from_wire(wire.inventory.unwrap_or_default())?,
    })
}
