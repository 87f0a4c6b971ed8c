//! Where nodes are in the network, and which of them a gang gets so that a ring through its ranks crosses the fewest
//! uplinks.
//!
//! A ring that goes leaf by leaf, spine by spine and zone by zone leaves each of them once, and no ring through the same
//! nodes leaves fewer. So what it crosses follows from how many of each the gang is on: the number of leaves, plus that of
//! spines, plus that of zones, each counted only where there are several.

use std::collections::BTreeMap;

use crate::node::Node;

/// Labels that name the widest part of the network that a node is in, the first that is there.
const ZONE: [&str; 4] = [
    "zone",
    "topology.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/zone",
    "topology.k8s.aws/network-node-layer-1",
];
/// Labels that name the switches above its leaf.
const SPINE: [&str; 5] = [
    "spine",
    "network.topology.nvidia.com/spine",
    "network.topology.kubernetes.io/spine",
    "topology.k8s.aws/network-node-layer-2",
    "cloud.google.com/gce-topology-block",
];
/// Labels that name the switch it is attached to.
const LEAF: [&str; 7] = [
    "leaf",
    "network.topology.nvidia.com/leaf",
    "network.topology.kubernetes.io/leaf",
    "topology.k8s.aws/network-node-layer-3",
    "cloud.google.com/gce-topology-subblock",
    "topology.kubernetes.io/rack",
    "rack",
];
/// Most steps that the search may take; beyond it the nodes are taken leaf by leaf, the largest first. A cluster of ten
/// thousand nodes on five hundred leaves of four zones needs two thirds of it.
const STEPS_MAX: u64 = 16 << 20;

/// Where a node is. Empty where its labels do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    zone: String,
    spine: String,
    leaf: String,
}

impl Location {
    /// As labels say.
    pub fn of(labels: &BTreeMap<String, String>) -> Self {
        let first =
            |names: &[&str]| names.iter().find_map(|name| labels.get(*name)).cloned().unwrap_or_default();
        Self { zone: first(&ZONE), spine: first(&SPINE), leaf: first(&LEAF) }
    }

    /// Zone, spine and leaf; nothing if none is known.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        let known = *self != Self::default();
        [self.zone.as_str(), &self.spine, &self.leaf].into_iter().filter(move |_| known)
    }

    /// Uplinks that a connection between two nodes goes up by: 0 below one leaf, 3 between zones.
    pub fn uplinks_to(&self, other: &Self) -> u32 {
        match () {
            () if self.zone != other.zone => 3,
            () if self.spine != other.spine => 2,
            () if self.leaf != other.leaf => 1,
            () => 0,
        }
    }
}

/// Nodes that are attached to the same switch, in the order of their addresses.
type Leaf<'a> = Vec<&'a Node>;

/// Leaves of one spine, the largest first, with how many nodes the first so many have.
struct Spine<'a> {
    leaves: Vec<Leaf<'a>>,
    sums: Vec<usize>,
}

/// Chooses `wanted` of the nodes so that a ring through them, in the order of their locations, crosses the fewest uplinks.
/// `by_address` orders nodes that are as good. Also gives how many steps that took.
pub(crate) fn choose<'a>(
    nodes: Vec<&'a Node>,
    wanted: usize,
    by_address: impl Fn(&&Node, &&Node) -> std::cmp::Ordering,
) -> (Vec<&'a Node>, u64) {
    let steps = nodes.len() as u64;
    if wanted >= nodes.len() {
        return (nodes, steps);
    }
    let mut tree: BTreeMap<&str, BTreeMap<&str, BTreeMap<&str, Leaf<'a>>>> = BTreeMap::new();
    for node in nodes {
        let at = &node.location;
        tree.entry(&at.zone)
            .or_default()
            .entry(&at.spine)
            .or_default()
            .entry(&at.leaf)
            .or_default()
            .push(node);
    }
    let spine = |leaves: BTreeMap<&str, Leaf<'a>>| {
        let mut leaves: Vec<Leaf<'a>> = leaves.into_values().collect();
        for leaf in &mut leaves {
            leaf.sort_by(&by_address);
        }
        // Stable: among leaves of a size the order of their names holds.
        leaves.sort_by_key(|leaf| std::cmp::Reverse(leaf.len()));
        let mut sums = vec![0];
        sums.extend(leaves.iter().scan(0, |sum, leaf| {
            *sum += leaf.len();
            Some(*sum)
        }));
        Spine { leaves, sums }
    };
    let zones: Vec<Vec<Spine<'a>>> =
        tree.into_values().map(|spines| spines.into_values().map(spine).collect()).collect();
    let (mut leaves, searched) = search(&zones, wanted);
    // The smallest is the one that is not used up.
    leaves.sort_by_key(|leaf| std::cmp::Reverse(leaf.len()));
    (leaves.into_iter().flatten().copied().take(wanted).collect(), steps + searched)
}

