//! The arguments of containers, handed to the programs that they are for.

use std::collections::BTreeMap;
use std::process::Command;

use muster_tests::{Outcome, binary};
use serde_json::Value;

use crate::objects::{Objects, list, text};
use crate::root;

/// What is wrong.
pub(crate) fn check(objects: &Objects) -> Vec<String> {
    let mut found = Vec::new();
    for workload in objects.workloads() {
        for container in workload.containers() {
            let title = format!("{}, container {}", workload.title, text(&container["name"]));
            let arguments = expanded(objects, container);
            match text(&list(&container["command"]).first().cloned().unwrap_or_default()) {
                "" => of_muster(&arguments, &title, &mut found),
                "etcd" => of_etcd(&arguments, &title, &mut found),
                other => found.push(format!("{title} runs {other}, which nobody has tried")),
            }
        }
    }
    found
}

/// The commands of the README, where one begins a line of its own or is called in a pod.
pub(crate) fn check_readme() -> Vec<String> {
    let readme = std::fs::read_to_string(root().join("deploy/kubernetes/README.md")).unwrap();
    let mut found = Vec::new();
    let blocks = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines: Vec<String> = blocks
        .flat_map(|block| block.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let commands = lines.iter().filter_map(|line| {
        line.strip_prefix("muster ").or(line.split_once("-- muster ").map(|(_, rest)| rest))
    });
    let commands: Vec<&str> = commands.filter_map(|command| command.split(['#', '>']).next()).collect();
    assert!(commands.len() > 2, "they were found: {commands:?}");
    for command in commands {
        let outcome =
            Outcome::of(Command::new(binary("muster")).args(command.split_whitespace()).arg("--help"));
        if outcome.code != 0 {
            found.push(format!(
                "README, muster {command}: {}",
                outcome.stderr.lines().next().unwrap_or_default()
            ));
        }
    }
    found
}

/// With the variables that the kubelet puts in.
pub(crate) fn expanded(objects: &Objects, container: &Value) -> Vec<String> {
    let maps = objects.of_kind("ConfigMap");
    let value = |variable: &Value| {
        let reference = &variable["valueFrom"]["configMapKeyRef"];
        let map = maps.get(text(&reference["name"]));
        map.map_or("pod-0", |map| text(&map["data"][text(&reference["key"])])).to_owned()
    };
    let variables: BTreeMap<&str, String> =
        list(&container["env"]).iter().map(|variable| (text(&variable["name"]), value(variable))).collect();
    let expand = |argument: &Value| {
        let mut argument = text(argument).to_owned();
        for (name, value) in &variables {
            argument = argument.replace(&format!("$({name})"), value);
        }
        argument
    };
    list(&container["args"]).iter().map(expand).collect()
}

/// What it does not know, or cannot read, it says before it comes to --help. First each alone, so that all are told, and then
/// together.
fn of_muster(arguments: &[String], title: &str, found: &mut Vec<String>) {
    for argument in arguments.iter().filter(|argument| argument.contains("listen=0.0.0.0")) {
        found.push(format!("{title}, {argument}: not at addresses of IPv6"));
    }
    let [command, flags @ ..] = arguments else { return found.push(format!("{title} is told nothing")) };
    let alone = flags.iter().map(std::slice::from_ref);
    for flags in alone.chain([flags]) {
        let mut muster = Command::new(binary("muster"));
        let outcome = Outcome::of(muster.arg(command).args(flags).arg("--help"));
        if outcome.code != 0 {
            let why = outcome.stderr.lines().next().unwrap_or_default();
            found.push(format!("{title}, {}: {why}", flags.join(" ")));
        }
    }
}

/// Where there is one to ask.
fn of_etcd(arguments: &[String], title: &str, found: &mut Vec<String>) {
    let etcd = root().join(".deps/etcd/usr/bin/etcd");
    if !etcd.is_file() {
        return muster_tests::skip("the flags of etcd", "`cargo xtask setup --tools` has brought no etcd");
    }
    let help = Outcome::of(Command::new(etcd).arg("--help"));
    let help = help.stdout + &help.stderr;
    for argument in arguments {
        let flag = argument.split('=').next().unwrap_or_default();
        if !help.lines().any(|line| line.split_whitespace().next() == Some(flag)) {
            found.push(format!("{title}: etcd knows no {flag}"));
        }
    }
}
