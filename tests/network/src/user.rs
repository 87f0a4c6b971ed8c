//! Somebody who submits jobs and waits for them, and repeats what was not answered.

use std::time::Duration;

use muster_proto::v1::{self, job_service_client::JobServiceClient};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Time for an answer, before the call is repeated on another connection.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Time between attempts, and between looks at a job.
const PAUSE: Duration = Duration::from_millis(500);
/// Restarts that no history spends: here a job may only end well.
const RESTARTS_MAX: u32 = 1_000;

/// A job.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Nodes it needs.
    pub min_nodes: u32,
    /// Nodes it takes.
    pub max_nodes: u32,
    /// How long its ranks work.
    pub work: Duration,
}

type Client = JobServiceClient<Channel>;

async fn connect(url: &str) -> Result<Client, Status> {
    let unavailable = |error: tonic::transport::Error| Status::unavailable(error.to_string());
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(unavailable)?;
    Ok(JobServiceClient::new(muster_worker::simulation::connect(&endpoint).await.map_err(unavailable)?))
}

/// Asks until there is an answer. Each attempt has a connection of its own, as each run of a command line has.
async fn ask<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
    url: &str,
    call: impl Fn(Client) -> F,
) -> Result<T, Status> {
    loop {
        let attempt = async { call(connect(url).await?).await };
        match tokio::time::timeout(ANSWER_MAX, attempt).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) if !is_passing(&status) => return Err(status),
            Ok(Err(_)) | Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded)
}

/// Submits each, waits until all have ended, and gives what the coordinator then has.
pub async fn submit_and_wait(url: &str, wanted: &[Wanted]) -> Result<Vec<v1::Job>, Status> {
    let mut accepted = Vec::new();
    for (index, wanted) in wanted.iter().enumerate() {
        let spec = v1::JobSpec {
            name: format!("job-{index}"),
            command: vec!["train".to_owned(), wanted.work.as_millis().to_string()],
            min_nodes: Some(wanted.min_nodes),
            max_nodes: wanted.max_nodes,
            procs_per_node: Some(1),
            max_restarts: Some(RESTARTS_MAX),
            ..v1::JobSpec::default()
        };
        let request = v1::SubmitJobRequest { request_id: format!("request-{index}"), spec: Some(spec) };
        let submit = |mut client: Client| {
            let request = request.clone();
            async move { client.submit_job(request).await }
        };
        let job = ask(url, submit).await?.job.ok_or_else(|| Status::internal("no job"))?;
        accepted.push(job.id);
    }
    for id in &accepted {
        let get = |mut client: Client| {
            let request = v1::GetJobRequest { job_id: id.clone() };
            async move { client.get_job(request).await }
        };
        while ask(url, get).await?.job.is_none_or(|job| job.finished.is_none()) {
            tokio::time::sleep(PAUSE).await;
        }
    }
    let list = |mut client: Client| async move { client.list_jobs(v1::ListJobsRequest::default()).await };
    let jobs = ask(url, list).await?.jobs;
    if jobs.len() != accepted.len() {
        return Err(Status::internal(format!("{} submissions made {} jobs", accepted.len(), jobs.len())));
    }
    Ok(jobs)
}
