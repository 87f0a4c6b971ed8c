//! NUMA nodes that have processors, from sysfs.

use std::path::Path;

use muster_core::{Inventory, NumaNode};

use super::{Discovery, entries, text};

/// Most nodes that are listed; the API takes no more.
const NODES_MAX: usize = 256;

pub(super) struct Numa<'a> {
    pub sys: &'a Path,
}

impl Discovery for Numa<'_> {
    fn discover(&self, found: &mut Inventory) {
        let dir = self.sys.join("devices/system/node");
        let node = |name: String| {
            let id = name.strip_prefix("node")?.parse().ok()?;
            // Memory without processors (of a GPU, say) is near to no rank.
            let cpus = text(&dir.join(&name).join("cpulist"))?;
            let memory = text(&dir.join(&name).join("meminfo")).unwrap_or_default();
            let total = memory.lines().find_map(|line| line.split_once("MemTotal:"));
            let kib =
                total.and_then(|(_, rest)| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
            Some(NumaNode { id, cpus, memory_bytes: kib.unwrap_or(0) * 1024 })
        };
        found.numa_nodes = entries(&dir).into_iter().filter_map(node).take(NODES_MAX).collect();
    }
}
