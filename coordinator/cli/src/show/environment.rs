//! What nodes add to the environment of a job's ranks, and why.

use std::collections::BTreeMap;

use muster_proto::v1::{self, VariableSource};

use crate::args::{Global, JobArgs, Output};
use crate::client::Client;
use crate::exit::Failure;
use crate::json;
use crate::output::{lines, out, table};

/// Node names that are spelled out before the rest is counted.
const NAMES_SHOWN: usize = 8;

/// `muster job ID --env`.
pub(super) async fn show(client: &Client, args: &JobArgs, global: &Global) -> Result<(), Failure> {
    let request = v1::GetJobEnvironmentRequest { job_id: args.job_id.clone() };
    let found = client.jobs().get_job_environment(request).await?.into_inner();
    if global.output == Output::Json {
        json::print("GetJobEnvironmentResponse", &found)?;
        return Ok(());
    }
    let from_files = files(client, args).await?;
    for (name, path) in &from_files {
        out!("{name} from {path}");
    }
    if !from_files.is_empty() {
        out!("");
    }
    if found.environments.is_empty() {
        out!(
            "no node of the job has prepared it; what they add is known from then until the ranks have ended"
        );
    }
    for (index, group) in found.environments.iter().enumerate() {
        let surroundings = group.surroundings.clone().unwrap_or_default();
        if index > 0 {
            out!("");
        }
        out!("{}", names(&group.node_names));
        let variables: Vec<_> = surroundings.variables.iter().map(variable).collect();
        if variables.is_empty() {
            out!("adds nothing");
        } else {
            lines(table(&["VARIABLE", "VALUE", "SET BY", "WHY"], &variables))?;
        }
        let bindings: Vec<_> = surroundings.bindings.iter().map(binding).collect();
        if !bindings.is_empty() {
            lines(table(&["LOCAL RANK", "GPUS", "CPUS", "WHY"], &bindings))?;
        }
    }
    if found.environments_more > 0 {
        out!("");
        out!("and {} further kinds of nodes", found.environments_more);
    }
    Ok(())
}

/// Variables of the job whose values its nodes read from files, with the files.
async fn files(client: &Client, args: &JobArgs) -> Result<BTreeMap<String, String>, Failure> {
    let request = v1::GetJobRequest { job_id: args.job_id.clone() };
    let job = client.jobs().get_job(request).await?.into_inner().job.unwrap_or_default();
    Ok(job.spec.unwrap_or_default().env_files.into_iter().collect())
}

fn names(all: &[String]) -> String {
    let what = if all.len() == 1 { "node" } else { "nodes" };
    match all.split_at_checked(NAMES_SHOWN) {
        Some((shown, more)) if !more.is_empty() => {
            format!("{what} {} and {} more", shown.join(", "), more.len())
        }
        _ => format!("{what} {}", all.join(", ")),
    }
}

fn variable(variable: &v1::DerivedVariable) -> Vec<String> {
    let source = match variable.source() {
        VariableSource::Unspecified => "?",
        VariableSource::Node => "node",
        VariableSource::Job => "job",
        VariableSource::Daemon => "daemon's environment",
    };
    vec![variable.name.clone(), variable.value.clone(), source.to_owned(), variable.reason.clone()]
}

fn binding(binding: &v1::RankBinding) -> Vec<String> {
    let gpus: Vec<String> = binding.gpus.iter().map(ToString::to_string).collect();
    let cpus = if binding.cpus.is_empty() { "all".to_owned() } else { binding.cpus.clone() };
    vec![binding.local_rank.to_string(), gpus.join(","), cpus, binding.reason.clone()]
}
