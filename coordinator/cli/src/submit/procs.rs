//! `--nproc-per-node auto`, `gpu` and `cpu` of a job: as many ranks as its nodes have GPUs or cores.

use std::collections::BTreeMap;

use muster_core::{GPU_MODEL_LABEL, is_model};
use muster_proto::convert::inventory_from_wire;
use muster_proto::v1;

use crate::client::Client;
use crate::exit::Failure;
use crate::run::args::ProcsPerNode;

/// Nodes named in a refusal.
const NAMED_MAX: usize = 2;

/// Sets the ranks of each node by what the nodes have that the job may use, and a GPU for each where those are counted.
pub(super) async fn of_nodes(
    client: &Client,
    kind: ProcsPerNode,
    spec: &mut v1::JobSpec,
) -> Result<(), Failure> {
    let listed = client.nodes().list_nodes(v1::ListNodesRequest::default()).await?.into_inner().nodes;
    let (procs, has_gpus) = count(kind, &listed, spec).map_err(Failure::Usage)?;
    spec.procs_per_node = Some(procs);
    if has_gpus && spec.per_proc.as_ref().is_none_or(|per_proc| per_proc.gpus == 0) {
        spec.per_proc.get_or_insert_default().gpus = 1;
    }
    Ok(())
}

/// Returns how many there are on each node, and whether they are GPUs.
fn count(kind: ProcsPerNode, nodes: &[v1::Node], spec: &v1::JobSpec) -> Result<(u32, bool), String> {
    let total = |node: &v1::Node| node.inventory.as_ref()?.total;
    let is_selected = |node: &&v1::Node| {
        let found = node.inventory.clone().and_then(|inventory| inventory_from_wire(inventory).ok());
        let has = |(key, value): (&String, &String)| {
            found.as_ref().is_some_and(|inventory| match key.as_str() {
                GPU_MODEL_LABEL => inventory.gpu_model().is_some_and(|model| is_model(model, value)),
                key => inventory.labels.get(key) == Some(value),
            })
        };
        node.state() == v1::NodeState::Ready && spec.node_selector.iter().all(has)
    };
    let nodes: Vec<&v1::Node> = nodes.iter().filter(is_selected).collect();
    let has_gpus = nodes.iter().any(|node| total(node).is_some_and(|total| total.gpus > 0));
    let counts_gpus = match kind {
        ProcsPerNode::Gpu => true,
        ProcsPerNode::Auto => has_gpus,
        ProcsPerNode::Cpu | ProcsPerNode::Count(_) => false,
    };
    let mut by_count: BTreeMap<u32, &str> = BTreeMap::new();
    for node in &nodes {
        let total = total(node).unwrap_or_default();
        let count = if counts_gpus { total.gpus } else { (total.cpu_millis / 1000).max(1) };
        // Where GPUs are counted, a node without any is none for this job.
        if count > 0 {
            by_count.entry(count).or_insert(&node.name);
        }
    }
    let what = if counts_gpus { "GPUs" } else { "cores" };
    let mut found = by_count.iter();
    match (found.next(), found.next()) {
        (Some((count, _)), None) => Ok((*count, counts_gpus)),
        (None, _) => {
            Err(format!("--nproc-per-node: no node that is ready and selected has {what}; name a number"))
        }
        _ => {
            let named: Vec<String> =
                by_count.iter().take(NAMED_MAX).map(|(count, name)| format!("{name} has {count}")).collect();
            Err(format!(
                "--nproc-per-node: the nodes differ in {what} ({}); name a number, or select nodes",
                named.join(", ")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, gpus: u32, cores: u32, rack: &str) -> v1::Node {
        let total = v1::Resources { gpus, cpu_millis: cores * 1000, memory_bytes: 0 };
        let labels = [("rack".to_owned(), rack.to_owned())].into();
        let inventory = v1::Inventory { total: Some(total), labels, ..v1::Inventory::default() };
        let (name, state) = (name.to_owned(), v1::NodeState::Ready.into());
        v1::Node { name, state, inventory: Some(inventory), ..v1::Node::default() }
    }

    #[test]
    fn ranks_are_as_many_as_the_nodes_have() {
        use ProcsPerNode::{Auto, Cpu, Gpu};

        let nodes =
            [node("a", 8, 64, "1"), node("b", 8, 64, "1"), node("c", 4, 64, "2"), node("d", 0, 64, "3")];
        let count = |kind, rack: &str| {
            let node_selector = [("rack".to_owned(), rack.to_owned())].into();
            super::count(kind, &nodes, &v1::JobSpec { node_selector, ..v1::JobSpec::default() })
        };
        assert_eq!(count(Auto, "1"), Ok((8, true)));
        assert_eq!(count(Auto, "3"), Ok((64, false)));
        assert_eq!(count(Cpu, "2"), Ok((64, false)));
        assert!(count(Gpu, "3").unwrap_err().contains("has GPUs"));
        let all = super::count(Auto, &nodes, &v1::JobSpec::default());
        assert!(all.unwrap_err().contains("differ in GPUs (c has 4, a has 8)"));
    }
}
