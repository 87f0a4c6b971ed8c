//! Which processors each rank of a command gets that asks for `--numa-binding`: torch's four ways, by the same rules
//! (`torch/numa/binding.py` of 2.11).

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use muster_core::types::CpuList;

/// How ranks are bound to processors near their GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumaBinding {
    /// All of the GPU's NUMA node.
    Node,
    /// All of the socket that its node is on.
    Socket,
    /// A part of the node's physical cores that no other GPU's rank has.
    Exclusive,
    /// Those that share one last-level cache, another for each GPU where there are enough.
    CoreComplex,
}

impl FromStr for NumaBinding {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "node" => Ok(Self::Node),
            "socket" => Ok(Self::Socket),
            "exclusive" => Ok(Self::Exclusive),
            "core-complex" => Ok(Self::CoreComplex),
            _ => Err(format!("{text:?} is none of node, socket, exclusive and core-complex")),
        }
    }
}

/// What is shared by a processor with others, each named by the first that shares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Its socket.
    pub package: u32,
    /// Its physical core.
    pub core: u32,
    /// Its largest cache.
    pub cache: u32,
}

/// A machine as far as this goes by it.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Processors by number.
    pub processors: BTreeMap<u32, Processor>,
    /// Processors of each NUMA node.
    pub nodes: BTreeMap<u32, CpuList>,
    /// The NUMA node of each GPU, in the order in which ranks get them.
    pub gpus: Vec<u32>,
    /// Processors that may be used at all.
    pub allowed: CpuList,
}

impl Topology {
    /// The processors of the rank with a local rank, which has the GPU of that number.
    pub fn bind(&self, binding: NumaBinding, local_rank: u32) -> Result<CpuList, String> {
        let count = self.gpus.len();
        let node = *(self.gpus.get(local_rank as usize)).ok_or_else(|| match count {
            0 => "this machine shows no GPU to which ranks could be near".to_owned(),
            _ => format!("local rank {local_rank} has no GPU: there are {count}"),
        })?;
        let cpus = match binding {
            NumaBinding::Node => self.of_node(node)?,
            NumaBinding::Socket => {
                let package = self.package(node)?;
                let same = self.nodes.keys().filter(|node| self.package(**node) == Ok(package));
                same.filter_map(|node| self.of_node(*node).ok()).flatten().collect()
            }
            NumaBinding::Exclusive => self.exclusive(node, local_rank)?,
            NumaBinding::CoreComplex => {
                let mut caches: Vec<(u32, BTreeSet<u32>)> =
                    self.grouped(node, |processor| processor.cache)?.into_iter().collect();
                // Those with the most processors first.
                caches.sort_by_key(|(first, cpus)| (std::cmp::Reverse(cpus.len()), *first));
                let at = self.place(node, local_rank).0 % caches.len().max(1);
                caches.into_iter().nth(at).map(|(_, cpus)| cpus).unwrap_or_default()
            }
        };
        if cpus.is_empty() {
            return Err(format!("this process may use no processor of NUMA node {node}"));
        }
        Ok(CpuList(cpus))
    }

    fn of_node(&self, node: u32) -> Result<BTreeSet<u32>, String> {
        let all = self.nodes.get(&node).ok_or_else(|| format!("the kernel shows no NUMA node {node}"))?;
        Ok(all.and(&self.allowed).0)
    }

    fn package(&self, node: u32) -> Result<u32, String> {
        let cpus = self.of_node(node)?;
        let first = cpus.first().and_then(|cpu| self.processors.get(cpu));
        first.map(|first| first.package).ok_or_else(|| format!("the socket of NUMA node {node} is not known"))
    }

    /// Which of the node's GPUs it is, and how many there are.
    fn place(&self, node: u32, local_rank: u32) -> (usize, usize) {
        let of_node = |gpus: &[u32]| gpus.iter().filter(|gpu| **gpu == node).count();
        (of_node(&self.gpus[..local_rank as usize]), of_node(&self.gpus))
    }

