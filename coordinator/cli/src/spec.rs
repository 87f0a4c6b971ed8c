//! From a file and flags to a job specification. The coordinator checks it; here only what it cannot see.

use std::path::Path;

use anyhow::Context;
use muster_cli::messages;
use muster_core::GPU_MODEL_LABEL;
use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;

use crate::args::{CoordinatorLoss, SubmitArgs};
use crate::exit::Failure;
use crate::run::args::ProcsPerNode;

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
        let example = "muster submit --nnodes 2 -- train.py";
        return Err(Failure::Usage(format!("no program is named; put it after two dashes: {example}")));
    }
    add_python(&mut spec, args.python)?;
    if let Some(name) = args.name {
        spec.name = name;
    }
    if let Some(nodes) = args.nnodes {
        (spec.min_nodes, spec.max_nodes) = (Some(nodes.min), nodes.max);
    }
    match args.nproc_per_node {
        Some(ProcsPerNode::Count(count)) => spec.procs_per_node = Some(count),
        // That is for the nodes to say.
        Some(ProcsPerNode::Auto | ProcsPerNode::Gpu | ProcsPerNode::Cpu) | None => {}
    }
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
    spec.env_files.extend(args.env_file.into_iter().map(|pair| (pair.0, pair.1)));
    spec.node_selector.extend(args.node_selector.into_iter().map(|pair| (pair.0, pair.1)));
    spec.node_selector.extend(args.gpu_model.map(|model| (GPU_MODEL_LABEL.to_owned(), model)));
    if let Some(dir) = args.working_dir {
        spec.working_dir = dir;
    } else if spec.working_dir.is_empty() && is_named_from_here(&spec.command) {
        let here = std::env::current_dir().context("this shell's directory is gone")?;
        let here = here.into_os_string().into_string();
        spec.working_dir = here.map_err(|here| Failure::Usage(format!("{} is not UTF-8", here.display())))?;
    }
    if let Some(dir) = args.checkpoint_dir {
        spec.checkpoint_dir = dir;
    }
    spec.tensorboard_dir = args.tensorboard_dir.unwrap_or(spec.tensorboard_dir);
    spec.run_as = args.run_as.unwrap_or(spec.run_as);
    spec.metric_pattern = args.metric_pattern.unwrap_or(spec.metric_pattern);
    spec.stop_grace = args.stop_grace.map(|span| duration_to_wire_std(span.0)).or(spec.stop_grace);
    spec.start_timeout = args.start_timeout.map(|span| duration_to_wire_std(span.0)).or(spec.start_timeout);
    spec.progress_timeout =
        args.progress_timeout.map(|span| duration_to_wire_std(span.0)).or(spec.progress_timeout);
    spec.last_call = args.last_call.map(|span| duration_to_wire_std(span.0)).or(spec.last_call);
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

/// A script is run as torchrun runs it, by an interpreter that the job names.
fn add_python(spec: &mut v1::JobSpec, python: Option<String>) -> Result<(), Failure> {
    if !is_script(&spec.command[0]) {
        return match python {
            None => Ok(()),
            Some(_) => {
                Err(Failure::Usage(format!("--python is for a script.py, and {} is none", spec.command[0])))
            }
        };
    }
    if spec.name.is_empty() {
        let file = Path::new(&spec.command[0]).file_name().map(|name| name.to_string_lossy().into_owned());
        let is_plain = |name: &String| name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
        spec.name = file.filter(is_plain).unwrap_or_default();
    }
    let python = python.unwrap_or_else(|| default_python(|name| std::env::var(name).ok()));
    spec.command.splice(0..0, [python, "-u".to_owned()]);
    Ok(())
}

/// What torchrun takes, for nodes that see the same disks as this machine.
fn default_python(variable: impl Fn(&str) -> Option<String>) -> String {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let active = || set("VIRTUAL_ENV").or_else(|| set("CONDA_PREFIX")).map(|dir| format!("{dir}/bin/python"));
    set("PYTHON_EXEC").or_else(active).unwrap_or_else(|| "python3".to_owned())
}

fn is_script(word: &str) -> bool {
    Path::new(word).extension().is_some_and(|extension| extension == "py")
}

/// Whether the program, or the script that an interpreter runs first, is a relative path.
fn is_named_from_here(command: &[String]) -> bool {
    let is_relative = |word: &String| !word.starts_with('/');
    let mut words = command.iter();
    words.next().is_some_and(|program| program.contains('/') && is_relative(program))
        || words.find(|word| !word.starts_with('-')).is_some_and(|word| is_script(word) && is_relative(word))
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
    fn a_script_is_run_by_the_python_that_is_named_and_from_here() {
        let here = std::env::current_dir().unwrap().display().to_string();
        let table: [(&[&str], &[&str], &str); 7] = [
            (&["--python", "py", "--", "a/train.py", "--lr"], &["py", "-u", "a/train.py", "--lr"], &here),
            (&["--python", "py", "--", "/a/train.py"], &["py", "-u", "/a/train.py"], ""),
            (&["--python", "py", "--working-dir", "/d", "--", "train.py"], &["py", "-u", "train.py"], "/d"),
            (&["--", "python3", "-u", "train.py", "x"], &["python3", "-u", "train.py", "x"], &here),
            (&["--", "python3", "-m", "pkg"], &["python3", "-m", "pkg"], ""),
            (&["--", "./program"], &["./program"], &here),
            (&["--", "muster-trainer", "vision"], &["muster-trainer", "vision"], ""),
        ];
        for (flags, command, dir) in table {
            let spec = submit(flags).unwrap();
            assert_eq!(
                (spec.command, spec.working_dir.as_str()),
                (command.iter().map(ToString::to_string).collect(), dir),
                "{flags:?}"
            );
        }
        assert_eq!(submit(&["--", "a/train.py"]).unwrap().name, "train.py");
        assert!(matches!(submit(&["--python", "py", "--", "sh"]), Err(Failure::Usage(_))));
        let python = |set: &[(&str, &str)]| {
            default_python(|name| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(python(&[]), "python3");
        assert_eq!(python(&[("CONDA_PREFIX", "/c"), ("VIRTUAL_ENV", "")]), "/c/bin/python");
        assert_eq!(python(&[("VIRTUAL_ENV", "/v"), ("PYTHON_EXEC", "/p")]), "/p");
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
