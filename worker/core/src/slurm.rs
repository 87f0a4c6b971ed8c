//! Slurm's words for where nodes are: topology.conf, and what Slurm tells a job in its environment. Pure; the text comes
//! from the caller.

use std::collections::BTreeMap;

use muster_core::Location;

/// Most levels of switches that are followed; a file that goes in circles has no more.
const LEVELS_MAX: usize = 16;
/// Most ranges in one name, and digits of a number in one: how a name falls into them is tried out.
const RANGES_MAX: usize = 4;
const DIGITS_MAX: usize = 12;

/// Where a node is: the switch that it is attached to, the one above, and the topmost beyond those. Empty if it is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switches {
    /// The names, the node's own first.
    upwards: Vec<String>,
}

impl Switches {
    /// Looks a node up in a topology.conf. Both trees and blocks are understood.
    pub fn of_file(text: &str, node: &str) -> Self {
        let mut above: Vec<(String, String)> = Vec::new();
        let mut upwards = Vec::new();
        // A line that ends in a backslash goes on.
        for line in text.replace("\\\n", " ").lines() {
            let line = line.split('#').next().unwrap_or_default();
            let fields: BTreeMap<String, &str> = line
                .split_whitespace()
                .filter_map(|field| field.split_once('='))
                .map(|(key, value)| (key.to_ascii_lowercase(), value))
                .collect();
            let Some(name) = fields.get("switchname").or_else(|| fields.get("blockname")) else { continue };
            if upwards.is_empty() && fields.get("nodes").is_some_and(|nodes| holds(nodes, node)) {
                upwards.push((*name).to_owned());
            }
            if let Some(below) = fields.get("switches") {
                above.push(((*name).to_owned(), (*below).to_owned()));
            }
        }
        while let Some(last) = upwards.last().filter(|_| upwards.len() < LEVELS_MAX)
            && let Some((name, _)) = above.iter().find(|(name, below)| name != last && holds(below, last))
        {
            upwards.push(name.clone());
        }
        Self { upwards }
    }

    /// What Slurm has told a job's step: `SLURM_TOPOLOGY_ADDR`, such as "s0.s4.n17", with its pattern, "switch.switch.node".
    pub fn of_environment(address: &str, pattern: &str) -> Self {
        let switches = address.split('.').zip(pattern.split('.')).filter(|(_, what)| *what != "node");
        let mut upwards: Vec<String> = switches.map(|(name, _)| name.to_owned()).collect();
        upwards.reverse();
        upwards.truncate(LEVELS_MAX);
        Self { upwards }
    }

    /// Labels that say so, for the levels of which others say nothing.
    pub fn labels(&self, others: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let known = Location::of(others);
        let known: Vec<&str> = known.parts().collect();
        let is_known = |level: usize| known.get(level).is_some_and(|name| !name.is_empty());
        // Whatever is between the second and the topmost is not told apart.
        let top = self.upwards.get(2..).and_then(<[String]>::last);
        let levels = [("zone", top), ("spine", self.upwards.get(1)), ("leaf", self.upwards.first())];
        let levels = levels.into_iter().enumerate().filter(|(level, _)| !is_known(*level));
        levels.filter_map(|(_, (key, name))| Some((key.to_owned(), name?.clone()))).collect()
    }
}

/// Whether a list such as "n[0-3,7],rack[01-12]n5" holds a name. It is not written out: it may stand for a whole cluster.
fn holds(list: &str, name: &str) -> bool {
    let (mut depth, mut start) = (0_u32, 0);
    for (at, c) in list.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                if matches(&list[start..at], name) {
                    return true;
                }
                start = at + 1;
            }
            _ => {}
        }
    }
    matches(&list[start..], name)
}

fn matches(pattern: &str, name: &str) -> bool {
    if pattern.matches('[').count() > RANGES_MAX {
        return false;
    }
    let Some((prefix, rest)) = pattern.split_once('[') else { return pattern == name };
    let (Some(name), Some((ranges, after))) = (name.strip_prefix(prefix), rest.split_once(']')) else {
        return false;
    };
    let digits = name.bytes().take_while(u8::is_ascii_digit).count().min(DIGITS_MAX);
    // What follows may begin with a digit of its own.
    (1..=digits).any(|len| in_ranges(ranges, &name[..len]) && matches(after, &name[len..]))
}

