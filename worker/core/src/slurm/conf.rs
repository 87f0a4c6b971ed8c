//! The files in which Slurm is told of its network: topology.conf, with what it includes, and topology.yaml.

use std::ffi::OsStr;
use std::path::Path;

use super::hostlist;

/// Files that are included, of one topology; one that includes itself has no more.
const INCLUDES_MAX: usize = 64;
/// Switches and blocks: a hundred thousand nodes have some thousands.
const ENTRIES_MAX: usize = 1 << 20;

/// A switch or a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    /// Nodes attached to it, as a list.
    pub nodes: Option<String>,
    /// Switches below it, as a list.
    pub below: Option<String>,
}

/// Reads a file that is included, by the name that the including one gives it.
pub type Include<'a> = dyn Fn(&str) -> Result<String, String> + 'a;

/// Every switch and block of the file. An error begins with the file and the line.
pub(super) fn read(file: &str, text: &str, include: &Include<'_>) -> Result<Vec<Entry>, String> {
    let mut all = Vec::new();
    if is_yaml(file, text) {
        read_yaml(file, text, &mut all)?;
    } else {
        read_conf(file, text, include, &mut 0, &mut all)?;
    }
    Ok(all)
}

fn add(at: &str, entry: Entry, all: &mut Vec<Entry>) -> Result<(), String> {
    for list in [&entry.nodes, &entry.below].into_iter().flatten() {
        hostlist::check(list).map_err(|why| format!("{at}: {why}"))?;
    }
    if all.len() == ENTRIES_MAX {
        return Err(format!("{at}: more than {ENTRIES_MAX} switches"));
    }
    all.push(entry);
    Ok(())
}

fn read_conf(
    file: &str,
    text: &str,
    include: &Include<'_>,
    included: &mut usize,
    all: &mut Vec<Entry>,
) -> Result<(), String> {
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let at = format!("{file}:{}", number + 1);
        let mut whole = comment_cut(line).to_owned();
        // A line that ends in a backslash goes on.
        while let Some(begun) = whole.trim_end().strip_suffix('\\').map(str::to_owned) {
            let more = lines.next().map_or("", |(_, more)| comment_cut(more));
            whole = format!("{begun} {more}");
        }
        let line = whole.trim();
        let word = line.split_whitespace().next().unwrap_or_default();
        if word.eq_ignore_ascii_case("include") {
            let name = line[word.len()..].trim().trim_matches('"');
            *included += 1;
            if *included > INCLUDES_MAX {
                return Err(format!(
                    "{at}: more than {INCLUDES_MAX} files are included: does one include itself?"
                ));
            }
            let text = include(name).map_err(|why| format!("{at}: {name} cannot be read: {why}"))?;
            read_conf(name, &text, include, included, all)?;
            continue;
        }
        let mut entry = Entry::default();
        for (key, value) in fields(line).map_err(|why| format!("{at}: {why}"))? {
            match key.to_ascii_lowercase().as_str() {
                "switchname" | "blockname" => entry.name = value,
                "nodes" => entry.nodes = Some(value),
                "switches" => entry.below = Some(value),
                // Such as LinkSpeed and BlockSizes.
                _ => {}
            }
        }
        if !entry.name.is_empty() {
            add(&at, entry, all)?;
        } else if entry.nodes.is_some() || entry.below.is_some() {
            return Err(format!("{at}: nodes or switches without a SwitchName or BlockName"));
        }
    }
    Ok(())
}

/// The line without its comment; `\#` begins none.
fn comment_cut(line: &str) -> &str {
    let begins = |(at, _): &(usize, &str)| !line[..*at].ends_with('\\');
    line.match_indices('#').find(begins).map_or(line, |(at, _)| &line[..at])
}

/// `key=value` again and again, with spaces around the sign and values in quotes.
fn fields(line: &str) -> Result<Vec<(String, String)>, String> {
    let (mut all, mut rest) = (Vec::new(), line.trim());
    while !rest.is_empty() {
        let Some((key, after)) = rest.split_once('=') else {
            return Err(format!("{rest:?} is not KEY=VALUE"));
        };
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(format!("{key:?} before a = is no key"));
        }
        let after = after.trim_start();
        let (value, more) = match after.strip_prefix('"') {
            Some(quoted) => {
                quoted.split_once('"').ok_or_else(|| format!("the quote of {key} does not end"))?
            }
            None => after.split_at(after.find(char::is_whitespace).unwrap_or(after.len())),
        };
        if value.is_empty() {
            return Err(format!("{key} has no value"));
        }
        all.push((key.to_owned(), value.to_owned()));
        rest = more.trim_start();
    }
    Ok(all)
}

