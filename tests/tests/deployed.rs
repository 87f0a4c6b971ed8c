//! The commands of `deploy/README.md` and the flags of `deploy/systemd`, handed to the program that they are for: what it does
//! not know, it says before it comes to `--help`.

use std::process::Command;

use muster_tests::{Outcome, binary, deployed};

fn muster(words: &[&str]) -> Outcome {
    let before = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let mut command = Command::new(binary("muster"));
    Outcome::of(command.args(&words[..before]).arg("--help").env_remove("MUSTER_COORDINATOR"))
}

/// The lines between ```sh and ```, each whole, without comments.
fn shell(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let mut lines = Vec::new();
    let mut inside = false;
    for line in joined.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside => lines.push(line.split(" #").next().unwrap_or_default().to_owned()),
            _ => {}
        }
    }
    lines
}

/// Every command line of muster that a text has, without `muster`.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in shell(text) {
        let line = line.split(" > ").next().unwrap_or_default();
        let sudo = ["sudo -u muster-coordinator ", "sudo -E -u muster-coordinator "];
        let bare = sudo.iter().find_map(|sudo| line.strip_prefix(sudo)).unwrap_or(line);
        found.extend(bare.strip_prefix("muster ").map(str::to_owned));
        // Of sbatch's, what the script hands on.
        found.extend(bare.split_once("muster.sbatch ").map(|(_, rest)| format!("submit {rest}")));
    }
    for (variable, daemon) in [("COORDINATOR_ARGS=", "coordinator"), ("WORKER_ARGS=", "worker")] {
        let after = text.split(variable).skip(1);
        let flags = after.map(|rest| rest.split(['|', '\n']).next().unwrap_or_default());
        found.extend(flags.filter(|flags| flags.starts_with("--")).map(|flags| format!("{daemon} {flags}")));
    }
    found
}

#[test]
fn muster_knows_every_command_that_is_told() {
    let files = ["README.md", "systemd/coordinator.env", "systemd/worker.env"];
    let texts = files.map(|name| std::fs::read_to_string(deployed(name)).unwrap());
    let all: Vec<String> = texts.iter().flat_map(|text| commands(text)).collect();
    assert!(all.len() > 9, "the commands were found: {all:?}");
    for command in all {
        // The units' users are made by systemd-sysusers, not on this machine.
        let words =
            command.split_whitespace().map(|word| if word == "muster-worker" { "root" } else { word });
        let words: Vec<&str> = words.collect();
        let outcome = muster(&words);
        assert_eq!(outcome.code, 0, "muster {command}: {}", outcome.stderr);
    }
}
