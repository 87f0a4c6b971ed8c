//! From a file and flags to a job specification. The coordinator checks it; here only what it cannot see.

use std::path::Path;

use anyhow::Context;
use muster_cli::messages;
use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;

use crate::args::{CoordinatorLoss, SubmitArgs};
use crate::exit::Failure;

/// The specification: the file's, with what the flags say in place of what it says.
pub(crate) fn from_args(args: SubmitArgs) -> Result<v1::JobSpec, Failure> {
    let mut spec = match &args.file {
        Some(path) => read(path).map_err(|error| Failure::Usage(format!("{error:#}")))?,
        None => v1::JobSpec::default(),
    };
    if !args.command.is_empty() {
        spec.command = args.command;
    }
    if spec.command.is_empty() {
        let example = "muster submit --nnodes 2 -- python3 train.py";
        return Err(Failure::Usage(format!("no program is named; put it after two dashes: {example}")));
    }
    if let Some(name) = args.name {
        spec.name = name;
    }
    if let Some(nodes) = args.nnodes {
        (spec.min_nodes, spec.max_nodes) = (Some(nodes.min), nodes.max);
    }
    spec.procs_per_node = args.nproc_per_node.or(spec.procs_per_node);
    spec.max_restarts = args.max_restarts.or(spec.max_restarts);
    spec.priority = args.priority.unwrap_or(spec.priority);
    if args.gpus_per_proc.is_some() || args.cpus_per_proc.is_some() || args.memory_per_proc.is_some() {
        let per_proc = spec.per_proc.get_or_insert_default();
        per_proc.gpus = args.gpus_per_proc.unwrap_or(per_proc.gpus);
        per_proc.memory_bytes = args.memory_per_proc.map_or(per_proc.memory_bytes, |bytes| bytes.0);
        if let Some(cores) = args.cpus_per_proc {
            if !(0.0..1e6).contains(&cores) {
                return Err(Failure::Usage(format!("--cpus-per-proc {cores} is out of range")));
            }
            per_proc.cpu_millis = (cores * 1000.0).round() as u32;
        }
    }
    spec.env.extend(args.env.into_iter().map(|pair| (pair.0, pair.1)));
    spec.node_selector.extend(args.node_selector.into_iter().map(|pair| (pair.0, pair.1)));
    if let Some(dir) = args.working_dir {
        spec.working_dir = dir;
    }
    if let Some(dir) = args.checkpoint_dir {
        spec.checkpoint_dir = dir;
    }
    spec.stop_grace = args.stop_grace.map(|span| duration_to_wire_std(span.0)).or(spec.stop_grace);
    spec.start_timeout = args.start_timeout.map(|span| duration_to_wire_std(span.0)).or(spec.start_timeout);
    spec.progress_timeout =
        args.progress_timeout.map(|span| duration_to_wire_std(span.0)).or(spec.progress_timeout);
    spec.stop_signal = args.stop_signal.unwrap_or(spec.stop_signal);
    if let Some(policy) = args.on_coordinator_loss {
        spec.on_coordinator_loss = match policy {
            CoordinatorLoss::Run => v1::CoordinatorLossPolicy::Run,
            CoordinatorLoss::Stop => v1::CoordinatorLossPolicy::Stop,
        }
        .into();
    }
    Ok(spec)
}

fn read(path: &Path) -> anyhow::Result<v1::JobSpec> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    let is_toml = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml"));
    messages::job_spec(&text, is_toml).with_context(|| format!("failed to read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    fn submit(flags: &[&str]) -> Result<v1::JobSpec, Failure> {
        let args = Args::try_parse_from(["muster", "submit"].iter().chain(flags)).unwrap();
        match args.command {
            Command::Submit(args) => from_args(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_override_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.toml");
        std::fs::write(&path, "name = \"a\"\ncommand = [\"x\"]\nminNodes = 4\n[env]\nA = \"1\"\n").unwrap();
        let path = path.to_str().unwrap();
        let spec =
            submit(&["--file", path, "--nnodes", "2:3", "--env", "B=2", "--cpus-per-proc", "1.5"]).unwrap();
        assert_eq!((spec.name.as_str(), spec.min_nodes, spec.max_nodes), ("a", Some(2), 3));
        assert_eq!((spec.env.len(), spec.per_proc.unwrap().cpu_millis), (2, 1500));
        assert_eq!(spec.command, ["x"]);
    }

    #[test]
    fn a_wrong_file_says_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.json");
        for (text, expected) in [("{", "is not valid JSON"), (r#"{"comand":[]}"#, "did you mean command?")] {
            std::fs::write(&path, text).unwrap();
            let error = submit(&["--file", path.to_str().unwrap(), "--", "x"]).unwrap_err();
            assert!(format!("{error:?}").contains(expected), "{error:?}");
        }
        assert!(matches!(submit(&[]), Err(Failure::Usage(_))));
    }
}
