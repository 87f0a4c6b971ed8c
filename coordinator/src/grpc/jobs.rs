//! JobService.

use std::sync::Arc;

use muster_core::types::{Generation, Owner, RequestId};
use muster_core::{Caller, Input, Job, Node, Plan, Reply, solve};
use muster_proto::convert::{self, field_error};
use muster_proto::v1::{self, job_service_server::JobService};
use tonic::{Request, Response, Status};

use super::{Api, Followed, caller, unexpected_reply};
use crate::audit::subject as audit;
use crate::driver::RequestError;
use crate::metrics::Latest;
use crate::view::{self, Sight};

/// Jobs on a page if the caller does not say.
const PAGE_DEFAULT: u32 = 100;
/// Most jobs on a page: a page of the largest specs would not fit a message, and usual ones do easily.
const PAGE_MAX: u32 = 1000;
/// Bytes of one response, below the 4 MiB that gRPC clients take; a page ends early rather than exceed it.
pub(super) const PAGE_BYTES_MAX: usize = 3 << 20;
/// Records that are looked at and shown between two turns of others: a page is cut while it is built.
pub(super) const SHOWN_AT_ONCE: usize = 128;
/// Longest reason of a cancel or cordon.
pub(super) const REASON_BYTES_MAX: usize = 1024;

impl Api {
    async fn job_with_metrics(&self, job: &Job, by: &Caller) -> v1::Job {
        let latest = self.metrics.series(&job.id).await.latest(job.generation);
        view::job(job, latest, self.sight(job, by))
    }

    /// Returns how much of a job somebody sees.
    pub(super) fn sight(&self, job: &Job, by: &Caller) -> Sight {
        if by.may_see(job.owner.as_ref(), self.open_jobs) { Sight::Whole } else { Sight::Redacted }
    }
}

pub(crate) fn checked_submit(
    wire: v1::SubmitJobRequest,
) -> Result<(Option<RequestId>, Box<muster_core::types::JobSpec>), Status> {
    let spec = checked_spec(wire.spec)?;
    let request_id = match wire.request_id {
        empty if empty.is_empty() => None,
        id => Some(
            RequestId::new(id).map_err(|why| convert::invalid_argument(&[field_error("request_id", why)]))?,
        ),
    };
    Ok((request_id, spec))
}

/// The order before which the page begins, and its size.
pub(crate) fn checked_page(request: &v1::ListJobsRequest) -> Result<(u64, usize), Status> {
    let before = match request.page_token.as_str() {
        "" => u64::MAX,
        token => token.parse().map_err(|_| {
            let why = "is not a token that ListJobs returned; leave it empty for the first page";
            convert::invalid_argument(&[field_error("page_token", why)])
        })?,
    };
    let size = if request.page_size == 0 { PAGE_DEFAULT } else { request.page_size.min(PAGE_MAX) };
    Ok((before, size as usize))
}

/// Which jobs a list has.
pub(crate) struct Wanted {
    /// Empty: in any.
    states: Vec<v1::JobState>,
    /// None: anybody's.
    owner: Option<Owner>,
}

impl Wanted {
    pub fn checked(request: &v1::ListJobsRequest, by: &Caller) -> Result<Self, Status> {
        let wrong = |field, why: String| convert::invalid_argument(&[field_error(field, why)]);
        let owner = match (request.mine, request.owner.as_str()) {
            (false, "") => None,
            (false, name) => Some(Owner::new(name).map_err(|why| wrong("owner", why))?),
            (true, "") => Some(by.name.clone().ok_or_else(|| {
                wrong("mine", "is asked for, and nobody knows here who calls; set owner".to_owned())
            })?),
            (true, _) => return Err(wrong("mine", "is set, and so is owner; set one of them".to_owned())),
        };
        Ok(Self { states: request.states().collect(), owner })
    }

    fn is(&self, job: &Job) -> bool {
        let is_in = self.states.is_empty() || self.states.contains(&view::job_state(job.state));
        is_in && (self.owner.is_none() || self.owner == job.owner)
    }
}

fn checked_spec(spec: Option<v1::JobSpec>) -> Result<Box<muster_core::types::JobSpec>, Status> {
    let spec = spec.ok_or_else(|| convert::invalid_argument(&[field_error("spec", "is missing")]))?;
    convert::spec_from_wire(spec).map(Box::new).map_err(|errors| {
        let errors: Vec<_> =
            errors.iter().map(|e| field_error(&format!("spec.{}", e.field), &*e.description)).collect();
        convert::invalid_argument(&errors)
    })
}

pub(crate) fn checked_reason(reason: String) -> Result<String, Status> {
    if reason.len() > REASON_BYTES_MAX {
        let why = format!("has {} bytes; at most {REASON_BYTES_MAX} fit", reason.len());
        return Err(convert::invalid_argument(&[field_error("reason", why)]));
    }
    Ok(reason)
}

fn job_reply(reply: Reply) -> Result<Box<Job>, Status> {
    match reply {
        Reply::Job(job) => Ok(job),
        Reply::Node(_) | Reply::Session(_) | Reply::Token(_) | Reply::Barred(_) => Err(unexpected_reply()),
    }
}

#[tonic::async_trait]
impl JobService for Api {
    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Result<Response<v1::SubmitJobResponse>, Status> {
        let (identity, made) = (caller(&request)?, audit::tell(&request));
        let (request_id, mut spec) = checked_submit(request.into_inner())?;
        spec.run_as = identity.runs_as(spec.run_as.take())?;
        let by = identity.caller();
        let submit = Input::Submit { by: by.clone(), request_id, spec };
        let job = job_reply(self.driver()?.request(submit).await?)?;
        made(job.id.as_str());
        let job = Some(self.job_with_metrics(&job, &by).await);
        Ok(Response::new(v1::SubmitJobResponse { job }))
    }