fn is_yaml(file: &str, text: &str) -> bool {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    let extension = Path::new(file).extension().and_then(OsStr::to_str).unwrap_or_default();
    matches!(extension, "yaml" | "yml") || first.is_some_and(|line| line == "---" || line.starts_with("- "))
}

/// What slurmctld's topology.yaml has: topologies, one of them the default, with `switch` or `block`, `nodes` and
/// `children`. The default's is taken, or else the first's.
fn read_yaml(file: &str, text: &str, all: &mut Vec<Entry>) -> Result<(), String> {
    /// Entries of one topology, each with its line.
    #[derive(Default)]
    struct Topology {
        is_default: bool,
        entries: Vec<(usize, Entry)>,
    }
    let mut topologies: Vec<Topology> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let at = || format!("{file}:{}", number + 1);
        // Only after a space: names have none of it.
        let line = if line.trim_start().starts_with('#') { "" } else { line };
        let line = line.split(" #").next().unwrap_or_default();
        let content = line.trim();
        if content.is_empty() || content == "---" || content == "..." {
            continue;
        }
        if line.trim_start_matches(' ').starts_with('\t') {
            return Err(format!("{}: YAML is not indented by tabs", at()));
        }
        for part in flow_parts(content) {
            let part = part.trim_start_matches("- ").trim();
            // A value of a list, such as a size of blocks.
            let Some((key, value)) = part.split_once(':') else {
                if content.starts_with('-') || content.contains(['[', ',', ']']) {
                    continue;
                }
                return Err(format!("{}: {part:?} is not KEY: VALUE", at()));
            };
            let value = value.trim().trim_matches(['"', '\'']).to_owned();
            match key.trim() {
                "topology" => topologies.push(Topology::default()),
                "cluster_default" => {
                    let topology = topologies.last_mut();
                    let topology = topology.ok_or_else(|| format!("{}: no topology has begun", at()))?;
                    topology.is_default = value.eq_ignore_ascii_case("true");
                }
                // It opens the part of the blocks.
                "block" if value.is_empty() => {}
                key @ ("switch" | "block" | "nodes" | "children") => {
                    if value.is_empty() {
                        return Err(format!("{}: {key} has no value", at()));
                    }
                    let topology = topologies.last_mut();
                    let topology = topology.ok_or_else(|| format!("{}: no topology has begun", at()))?;
                    if key == "switch" || key == "block" {
                        let entry = Entry { name: value, ..Entry::default() };
                        topology.entries.push((number + 1, entry));
                        continue;
                    }
                    let Some((_, entry)) = topology.entries.last_mut() else {
                        return Err(format!("{}: {key} without a switch or a block", at()));
                    };
                    let place = if key == "nodes" { &mut entry.nodes } else { &mut entry.below };
                    *place = Some(value);
                }
                _ => {}
            }
        }
    }
    let default = topologies.iter().position(|topology| topology.is_default).unwrap_or(0);
    let Some(topology) = topologies.into_iter().nth(default) else {
        return Err(format!("{file}:1: it has no topology"));
    };
    topology.entries.into_iter().try_for_each(|(line, entry)| add(&format!("{file}:{line}"), entry, all))
}

/// The parts of `{switch: s0, nodes: "n[1,2]"}`, or the whole of another line.
fn flow_parts(content: &str) -> Vec<&str> {
    let inner = content.trim_start_matches("- ").trim();
    let Some(inner) = inner.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')) else {
        return vec![content];
    };
    let mut closed = (0_u32, false);
    let split = inner.split(|c: char| {
        match c {
            '[' => closed.0 += 1,
            ']' => closed.0 = closed.0.saturating_sub(1),
            '"' | '\'' => closed.1 = !closed.1,
            _ => {}
        }
        c == ',' && closed == (0, false)
    });
    split.map(str::trim).collect()
}

#[cfg(test)]
#[path = "conf_tests.rs"]
mod tests;
