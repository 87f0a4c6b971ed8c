//! Slurm's words for where nodes are: topology.conf or topology.yaml, and what Slurm tells a job in its environment. Pure; the
//! text comes from the caller.

mod conf;
mod hostlist;

use std::collections::BTreeMap;

use muster_core::Location;

use conf::Entry;
pub use conf::Include;
use hostlist::holds;

/// Most levels of switches that are followed; a file that goes in circles has no more.
const LEVELS_MAX: usize = 16;

/// The switches and blocks of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network(Vec<Entry>);

impl Network {
    /// Reads a file, topology.conf or topology.yaml by its name and content. An error begins with the file and the line.
    pub fn read(file: &str, text: &str, include: &Include<'_>) -> Result<Self, String> {
        conf::read(file, text, include).map(Self)
    }

    /// Looks a node up. Both trees and blocks are understood.
    pub fn find(&self, node: &str) -> Switches {
        let has = |list: &Option<String>, name: &str| list.as_deref().is_some_and(|list| holds(list, name));
        let own = self.0.iter().find(|entry| has(&entry.nodes, node));
        let mut upwards: Vec<String> = own.map(|entry| entry.name.clone()).into_iter().collect();
        while let Some(last) = upwards.last().filter(|_| upwards.len() < LEVELS_MAX)
            && let Some(above) = self.0.iter().find(|entry| entry.name != *last && has(&entry.below, last))
        {
            upwards.push(above.name.clone());
        }
        Switches { upwards }
    }
}

/// Where a node is: the switch that it is attached to, the one above, and the topmost beyond those. Empty if it is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switches {
    /// The names, the node's own first.
    upwards: Vec<String>,
}

impl Switches {
    /// What Slurm has told a job's step: `SLURM_TOPOLOGY_ADDR`, such as "s0.s4.n17", with its pattern, "switch.switch.node", and
    /// the name of the node, which may have dots. Names of switches that have some cannot be told apart, and say nothing.
    pub fn of_environment(address: &str, pattern: &str, node: &str) -> Self {
        let kinds: Vec<&str> = pattern.split('.').collect();
        let count = kinds.iter().filter(|kind| !kind.is_empty() && **kind != "node").count();
        let without_node = address.strip_suffix(node).filter(|_| !node.is_empty());
        let switches = match without_node.and_then(|rest| rest.strip_suffix('.')) {
            Some(switches) => switches,
            // The node has the rest, however many dots there are.
            None => {
                address.match_indices('.').nth(count.saturating_sub(1)).map_or("", |(at, _)| &address[..at])
            }
        };
        let parts: Vec<&str> = if count == 1 { vec![switches] } else { switches.split('.').collect() };
        if count == 0 || parts.len() != count {
            return Self::default();
        }
        let named = parts.into_iter().filter(|name| !name.is_empty());
        let mut upwards: Vec<String> = named.map(str::to_owned).collect();
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

    fn network(text: &str) -> Network {
        Network::read("topology.conf", text, &|_| Err("none".to_owned())).unwrap()
    }

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
            assert_eq!(network(TREE).find(node).labels(&BTreeMap::new()), expected, "{node}");
        }
        let zone = [("topology.kubernetes.io/zone".to_owned(), "a".to_owned())].into();
        let labels = network(TREE).find("dev3").labels(&zone);
        assert_eq!(
            labels.keys().collect::<Vec<_>>(),
            ["leaf", "spine"],
            "what is said otherwise is left alone"
        );
    }

    #[test]
    fn circles_are_survived() {
        let circle = network("SwitchName=a Nodes=n1 Switches=b\nSwitchName=b Switches=a");
        assert_eq!(circle.find("n1").upwards.len(), LEVELS_MAX);
    }

    #[test]
    fn a_step_knows_where_it_is() {
        let table: [(&str, &str, &str, &[&str]); 9] = [
            ("top.s3.s1.dev7", "switch.switch.switch.node", "dev7", &["s1", "s3", "top"]),
            ("s3.s1.dev7.example.com", "switch.switch.node", "dev7.example.com", &["s1", "s3"]),
            // What the node is called is not known.
            ("s3.s1.dev7.example.com", "switch.switch.node", "", &["s1", "s3"]),
            ("rack1.leaf2.n0", "switch.node", "n0", &["rack1.leaf2"]),
            // Which dot is part of a name is not known.
            ("core.rack1.leaf2.n0", "switch.switch.node", "n0", &[]),
            ("b1.n1", "block.node", "n1", &["b1"]),
            ("n1", "node", "n1", &[]),
            ("", "", "n1", &[]),
            ("", "", "", &[]),
        ];
        for (address, pattern, node, expected) in table {
            let found = Switches::of_environment(address, pattern, node);
            assert_eq!(found.upwards, expected, "{address} {pattern} {node}");
        }
        assert_eq!(Switches::of_environment("", "", "").labels(&BTreeMap::new()), BTreeMap::new());
    }
}
