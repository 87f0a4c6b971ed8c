//! `muster submit` and `muster cancel`.

mod procs;

use muster_proto::v1;

use crate::args::{CancelArgs, Global, Output, SubmitArgs};
use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::output::{lines, out, say};
use crate::run::args::ProcsPerNode;
use crate::{follow, json, show, spec};

/// `muster submit`.
pub(crate) async fn run(args: SubmitArgs, global: &Global) -> Result<(), Failure> {
    let request_id = args.request_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let (stay, dry_run) = (args.follow, args.dry_run);
    let procs = args.nproc_per_node;
    let mut spec = spec::from_args(args)?;
    let client = Client::connect(global).await?;
    if let Some(kind @ (ProcsPerNode::Auto | ProcsPerNode::Gpu | ProcsPerNode::Cpu)) = procs {
        procs::of_nodes(&client, kind, &mut spec).await?;
    }
    if dry_run {
        return plan(&client, spec, global).await;
    }
    let job = submit(&client, request_id, spec).await?;
    match (global.output, stay) {
        (Output::Json, false) => json::print("Job", &job)?,
        (Output::Text, false) => out!("{}", job.id),
        (_, true) => {
            say!("submitted {} as job {}", job.name, job.id);
            let watched = follow::Options {
                logs: true,
                logs_on_stderr: global.output == Output::Json,
                ..follow::Options::default()
            };
            let (job, _) = follow::to_the_end(&client, &job.id, watched).await?;
            if global.output == Output::Json {
                json::print("Job", &job)?;
            }
            return follow::verdict(&job);
        }
    }
    Ok(())
}

/// Submits once, however often the call has to be made: the request id makes a repetition harmless.
pub(crate) async fn submit(
    client: &Client,
    request_id: String,
    spec: v1::JobSpec,
) -> Result<v1::Job, Failure> {
    let request = v1::SubmitJobRequest { request_id, spec: Some(spec) };
    let (mut retries, mut said) = (Retries::default(), false);
    loop {
        match client.jobs().submit_job(request.clone()).await {
            Ok(response) => {
                let job = response.into_inner().job;
                return job.ok_or_else(|| anyhow::anyhow!("the coordinator answered without a job").into());
            }
            Err(status) => {
                let why = status.message().to_owned();
                retries.pause(status).await?;
                if !said {
                    said = true;
                    say!("{why}; trying again");
                }
            }
        }
    }
}

async fn plan(client: &Client, spec: v1::JobSpec, global: &Global) -> Result<(), Failure> {
    let plan = client.jobs().plan_job(v1::PlanJobRequest { spec: Some(spec) }).await?.into_inner();
    if global.output == Output::Json {
        json::print("PlanJobResponse", &plan)?;
    } else if plan.placement.is_empty() {
        out!("the job would wait: {}", plan.reason.trim_start_matches("waiting: "));
    } else {
        lines(show::placement(&plan.placement))?;
    }
    Ok(())
}

/// `muster cancel`.
pub(crate) async fn cancel(args: CancelArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let request = v1::CancelJobRequest { job_id: args.job.job_id, reason: args.reason, ..Default::default() };
    let job = client.jobs().cancel_job(request).await?.into_inner().job.unwrap_or_default();
    match global.output {
        Output::Json => json::print("Job", &job)?,
        Output::Text => out!("{} is {}: {}", job.id, show::job_state(&job), job.reason),
    }
    Ok(())
}