fn in_ranges(ranges: &str, number: &str) -> bool {
    let Ok(value) = number.parse::<u64>() else { return false };
    ranges.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let padded = |text: &str| text.len() > 1 && text.starts_with('0');
        let form = if padded(first) { number.len() == first.len() } else { !padded(number) };
        let bounds = first.parse::<u64>().ok().zip(last.parse::<u64>().ok());
        form && bounds.is_some_and(|(first, last)| (first..=last).contains(&value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Slurm's documentation has it, with a third level above.
    const TREE: &str = "\
# topology.conf
SwitchName=s0 Nodes=dev[0-5]
SwitchName=s1 Nodes=dev[6-11] LinkSpeed=100
SwitchName=s2 \\
  Nodes=dev[12-17],gpu[001-016]
SwitchName=s3 Switches=s[0-1]
switchname=s4 switches=s2
SwitchName=top Switches=s3,s4
";

    #[test]
    fn a_node_is_found_with_the_switches_above_it() {
        let table: [(&str, &[(&str, &str)]); 6] = [
            ("dev3", &[("leaf", "s0"), ("spine", "s3"), ("zone", "top")]),
            ("dev11", &[("leaf", "s1"), ("spine", "s3"), ("zone", "top")]),
            ("gpu016", &[("leaf", "s2"), ("spine", "s4"), ("zone", "top")]),
            ("gpu16", &[]),
            ("dev18", &[]),
            ("dev", &[]),
        ];
        for (node, expected) in table {
            let expected: BTreeMap<String, String> =
                expected.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            assert_eq!(Switches::of_file(TREE, node).labels(&BTreeMap::new()), expected, "{node}");
        }
        let zone = [("topology.kubernetes.io/zone".to_owned(), "a".to_owned())].into();
        let labels = Switches::of_file(TREE, "dev3").labels(&zone);
        assert_eq!(
            labels.keys().collect::<Vec<_>>(),
            ["leaf", "spine"],
            "what is said otherwise is left alone"
        );
    }

    #[test]
    fn blocks_circles_and_rubbish_are_survived() {
        let leaf = |text: &str, node: &str| Switches::of_file(text, node).upwards;
        assert_eq!(leaf("BlockName=b2 Nodes=n[1-18]\nBlockSizes=18", "n7"), ["b2"]);
        assert_eq!(leaf("SwitchName=a Nodes=n1 Switches=b\nSwitchName=b Switches=a", "n1").len(), LEVELS_MAX);
        for rubbish in
            ["SwitchName= Nodes=n[", "SwitchName=a Nodes=n]1[", "=", "SwitchName=a Nodes=[-]", "\\\n"]
        {
            assert_eq!(leaf(rubbish, "n1"), [""; 0], "{rubbish}");
        }
    }

    #[test]
    fn lists_are_slurms() {
        let table = [
            ("a,b", "b", true),
            ("n[0-3,7]", "n7", true),
            ("n[0-3,7]", "n5", false),
            ("n[0-3]", "n03", false),
            ("n[08-10]", "n09", true),
            ("n[08-10]", "n9", false),
            ("rack[0-1]n[00-15]", "rack1n07", true),
            ("rack[0-1]n[00-15]", "rack2n07", false),
            ("n[1-2]5", "n15", true),
            ("[0-9][0-9][0-9][0-9][0-9]", "12345", false),
        ];
        for (list, name, expected) in table {
            assert_eq!(holds(list, name), expected, "{list} {name}");
        }
    }

    #[test]
    fn a_step_knows_where_it_is() {
        let switches = Switches::of_environment("top.s3.s1.dev7", "switch.switch.switch.node");
        assert_eq!(switches.upwards, ["s1", "s3", "top"]);
        assert_eq!(Switches::of_environment("n1", "node").labels(&BTreeMap::new()), BTreeMap::new());
    }
}
