//! `muster healthcheck`: one question to the health service of a coordinator, for probes that run a program.

use anyhow::anyhow;
use muster_worker::trust::{self, Trust};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::args::{Global, HealthcheckArgs};
use crate::exit::Failure;
use crate::leader::endpoint;

/// Succeeds once one of the coordinators says that it serves. Every other end has exit code 1: container runtimes know no other.
pub(crate) async fn run(args: &HealthcheckArgs, global: &Global) -> Result<(), Failure> {
    let trust = global.trust().map_err(|failure| anyhow!(failure.why()))?;
    let mut refusals = Vec::new();
    for url in &global.urls().map_err(|failure| anyhow!(failure.why()))? {
        match tokio::time::timeout(args.timeout.0, ask(url, &trust, &args.service)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => refusals.push(format!("{url}: {why:#}")),
            Err(_) => refusals.push(format!("{url}: no answer within {} s", args.timeout.0.as_secs_f64())),
        }
    }
    Err(anyhow!(refusals.join("; ")).into())
}

async fn ask(url: &str, trust: &Trust, service: &str) -> anyhow::Result<()> {
    let endpoint = endpoint(url, trust).map_err(|failure| anyhow!(failure.why()))?;
    let channel =
        endpoint.connect().await.map_err(|error| anyhow!("cannot be reached: {}", trust::why(&error)))?;
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(channel).check(request).await.map_err(|status| {
        anyhow!(
            "{}",
            if status.message().is_empty() { status.code().description() } else { status.message() }
        )
    })?;
    let status = answer.into_inner().status();
    if status == ServingStatus::Serving {
        return Ok(());
    }
    Err(anyhow!("it is {}", status.as_str_name()))
}
