//! Files as sites have them, and what is wrong with others.

use super::*;

fn none(_: &str) -> Result<String, String> {
    Err("no such file".to_owned())
}

fn leaf_of(file: &str, text: &str, node: &str) -> Option<String> {
    let all = read(file, text, &none).unwrap();
    let on = |entry: &Entry| entry.nodes.as_deref().is_some_and(|nodes| hostlist::holds(nodes, node));
    all.into_iter().find(on).map(|entry| entry.name)
}

#[test]
fn lines_are_read_as_slurmctld_reads_them() {
    let table = [
        ("SwitchName = s0 Nodes = n[1-2]", "n2"),
        ("SwitchName=\"s0\" Nodes=\"n[1-2]\"", "n1"),
        ("switchname=s0\tNODES= n1 LinkSpeed=100", "n1"),
        ("SwitchName=s0 \\\n  Nodes=n[1-2] # the first", "n1"),
        ("  # nothing\n\nSwitchName=s0 Nodes=n1#and", "n1"),
        ("BlockName=s0 Nodes=n[1-18]\nBlockSizes=18,36", "n18"),
        ("SwitchName=s0 Nodes=ALL", "n3"),
        ("---\n- topology: t\n  tree:\n    switches:\n      - switch: s0\n        nodes: n[1-2]", "n2"),
    ];
    for (text, node) in table {
        assert_eq!(leaf_of("topology.conf", text, node).as_deref(), Some("s0"), "{text}");
    }
}

#[test]
fn what_is_included_is_read_and_named_in_errors() {
    let include = |name: &str| match name {
        "racks.conf" => Ok("SwitchName=s1 Nodes=n1\nSwitchName=s2 Nodes=n[2".to_owned()),
        "self.conf" => Ok("Include self.conf".to_owned()),
        _ => none(name),
    };
    let table = [
        ("\nInclude racks.conf", "racks.conf:2: \"n[2\" is no list of hosts: a bracket is not closed"),
        ("# x\ninclude \"gone.conf\"", "topology.conf:2: gone.conf cannot be read: no such file"),
        ("Include self.conf", "self.conf:1: more than 64 files are included"),
    ];
    for (text, expected) in table {
        let said = read("topology.conf", text, &include).unwrap_err();
        assert!(said.contains(expected), "{text}: {said}");
    }
    let good = |_: &str| Ok("SwitchName=s1 Nodes=n1".to_owned());
    let all = read("topology.conf", "Include a\nSwitchName=top Switches=s1", &good).unwrap();
    assert_eq!(all.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["s1", "top"]);
}

#[test]
fn errors_have_the_line() {
    let table = [
        ("SwitchName=s0 Nodes=n1\nSwitchName=s1 n2", "topology.conf:2: \"n2\" is not KEY=VALUE"),
        ("SwitchName=s0 Nodes=\"n1", "topology.conf:1: the quote of Nodes does not end"),
        ("Nodes=n1", "topology.conf:1: nodes or switches without"),
        ("SwitchName=a \\\n Nodes=n1\nSwitchName= ", "topology.conf:3: SwitchName has no value"),
        ("---\n- topology: t\n  block:\n    nodes: n1", "topology.conf:4: nodes without a switch"),
        ("---\n- topology: t\n\tblock:", "topology.conf:3: YAML is not indented by tabs"),
        ("---\n- topology: t\n  words", "topology.conf:3: \"words\" is not KEY: VALUE"),
        ("---\n", "topology.conf:1: it has no topology"),
    ];
    for (text, expected) in table {
        let said = read("topology.conf", text, &none).unwrap_err();
        assert!(said.contains(expected), "{text}: {said}");
    }
}

#[test]
fn the_default_of_several_topologies_is_taken() {
    let text = "\
---
# As in Slurm's documentation.
- topology: blocks
  cluster_default: false
  block:
    block_sizes: [4, 16]
    blocks:
      - block: b1
        nodes: n[1-4]
- topology: tree
  cluster_default: true
  tree:
    switches:
      - switch: root   # above
        children: s[1-2]
      - {switch: s1, nodes: \"n[1,2]\"}
      - switch: 's2'
        nodes: n[3-4]
- topology: flat
  flat: true
";
    for (node, expected) in [("n2", "s1"), ("n3", "s2")] {
        assert_eq!(leaf_of("topology.yaml", text, node).as_deref(), Some(expected), "{node}");
    }
    let first = text.replace("cluster_default: true", "cluster_default: false");
    assert_eq!(leaf_of("topology.yaml", &first, "n2").as_deref(), Some("b1"));
}
