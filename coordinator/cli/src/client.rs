//! Reaching a coordinator.

use std::time::Duration;

use muster_proto::v1::cluster_service_client::ClusterServiceClient;
use muster_proto::v1::job_service_client::JobServiceClient;
use muster_proto::v1::node_service_client::NodeServiceClient;
use muster_proto::v1::token_service_client::TokenServiceClient;
use tonic::{Code, Status};
use tonic_health::pb::health_client::HealthClient;

use crate::args::Global;
use crate::exit::Failure;
use crate::leader::Leading;

/// Pause before a call that found nobody is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How often it is tried: a coordinator that is restarted is back within it.
const RETRIES_MAX: u32 = 60;

/// A connection to the coordinator that leads.
#[derive(Clone, Debug)]
pub(crate) struct Client(Leading);

impl Client {
    /// Connects to the first coordinator of the list that answers; calls go on to the one that leads.
    pub async fn connect(global: &Global) -> Result<Self, Failure> {
        Ok(Self(Leading::connect(&global.urls()?, &global.trust()?, global.token()?).await?))
    }

    /// Where it is connected.
    pub fn url(&self) -> String {
        self.0.url()
    }

    /// The jobs.
    pub fn jobs(&self) -> JobServiceClient<Leading> {
        JobServiceClient::new(self.0.clone())
    }

    /// The nodes.
    pub fn nodes(&self) -> NodeServiceClient<Leading> {
        NodeServiceClient::new(self.0.clone())
    }

    /// The tokens.
    pub fn tokens(&self) -> TokenServiceClient<Leading> {
        TokenServiceClient::new(self.0.clone())
    }

    /// Whether it is well, which it says to everybody.
    pub fn health(&self) -> HealthClient<Leading> {
        HealthClient::new(self.0.clone())
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterServiceClient<Leading> {
        ClusterServiceClient::new(self.0.clone())
    }
}

/// Attempts at a call that must outlast a restart of the coordinator.
#[derive(Debug)]
pub(crate) struct Retries {
    tried: u32,
    max: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self { tried: 0, max: RETRIES_MAX }
    }
}

impl Retries {
    /// For so long, about.
    pub fn lasting(span: Duration) -> Self {
        Self { tried: 0, max: (span.as_millis() / RETRY_PAUSE.as_millis()) as u32 }
    }

    /// Something was heard: the next break is a new one.
    pub fn reset(&mut self) {
        self.tried = 0;
    }

    /// Pauses before the next attempt, or gives the error back if another would not help.
    pub async fn pause(&mut self, broken: Status) -> Result<(), Failure> {
        self.tried += 1;
        if !is_passing(&broken) || self.tried > self.max {
            return Err(broken.into());
        }
        tokio::time::sleep(RETRY_PAUSE).await;
        Ok(())
    }
}

/// Whether the same call may find somebody later. A broken connection shows as UNKNOWN or INTERNAL at times.
fn is_passing(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable => true,
        Code::Unknown | Code::Internal | Code::Cancelled => std::error::Error::source(status).is_some(),
        _ => false,
    }
}
