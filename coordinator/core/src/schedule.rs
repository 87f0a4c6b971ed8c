//! Placement as a function: a spec and the nodes in, a gang or the reason why not out.
//!
//! Goals, in order: a gang is placed whole or not at all; no device has two owners; healthy nodes before degraded ones; a
//! ring through its ranks crosses the fewest uplinks (`topology.rs`); the answer depends only on the arguments; whoever
//! waits is told what for. Ranks are ordered by the place of their nodes in the network, then address, then name: rank
//! 0's node first, ranks contiguous on each node. Nodes of a `muster run` that were given their places have those. On a
//! node a gang gets GPUs that are near to each other.

mod misfit;

use std::collections::BTreeMap;

use crate::health::Verdict;
use crate::node::Node;
use crate::topology;
use crate::types::{JobSpec, NodePlacement, RUN_LABEL, Rank, Resources};
use misfit::{Refusals, misfit};

/// Where a gang goes, or why it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The placement, in rank order.
    Place(Vec<NodePlacement>),
    /// Why not, in words.
    Wait(String),
}

/// What a job asks of each of its nodes. Jobs that ask for the same fit into the same nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Need {
    /// Nothing stands for a node as a whole: without named resources nothing says how much of it the ranks will use.
    amount: Resources,
    selector: BTreeMap<String, String>,
}

impl From<&JobSpec> for Need {
    fn from(spec: &JobSpec) -> Self {
        Self { amount: spec.per_proc.times(spec.procs_per_node), selector: spec.node_selector.clone() }
    }
}

/// What a look at every node has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    /// Nodes that can take their part.
    pub fitting: usize,
    /// Why others cannot, in words.
    refusals: String,
}

impl Shortage {
    /// Why a job waits.
    pub fn reason(&self, spec: &JobSpec) -> String {
        format!("waiting: {} of {} nodes; {}", self.fitting, spec.min_nodes, self.refusals)
    }
}

/// Places one gang: as many nodes as fit, between `min_nodes` and `max_nodes`, in address order.
pub fn solve<'a>(spec: &JobSpec, nodes: impl IntoIterator<Item = &'a Node>) -> Plan {
    match place(spec, nodes, &mut 0) {
        Ok(placements) => Plan::Place(placements),
        Err(shortage) => Plan::Wait(shortage.reason(spec)),
    }
}

/// As [`solve`], with what was seen. `steps` counts what it takes beyond a look at each node.
pub(crate) fn place<'a>(
    spec: &JobSpec,
    nodes: impl IntoIterator<Item = &'a Node>,
    steps: &mut u64,
) -> Result<Vec<NodePlacement>, Shortage> {
    let need = Need::from(spec);
    let mut fitting = Vec::new();
    let mut refusals = Refusals::default();
    for node in nodes {
        match misfit(&need, node) {
            None => fitting.push(node),
            Some(why) => refusals.add(node, why),
        }
    }
    if fitting.len() < spec.min_nodes as usize {
        return Err(Shortage { fitting: fitting.len(), refusals: refusals.words(fitting.len()) });
    }
    let wanted = spec.max_nodes as usize;
    let healthy = |node: &&Node| node.health.verdict() == Verdict::Healthy;
    if fitting.iter().filter(|node| healthy(node)).count() >= wanted {
        fitting.retain(healthy);
    }
    // The first node's address is what every rank is told: one on loopback is only good where all
    // nodes are one machine's.
    let by_address = |a: &&Node, b: &&Node| {
        let key = |node: &Node| (node.place_in_run(), node.address.is_loopback(), node.address);
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    };
    let first = fitting.first().map(|node| &node.location);
    if fitting.iter().all(|node| Some(&node.location) == first) || spec.node_selector.contains_key(RUN_LABEL)
    {
        // A small job in a large cluster need not have all of it sorted.
        if wanted < fitting.len() {
            fitting.select_nth_unstable_by(wanted, by_address);
            fitting.truncate(wanted);
        }
        fitting.sort_by(by_address);
    } else {
        let (chosen, taken) = topology::choose(fitting, wanted, by_address);
        *steps += taken;
        fitting = chosen;
        fitting.sort_by(|a, b| a.location.cmp(&b.location).then_with(|| by_address(a, b)));
    }
    let gpus = need.amount.gpus as usize;
    let placements = (0_u32..).zip(fitting).map(|(group_rank, node)| NodePlacement {
        node: node.name.clone(),
        address: node.address,
        group_rank,
        first_rank: Rank(group_rank * spec.procs_per_node),
        procs: spec.procs_per_node,
        gpus: near_gpus(node, gpus),
    });
    Ok(placements.collect())
}

/// Free GPUs of a node, those of one NUMA node where one has enough: the one with the fewest to spare, so that the next gang
/// finds others together. In the order of their NUMA nodes, so that those of a rank are near to each other.
fn near_gpus(node: &Node, count: usize) -> Vec<u32> {
    let mut groups: BTreeMap<Option<u32>, Vec<u32>> = BTreeMap::new();
    for gpu in node.free_gpus() {
        groups.entry(gpu.numa_node).or_default().push(gpu.index);
    }
    let enough = groups.values().filter(|group| group.len() >= count).min_by_key(|group| group.len());
    if let Some(group) = enough {
        return group.iter().copied().take(count).collect();
    }
    let mut groups: Vec<(Option<u32>, Vec<u32>)> = groups.into_iter().collect();
    groups.sort_by_key(|(_, group)| std::cmp::Reverse(group.len()));
    let mut left = count;
    for (_, group) in &mut groups {
        group.truncate(left);
        left -= group.len();
    }
    groups.sort_by_key(|(numa, _)| *numa);
    groups.into_iter().flat_map(|(_, group)| group).collect()
}

/// How many nodes can take their part.
pub(crate) fn count_fitting<'a>(need: &Need, nodes: impl IntoIterator<Item = &'a Node>) -> usize {
    nodes.into_iter().filter(|node| misfit(need, node).is_none()).count()
}