    async fn plan_job(
        &self,
        request: Request<v1::PlanJobRequest>,
    ) -> Result<Response<v1::PlanJobResponse>, Status> {
        let spec = checked_spec(request.into_inner().spec)?;
        let nodes: Vec<Arc<Node>> =
            self.driver()?.read(|state| state.nodes_after(None).cloned().collect())?;
        // Ten thousand nodes are looked at for milliseconds.
        let plan = tokio::task::spawn_blocking(move || solve(&spec, nodes.iter().map(|node| &**node)));
        let plan = plan.await.map_err(|error| Status::internal(format!("failed to plan: {error}")))?;
        let (placement, reason) = match plan {
            Plan::Place(nodes) => (nodes.iter().map(convert::placement_to_wire).collect(), String::new()),
            Plan::Wait(reason) => (Vec::new(), reason),
        };
        Ok(Response::new(v1::PlanJobResponse { placement, reason }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::GetJobResponse>, Status> {
        let by = caller(&request)?.caller();
        let job = self.find_job(&request.into_inner().job_id)?;
        let job = Some(self.job_with_metrics(&job, &by).await);
        Ok(Response::new(v1::GetJobResponse { job }))
    }

    async fn get_job_environment(
        &self,
        request: Request<v1::GetJobEnvironmentRequest>,
    ) -> Result<Response<v1::GetJobEnvironmentResponse>, Status> {
        let by = caller(&request)?.caller();
        let job = self.find_job(&request.into_inner().job_id)?;
        Ok(Response::new(view::environments(&job, self.sight(&job, &by))))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let by = caller(&request)?.caller();
        let request = request.into_inner();
        let (before, size) = checked_page(&request)?;
        let wanted = Wanted::checked(&request, &by)?;
        self.fill_page(before, size, &wanted, &by).await.map(Response::new)
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        let by = caller(&request)?.caller();
        let v1::CancelJobRequest { job_id, reason, stop_signal } = request.into_inner();
        let reason = checked_reason(reason)?;
        let signal = convert::optional_stop_signal("stop_signal", &stop_signal);
        let signal = signal.map_err(|error| convert::invalid_argument(&[error]))?;
        let cancel = Input::Cancel { by: by.clone(), job: job_id, reason, signal };
        let job = job_reply(self.driver()?.request(cancel).await?)?;
        let job = Some(self.job_with_metrics(&job, &by).await);
        Ok(Response::new(v1::CancelJobResponse { job }))
    }

    type WatchJobStream = Followed<v1::WatchJobResponse>;

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let by = caller(&request)?.caller();
        self.clone().stream_job(&request.into_inner().job_id, &by).map(Response::new)
    }

    type StreamMetricsStream = Followed<v1::StreamMetricsResponse>;

    async fn stream_metrics(
        &self,
        request: Request<v1::StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        self.clone().stream_points(request.into_inner()).await.map(Response::new)
    }

    type StreamLogsStream = Followed<v1::StreamLogsResponse>;

    async fn stream_logs(
        &self,
        request: Request<v1::StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let by = caller(&request)?.caller();
        self.clone().stream_output(request.into_inner(), &by).map(Response::new)
    }
}

impl Api {
    pub(super) fn find_job(&self, id: &str) -> Result<Arc<Job>, Status> {
        let found = self.driver()?.read(|state| state.job(id).cloned())?;
        Ok(found.map_err(RequestError::from)?)
    }

    /// Adds the jobs before the one of order `before` to a page, until it is full.
    async fn fill_page(
        &self,
        mut before: u64,
        size: usize,
        wanted: &Wanted,
        by: &Caller,
    ) -> Result<v1::ListJobsResponse, Status> {
        let driver = self.driver()?;
        let (mut page, mut bytes, mut last): (Vec<v1::Job>, usize, u64) = (Vec::new(), 0, before);
        loop {
            let some = driver.read(|state| {
                state.jobs_before(before).take(SHOWN_AT_ONCE).cloned().collect::<Vec<Arc<Job>>>()
            })?;
            let Some(oldest) = some.last() else { break };
            before = oldest.order;
            let found: Vec<Arc<Job>> = some.into_iter().filter(|job| wanted.is(job)).collect();
            let latest = self.latest(&found).await;
            for (job, latest) in found.into_iter().zip(latest) {
                let shown = view::job(&job, latest, self.sight(&job, by));
                bytes += prost::Message::encoded_len(&shown);
                if page.len() >= size || (bytes > PAGE_BYTES_MAX && !page.is_empty()) {
                    let next_page_token = last.to_string();
                    return Ok(v1::ListJobsResponse { jobs: page, next_page_token });
                }
                page.push(shown);
                last = job.order;
            }
            // A filter may pass over a hundred thousand jobs, and others have their turn meanwhile.
            tokio::task::yield_now().await;
        }
        Ok(v1::ListJobsResponse { jobs: page, next_page_token: String::new() })
    }

    /// Returns the newest values of some jobs. One that has never started has none, and costs no look at a file.
    async fn latest(&self, jobs: &[Arc<Job>]) -> Vec<Latest> {
        let started = |job: &&Arc<Job>| job.generation > Generation(0);
        let asked: Vec<_> = jobs.iter().filter(started).map(|job| (job.id.clone(), job.generation)).collect();
        let found = if asked.is_empty() { Vec::new() } else { self.metrics.latest(asked).await };
        let mut found = found.into_iter();
        let one = |job| if started(&job) { found.next() } else { None };
        jobs.iter().map(one).map(Option::unwrap_or_default).collect()
    }
}