/// What a ring crosses.
fn cost(zones: usize, spines: usize, leaves: usize) -> usize {
    [zones, spines, leaves].into_iter().filter(|count| *count > 1).sum()
}

/// The leaves to take nodes from: those with the fewest crossings, and of those the ones with the fewest nodes to spare.
fn search<'t, 'a>(zones: &'t [Vec<Spine<'a>>], wanted: usize) -> (Vec<&'t Leaf<'a>>, u64) {
    let all = || zones.iter().flatten().flat_map(|spine| &spine.leaves);
    // Often one leaf is enough; the smallest that is leaves the larger ones whole.
    if let Some(leaf) = all().filter(|leaf| leaf.len() >= wanted).min_by_key(|leaf| leaf.len()) {
        return (vec![leaf], all().count() as u64);
    }
    let greedy = greedy(zones, wanted);
    let fewest = fewest_leaves(all().map(Vec::len).collect(), wanted);
    // Spines beside the fewest leaves that hold the gang, and no more than the greedy choice crosses in all. One spine
    // costs nothing, and is always allowed.
    let spines = (greedy.1.saturating_sub(fewest)).max(1);
    let size = Size {
        zones: zones.len().min(spines),
        spines: zones.iter().map(Vec::len).sum::<usize>().min(spines),
        leaves: greedy.1,
    };
    let widest = zones.iter().flatten().map(|spine| spine.leaves.len().min(size.leaves) as u64);
    let steps = widest.sum::<u64>().saturating_mul(size.len() as u64);
    if steps > STEPS_MAX {
        return (greedy.0, all().count() as u64);
    }
    let mut table = Table::new(size);
    for zone in zones {
        table.begin_zone();
        for spine in zone {
            table.add(spine);
        }
    }
    let chosen = table.best(wanted).map(|best| table.trace(best, zones));
    (chosen.unwrap_or(greedy.0), steps)
}

/// How many leaves of these sizes hold the gang, wherever they are.
fn fewest_leaves(mut sizes: Vec<usize>, wanted: usize) -> usize {
    sizes.sort_unstable_by_key(|size| std::cmp::Reverse(*size));
    let sums = sizes.iter().scan(0, |sum, size| {
        *sum += size;
        Some(*sum)
    });
    1 + sums.take_while(|sum| *sum < wanted).count()
}

