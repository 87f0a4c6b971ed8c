//! Placement as a function: a spec and the nodes in, a gang or the reason why not out.
//!
//! Goals, in order: a gang is placed whole or not at all; no device has two owners; the answer depends only
//! on the arguments; whoever waits is told what for. Ranks are ordered by node address, then name: rank 0's
//! node first, ranks contiguous on each node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::node::{Node, NodeState};
use crate::types::{JobSpec, NodeName, NodePlacement, Rank, Resources};

/// Refusals spelled out in a reason; the rest are counted, so that a reason stays a sentence.
const REFUSALS_SHOWN_MAX: usize = 3;

/// A node as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// Name.
    pub name: &'a NodeName,
    /// Address, which orders the ranks.
    pub address: IpAddr,
    /// What no job holds.
    pub free: Resources,
    /// All it has.
    pub total: Resources,
    /// GPU indices that no job holds.
    pub free_gpus: Vec<u32>,
    /// Labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Jobs running there.
    pub jobs: usize,
    /// Why it takes no work at all, if it does not.
    pub closed: Option<String>,
}

impl<'a> From<&'a Node> for Candidate<'a> {
    fn from(node: &'a Node) -> Self {
        let because = |what: &str, why: &str| match why {
            "" => what.to_owned(),
            why => format!("{what} ({why})"),
        };
        let closed = match node.state {
            NodeState::Disconnected => Some("not connected".to_owned()),
            NodeState::Lost => Some("lost".to_owned()),
            NodeState::Left => Some("left".to_owned()),
            NodeState::Ready => None,
        };
        let closed = closed
            .or_else(|| Some(because("drained", &node.drain.as_ref()?.reason)))
            .or_else(|| Some(because("cordoned", node.cordon.as_ref()?)))
            .or_else(|| Some(because("leaving", node.leaving.as_ref()?)))
            .or_else(|| {
                let job = node.reserved.exclusive.as_ref()?;
                Some(format!("held by job {job}, which names no resources and so has its nodes for itself"))
            });
        Self {
            name: &node.name,
            address: node.address,
            free: node.free(),
            total: node.inventory.total,
            free_gpus: node.free_gpus().collect(),
            labels: &node.inventory.labels,
            jobs: node.reserved.jobs.len() + node.reserved.leftovers.len(),
            closed,
        }
    }
}

/// Where a gang goes, or why it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The placement, in rank order.
    Place(Vec<NodePlacement>),
    /// Why not, in words.
    Wait(String),
}

/// Places one gang: as many nodes as fit, between `min_nodes` and `max_nodes`, in address order.
pub fn solve<'a>(spec: &JobSpec, nodes: impl IntoIterator<Item = Candidate<'a>>) -> Plan {
    let mut fitting = Vec::new();
    let mut refusals = Vec::new();
    let mut refused = 0_usize;
    for node in nodes {
        match refusal(spec, &node) {
            None => fitting.push(node),
            Some(why) => {
                refused += 1;
                if refusals.len() < REFUSALS_SHOWN_MAX {
                    refusals.push(format!("{} refused: {why}", node.name));
                }
            }
        }
    }
    if fitting.len() < spec.min_nodes as usize {
        return Plan::Wait(reason(spec, fitting.len(), refused, &refusals));
    }
    fitting.sort_by(|a, b| (a.address, a.name).cmp(&(b.address, b.name)));
    fitting.truncate(spec.max_nodes as usize);
    Plan::Place((0_u32..).zip(fitting).map(|(group_rank, node)| place(spec, group_rank, node)).collect())
}

fn place(spec: &JobSpec, group_rank: u32, node: Candidate<'_>) -> NodePlacement {
    let gpus = spec.per_proc.gpus as usize * spec.procs_per_node as usize;
    NodePlacement {
        node: node.name.clone(),
        address: node.address,
        group_rank,
        first_rank: Rank(group_rank * spec.procs_per_node),
        procs: spec.procs_per_node,
        gpus: node.free_gpus.into_iter().take(gpus).collect(),
    }
}

/// Why a node cannot take its part of the gang.
fn refusal(spec: &JobSpec, node: &Candidate<'_>) -> Option<String> {
    if let Some(why) = &node.closed {
        return Some(why.clone());
    }
    for (key, value) in &spec.node_selector {
        match node.labels.get(key) {
            Some(label) if label == value => {}
            Some(label) => return Some(format!("label {key} is {label:?}, not {value:?}")),
            None => return Some(format!("has no label {key}")),
        }
    }
    if spec.per_proc.is_zero() {
        // Without named resources nothing says how much of a node the ranks will use: all of it.
        return (node.jobs > 0).then(|| {
            format!("runs {} other jobs, and this one names no resources to share it with them", node.jobs)
        });
    }
    let need = spec.per_proc.times(spec.procs_per_node);
    let (free, total) = (node.free, node.total);
    if (node.free_gpus.len() as u64) < u64::from(need.gpus) {
        return Some(format!("{} of {} GPUs free, {} needed", node.free_gpus.len(), total.gpus, need.gpus));
    }
    if free.cpu_millis < need.cpu_millis {
        let cores = |millis: u32| f64::from(millis) / 1000.0;
        let (free, total, need) = (cores(free.cpu_millis), cores(total.cpu_millis), cores(need.cpu_millis));
        return Some(format!("{free} of {total} CPU cores free, {need} needed"));
    }
    if free.memory_bytes < need.memory_bytes {
        let gib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 30));
        let (free, total, need) = (gib(free.memory_bytes), gib(total.memory_bytes), gib(need.memory_bytes));
        return Some(format!("{free} of {total} GiB memory free, {need} needed"));
    }
    None
}

fn reason(spec: &JobSpec, fitting: usize, refused: usize, refusals: &[String]) -> String {
    let mut parts = vec![format!("waiting: {fitting} of {} nodes", spec.min_nodes)];
    parts.extend_from_slice(refusals);
    match refused - refusals.len() {
        0 if refused == 0 => parts.push("no other node has joined".to_owned()),
        0 => {}
        more => parts.push(format!("{more} more refused")),
    }
    parts.join("; ")
}
