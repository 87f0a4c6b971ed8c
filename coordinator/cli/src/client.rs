//! Reaching a coordinator.

use std::time::Duration;

use muster_proto::v1::cluster_service_client::ClusterServiceClient;
use muster_proto::v1::job_service_client::JobServiceClient;
use muster_proto::v1::node_service_client::NodeServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::args::Global;
use crate::exit::Failure;

/// Time to connect to one coordinator.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Pause before a call that found nobody is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How often it is tried: a coordinator that is restarted is back within it.
const RETRIES_MAX: u32 = 60;

/// A connection to one of the coordinators.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    channel: Channel,
    url: String,
}

impl Client {
    /// Connects to the first coordinator of the list that answers.
    pub async fn connect(global: &Global) -> Result<Self, Failure> {
        let mut refusals = Vec::new();
        for url in &global.coordinator {
            let endpoint = Endpoint::from_shared(url.clone())
                .ok()
                .filter(|endpoint| {
                    let (scheme, host) = (endpoint.uri().scheme_str(), endpoint.uri().host());
                    url.starts_with("unix:") || (scheme == Some("http") && host.is_some())
                })
                .ok_or_else(|| Failure::Usage(format!("{url:?} is no URL such as http://10.0.0.1:7070")))?;
            match endpoint.connect_timeout(CONNECT_MAX).connect().await {
                Ok(channel) => return Ok(Self { channel, url: url.clone() }),
                Err(error) => refusals.push(format!("{url}: {}", root_cause(&error))),
            }
        }
        Err(Failure::Unreachable(format!(
            "cannot reach a coordinator at {}; start one with `muster coordinator`, or name another with \
             --coordinator or MUSTER_COORDINATOR",
            refusals.join(", nor at ")
        )))
    }

    /// Where it is connected.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The jobs.
    pub fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone())
    }

    /// The nodes.
    pub fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone())
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone())
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

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