/// Leaves zone by zone and spine by spine, the largest first; and what that crosses, above which nothing needs a look.
fn greedy<'t, 'a>(zones: &'t [Vec<Spine<'a>>], wanted: usize) -> (Vec<&'t Leaf<'a>>, usize) {
    let nodes =
        |zone: &[Spine<'_>]| zone.iter().map(|spine| spine.sums.last().copied().unwrap_or(0)).sum::<usize>();
    let mut order: Vec<&Vec<Spine<'a>>> = zones.iter().collect();
    order.sort_by_key(|zone| std::cmp::Reverse(nodes(zone)));
    let (mut taken, mut leaves, mut counts) = (0, Vec::new(), (0, 0));
    for zone in order {
        if taken < wanted {
            counts.0 += 1;
        }
        let mut spines: Vec<&Spine<'a>> = zone.iter().collect();
        spines.sort_by_key(|spine| std::cmp::Reverse(spine.sums.last().copied()));
        for spine in spines {
            if taken < wanted {
                counts.1 += 1;
            }
            for leaf in &spine.leaves {
                if taken < wanted {
                    taken += leaf.len();
                    leaves.push(leaf);
                }
            }
        }
    }
    let crossed = cost(counts.0, counts.1, leaves.len());
    (leaves, crossed)
}

/// How many zones, spines and leaves a choice may have.
#[derive(Clone, Copy)]
struct Size {
    zones: usize,
    spines: usize,
    leaves: usize,
}

/// A choice so far: how many of each, and whether something of the present zone is in it.
#[derive(Clone, Copy, Debug)]
struct State {
    zones: usize,
    in_zone: bool,
    spines: usize,
    leaves: usize,
}

impl Size {
    fn len(self) -> usize {
        (self.zones + 1) * 2 * (self.spines + 1) * (self.leaves + 1)
    }

    fn index(self, at: State) -> usize {
        let zone = at.zones * 2 + usize::from(at.in_zone);
        (zone * (self.spines + 1) + at.spines) * (self.leaves + 1) + at.leaves
    }

    fn states(self) -> impl Iterator<Item = State> {
        (0..=self.zones).flat_map(move |zones| {
            [false, true].into_iter().flat_map(move |in_zone| {
                (0..=self.spines).flat_map(move |spines| {
                    (0..=self.leaves).map(move |leaves| State { zones, in_zone, spines, leaves })
                })
            })
        })
    }
}

/// Where a state came from.
#[derive(Clone, Copy, Debug, Default)]
struct Step {
    /// Leaves taken of the spine.
    taken: usize,
    /// Whether it was the first of its zone; or, at the beginning of a zone, whether the zone before was in use.
    switched: bool,
}

/// The most nodes that each number of zones, spines and leaves can have, spine by spine: a knapsack.
struct Table {
    size: Size,
    most: Vec<Option<usize>>,
    /// What was done for each spine; before those of a zone, marked so, what its beginning changed.
    steps: Vec<(bool, Vec<Step>)>,
}

impl Table {
    fn new(size: Size) -> Self {
        let mut most = vec![None; size.len()];
        most[size.index(State { zones: 0, in_zone: false, spines: 0, leaves: 0 })] = Some(0);
        Self { size, most, steps: Vec::new() }
    }

    fn begin_zone(&mut self) {
        let mut steps = vec![Step::default(); self.size.len()];
        for used in self.size.states().filter(|state| state.in_zone) {
            let (from, to) = (self.size.index(used), self.size.index(State { in_zone: false, ..used }));
            let most = self.most[from].take();
            if most > self.most[to] {
                self.most[to] = most;
                steps[to].switched = true;
            }
        }
        self.steps.push((true, steps));
    }

    fn add(&mut self, spine: &Spine<'_>) {
        let before = self.most.clone();
        let mut steps = vec![Step::default(); self.size.len()];
        for from in self.size.states() {
            let Some(most) = before[self.size.index(from)] else { continue };
            let zones = from.zones + usize::from(!from.in_zone);
            if zones > self.size.zones || from.spines == self.size.spines {
                continue;
            }
            let room = self.size.leaves - from.leaves;
            for (taken, sum) in spine.sums.iter().enumerate().skip(1).take(room) {
                let to = State { zones, in_zone: true, spines: from.spines + 1, leaves: from.leaves + taken };
                let to = self.size.index(to);
                if self.most[to] < Some(most + sum) {
                    self.most[to] = Some(most + sum);
                    steps[to] = Step { taken, switched: !from.in_zone };
                }
            }
        }
        self.steps.push((false, steps));
    }

    fn best(&self, wanted: usize) -> Option<State> {
        let enough = |state: &State| self.most[self.size.index(*state)].filter(|most| *most >= wanted);
        let all = self.size.states().filter_map(|state| Some((state, enough(&state)?)));
        let best = all.min_by_key(|(state, most)| (cost(state.zones, state.spines, state.leaves), *most));
        best.map(|(state, _)| state)
    }

    /// The leaves of a choice, back from its last spine.
    fn trace<'t, 'a>(&self, mut at: State, zones: &'t [Vec<Spine<'a>>]) -> Vec<&'t Leaf<'a>> {
        let mut spines = zones.iter().flatten().rev();
        let mut leaves = Vec::new();
        for (begins_zone, steps) in self.steps.iter().rev() {
            let step = steps[self.size.index(at)];
            if *begins_zone {
                at.in_zone |= step.switched;
                continue;
            }
            let Some(spine) = spines.next() else { break };
            if step.taken > 0 {
                leaves.extend(&spine.leaves[..step.taken]);
                at.spines -= 1;
                at.leaves -= step.taken;
                if step.switched {
                    (at.zones, at.in_zone) = (at.zones - 1, false);
                }
            }
        }
        leaves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_kubernetes_and_of_clouds_say_where_a_node_is() {
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
        let table: [Case<'_>; 6] = [
            (&[("zone", "z"), ("spine", "s"), ("leaf", "l")], &["z", "s", "l"]),
            (&[("topology.kubernetes.io/zone", "z"), ("topology.kubernetes.io/rack", "r")], &["z", "", "r"]),
            (
                &[("network.topology.nvidia.com/spine", "s"), ("network.topology.nvidia.com/leaf", "l")],
                &["", "s", "l"],
            ),
            (
                &[
                    ("topology.k8s.aws/network-node-layer-1", "1"),
                    ("topology.k8s.aws/network-node-layer-2", "2"),
                    ("topology.k8s.aws/network-node-layer-3", "3"),
                ],
                &["1", "2", "3"],
            ),
            // What is said plainly comes first.
            (&[("zone", "mine"), ("topology.kubernetes.io/zone", "theirs")], &["mine", "", ""]),
            (&[("rackety", "x")], &[]),
        ];
        for (labels, expected) in table {
            let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let location = Location::of(&labels);
            assert_eq!(location.parts().collect::<Vec<_>>(), expected, "{labels:?}");
        }
    }
}
