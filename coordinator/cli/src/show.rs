//! Jobs for people, and as JSON.

use muster_proto::convert::millis_from_timestamp;
use muster_proto::v1;

use crate::args::{Global, JobArgs, JobsArgs, Output, ShowJobArgs};
use crate::client::Client;
use crate::exit::Failure;
use crate::json;
use crate::output::{lines, out, quoted, say, table};
use crate::units::show_span;

mod environment;
mod rendezvous;

/// Ended jobs listed without --all.
const ENDED_SHOWN: usize = 10;

/// A job's state as people write it: `running`.
pub(crate) fn job_state(job: &v1::Job) -> String {
    job.state().as_str_name().trim_start_matches("JOB_STATE_").to_lowercase()
}

/// Whether the job has ended.
pub(crate) fn is_terminal(job: &v1::Job) -> bool {
    matches!(job.state(), v1::JobState::Succeeded | v1::JobState::Failed | v1::JobState::Cancelled)
}

/// `muster jobs`.
pub(crate) async fn jobs(args: &JobsArgs, global: &Global) -> Result<(), Failure> {
    let states: Vec<i32> = args.states.iter().map(|state| parse_state(state)).collect::<Result<_, _>>()?;
    let client = Client::connect(global).await?;
    let (mut rows, mut ended, mut hidden) = (Vec::new(), 0, false);
    let mut page_token = String::new();
    loop {
        let request = v1::ListJobsRequest {
            page_size: 0,
            page_token,
            states: states.clone(),
            owner: args.owner.clone().unwrap_or_default(),
            mine: args.mine,
        };
        let page = client.jobs().list_jobs(request).await?.into_inner();
        for job in page.jobs {
            ended += usize::from(is_terminal(&job));
            if is_terminal(&job) && ended > ENDED_SHOWN && !args.all && states.is_empty() {
                hidden = true;
                continue;
            }
            if global.output == Output::Json {
                json::print("Job", &job)?;
            } else {
                rows.push(job_row(&job));
            }
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Output::Text {
        lines(table(&["ID", "NAME", "OWNER", "STATE", "RANKS", "STEP", "LOSS", "TIME", "REASON"], &rows))?;
        if hidden {
            say!("older jobs that have ended are listed with --all");
        }
    }
    Ok(())
}

fn parse_state(text: &str) -> Result<i32, Failure> {
    let name = format!("JOB_STATE_{}", text.to_uppercase());
    let state = v1::JobState::from_str_name(&name).filter(|state| *state != v1::JobState::Unspecified);
    state.map(i32::from).ok_or_else(|| {
        Failure::Usage(format!(
            "{text:?} is not a state; states are queued, starting, running, restarting, stopping, succeeded, failed and \
             cancelled"
        ))
    })
}

fn job_row(job: &v1::Job) -> Vec<String> {
    vec![
        job.id.clone(),
        job.name.clone(),
        if job.owner.is_empty() { "-".to_owned() } else { job.owner.clone() },
        job_state(job),
        job.world_size.filter(|ranks| *ranks > 0).map_or("-".to_owned(), |ranks| ranks.to_string()),
        job.latest_step.map_or("-".to_owned(), |step| step.to_string()),
        job.latest_loss.map_or("-".to_owned(), |loss| format!("{loss:.4}")),
        ran_for(job).unwrap_or_else(|| "-".to_owned()),
        job.reason.chars().take(80).collect(),
    ]
}

/// How long the job has run, or ran; only ended jobs tell without a clock of ours.
fn ran_for(job: &v1::Job) -> Option<String> {
    let (started, finished) = (job.started.as_ref()?, job.finished.as_ref()?);
    let millis = millis_from_timestamp(finished).since(millis_from_timestamp(started));
    Some(show_span(std::time::Duration::from_millis(millis.0)))
}

async fn get_job(client: &Client, args: &JobArgs) -> Result<v1::Job, Failure> {
    let request = v1::GetJobRequest { job_id: args.job_id.clone() };
    Ok(client.jobs().get_job(request).await?.into_inner().job.unwrap_or_default())
}

/// `muster job`.
pub(crate) async fn job(args: &ShowJobArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    if args.env {
        return environment::show(&client, &args.job, global).await;
    }
    let job = get_job(&client, &args.job).await?;
    if global.output == Output::Json {
        json::print("Job", &job)?;
        return Ok(());
    }
    let spec = job.spec.clone().unwrap_or_default();
    let restarts = format!("{} of {}", job.restarts_used.unwrap_or(0), spec.max_restarts.unwrap_or(0));
    let mut rows = vec![
        ("job", job.id.clone()),
        ("name", job.name.clone()),
        ("owner", if job.owner.is_empty() { "not known".to_owned() } else { job.owner.clone() }),
        ("state", job_state(&job)),
        ("reason", job.reason.clone()),
        ("command", spec.command.join(" ")),
        ("generation", job.generation.unwrap_or(0).to_string()),
        ("ranks", job.world_size.unwrap_or(0).to_string()),
        ("restarts", restarts),
    ];
    rows.extend((!spec.run_as.is_empty()).then(|| ("runs as", spec.run_as.clone())));
    rows.extend((!job.master.is_empty()).then(|| ("master", job.master.clone())));
    rows.extend(job.latest_step.map(|step| ("step", step.to_string())));
    rows.extend(job.latest_loss.map(|loss| ("loss", format!("{loss:.6}"))));
    let times = [("created", &job.created), ("started", &job.started), ("finished", &job.finished)];
    rows.extend(times.into_iter().filter_map(|(name, time)| Some((name, time.as_ref()?.to_string()))));
    rows.extend(ran_for(&job).map(|span| ("ran for", span)));
    for (name, value) in rows {
        out!("{name:<11} {value}");
    }
    if job.redacted {
        out!("");
        out!("{}", hidden(&job));
    }
    if !job.placement.is_empty() {
        out!("");
        lines(placement(&job.placement))?;
    }
    if let Some(stuck) = &job.rendezvous {
        out!("");
        lines(at_the_store(stuck, &job))?;
    }
    if let Some(exit) = &job.exit {
        out!("");
        lines(root_cause(exit))?;
    }
    // Of a job with one generation everything is said above.
    if job.past.len() > 1 || (!job.past.is_empty() && job.finished.is_none()) {
        out!("");
        lines(past(&job.past))?;
    }
    Ok(())
}

/// Returns why a part of a job is not shown.
fn hidden(job: &v1::Job) -> String {
    let owner = if job.owner.is_empty() { "" } else { &format!("{}, its owner, and ", job.owner) };
    format!("the command, the values of variables and the output are shown to {owner}operators alone")
}

/// Returns where the ranks are that do not get on at their store.
fn at_the_store(stuck: &v1::Rendezvous, job: &v1::Job) -> Vec<String> {
    let mut lines = rendezvous::lines(stuck, job.world_size());
    for (index, line) in lines.iter_mut().enumerate() {
        line.insert_str(0, if index == 0 { "rendezvous: " } else { "  " });
    }
    lines
}

/// The generations that have ended, as a table.
fn past(all: &[v1::PastGeneration]) -> Vec<String> {
    let row = |past: &v1::PastGeneration| {
        let millis = |time: &Option<_>| time.as_ref().map(millis_from_timestamp).unwrap_or_default();
        let held = std::time::Duration::from_millis(millis(&past.ended).since(millis(&past.placed)).0);
        let ended = past.ended.as_ref().map(ToString::to_string).unwrap_or_default();
        let nodes = past.nodes.to_string();
        vec![past.generation.to_string(), nodes, ended, show_span(held), past.reason.clone()]
    };
    table(&["GENERATION", "NODES", "ENDED", "AFTER", "REASON"], &all.iter().map(row).collect::<Vec<_>>())
}

/// A placement as a table.
pub(crate) fn placement(nodes: &[v1::NodePlacement]) -> Vec<String> {
    let row = |node: &v1::NodePlacement| {
        let first = node.first_rank.unwrap_or(0);
        let ranks = format!("{first}-{}", first + node.procs.saturating_sub(1));
        let gpus: Vec<String> = node.gpus.iter().map(ToString::to_string).collect();
        let gpus = if gpus.is_empty() { "-".to_owned() } else { gpus.join(",") };
        vec![node.node_name.clone(), node.address.clone(), ranks, gpus]
    };
    table(&["NODE", "ADDRESS", "RANKS", "GPUS"], &nodes.iter().map(row).collect::<Vec<_>>())
}

fn root_cause(exit: &v1::RankExit) -> Vec<String> {
    let how = match (exit.code, exit.signal) {
        _ if exit.out_of_memory => "ran out of memory and was killed by the kernel".to_owned(),
        (_, Some(signal)) => format!("was ended by signal {signal}"),
        (Some(code), None) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    };
    let rank = exit.rank.unwrap_or(0);
    let said = if exit.error.is_empty() { String::new() } else { format!(": {}", exit.error.trim_end()) };
    let head = format!("root cause: rank {rank} on {} {how}{said}", exit.node_name);
    if exit.stderr_tail.trim().is_empty() {
        return vec![format!("{head}; it wrote nothing on standard error")];
    }
    let head = format!("{head}; its last lines on standard error:");
    std::iter::once(head).chain(quoted(&exit.stderr_tail)).collect()
}

/// `muster explain`.
pub(crate) async fn explain(args: &JobArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let job = get_job(&client, args).await?;
    if global.output == Output::Json {
        json::print("Job", &job)?;
        return Ok(());
    }
    out!("job {} is {}: {}", job.id, job_state(&job), job.reason);
    if let Some(exit) = &job.exit {
        lines(root_cause(exit))?;
    }
    if let Some(stuck) = &job.rendezvous {
        lines(at_the_store(stuck, &job))?;
    }
    let id = &job.id;
    let next = match job.state() {
        _ if job.redacted => hidden(&job),
        v1::JobState::Queued => {
            let cluster = client.cluster().get_cluster(v1::GetClusterRequest {}).await?.into_inner().cluster;
            let cluster = cluster.unwrap_or_default();
            let (ready, total) = (cluster.nodes_ready.unwrap_or(0), cluster.nodes_total.unwrap_or(0));
            format!(
                "{ready} of {total} nodes are ready; `muster nodes` shows what they have and who holds it"
            )
        }
        v1::JobState::Starting => {
            format!(
                "it starts once every node is prepared; `muster logs {id}` shows what its ranks have written"
            )
        }
        v1::JobState::Running if job.rendezvous.is_some() => {
            let suspect = job.rendezvous.as_ref().and_then(rendezvous::suspect);
            let rank = suspect.map(|rank| format!(" --rank {rank}")).unwrap_or_default();
            format!("`muster logs {id}{rank}` shows what keeps it")
        }
        v1::JobState::Running => {
            format!("`muster plot {id}` draws its loss, `muster logs -f {id}` follows its output")
        }
        v1::JobState::Restarting => {
            format!("it starts again by itself; `muster logs {id}` shows the start before")
        }
        v1::JobState::Stopping => "its ranks have their grace to end in; then they are killed".to_owned(),
        v1::JobState::Failed => {
            let rank = job.exit.as_ref().and_then(|exit| exit.rank).unwrap_or(0);
            format!("`muster logs {id} --rank {rank}` shows the output of the rank that failed first")
        }
        v1::JobState::Succeeded | v1::JobState::Cancelled | v1::JobState::Unspecified => {
            format!("`muster logs {id}` and `muster plot {id}` show what it did")
        }
    };
    out!("next: {next}");
    Ok(())
}