    fn grouped(
        &self,
        node: u32,
        by: impl Fn(&Processor) -> u32,
    ) -> Result<BTreeMap<u32, BTreeSet<u32>>, String> {
        let mut groups: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for cpu in self.of_node(node)? {
            let processor = self.processors.get(&cpu);
            let processor = processor.ok_or_else(|| format!("the kernel does not show processor {cpu}"))?;
            groups.entry(by(processor)).or_default().insert(cpu);
        }
        Ok(groups)
    }

    fn exclusive(&self, node: u32, local_rank: u32) -> Result<BTreeSet<u32>, String> {
        let cores = self.grouped(node, |processor| processor.core)?;
        let (at, gpus) = self.place(node, local_rank);
        if cores.len() < gpus {
            return Err(format!("NUMA node {node} has {} cores for {gpus} GPUs", cores.len()));
        }
        // The first get one more where it does not come out even.
        let (each, more) = (cores.len() / gpus, cores.len() % gpus);
        let (first, count) = (at * each + at.min(more), each + usize::from(at < more));
        Ok(cores.into_values().skip(first).take(count).flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sockets of two NUMA nodes of eight processors each: four cores of two threads, in two core complexes.
    fn machine(gpus: &[u32]) -> Topology {
        let processor = |cpu: u32| {
            let core = cpu % 16;
            (cpu, Processor { package: core / 8, core, cache: core - core % 2 })
        };
        let node = |node: u32| {
            let first = node * 4;
            (node, CpuList((first..first + 4).chain(first + 16..first + 20).collect()))
        };
        Topology {
            processors: (0..32).map(processor).collect(),
            nodes: (0..4).map(node).collect(),
            gpus: gpus.to_vec(),
            allowed: CpuList((0..32).collect()),
        }
    }

    #[test]
    fn ranks_are_bound_as_torch_binds_them() {
        use NumaBinding::{CoreComplex, Exclusive, Node, Socket};
        let gpus = [1, 1, 1, 2];
        // Local ranks 0 to 2 share a node, and 3 has one of its own.
        let table = [
            (Node, ["4-7,20-23", "4-7,20-23", "4-7,20-23", "8-11,24-27"]),
            (Socket, ["0-7,16-23", "0-7,16-23", "0-7,16-23", "8-15,24-31"]),
            (Exclusive, ["4-5,20-21", "6,22", "7,23", "8-11,24-27"]),
            (CoreComplex, ["4-5,20-21", "6-7,22-23", "4-5,20-21", "8-9,24-25"]),
        ];
        for (binding, expected) in table {
            let bound = |rank| machine(&gpus).bind(binding, rank).map(|cpus| cpus.to_string());
            assert_eq!([0, 1, 2, 3].map(|rank| bound(rank).unwrap()), expected, "{binding:?}");
        }
    }

    #[test]
    fn what_cannot_be_bound_says_why() {
        use NumaBinding::{Exclusive, Node};
        let allowed = |cpus: &[u32], gpus: &[u32]| Topology {
            allowed: CpuList(cpus.iter().copied().collect()),
            ..machine(gpus)
        };
        let table = [
            (machine(&[]), Node, 0, "shows no GPU"),
            (machine(&[0]), Node, 1, "local rank 1 has no GPU: there are 1"),
            (machine(&[7]), Node, 0, "no NUMA node 7"),
            (allowed(&[0, 1], &[1]), Node, 0, "may use no processor of NUMA node 1"),
            (machine(&[1; 5]), Exclusive, 4, "has 4 cores for 5 GPUs"),
        ];
        for (machine, binding, rank, words) in table {
            let why = machine.bind(binding, rank).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
        // What is not allowed is left out, and the larger complex comes first.
        let some = allowed(&[4, 6, 7, 22], &[1, 1]);
        let bound = [0, 1].map(|rank| some.bind(NumaBinding::CoreComplex, rank).unwrap().to_string());
        assert_eq!(bound, ["6-7,22", "4"]);
    }
}
