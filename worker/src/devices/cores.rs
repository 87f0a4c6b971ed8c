//! What processors share, from sysfs, for those who bind ranks to them.

use std::collections::BTreeMap;
use std::path::Path;

use muster_core::types::CpuList;
use muster_worker_core::{Processor, Topology};

use super::{Machine, allowed_cpus, entries, number, text};

/// The machine's processors and GPUs, those of `visible` alone if it lists them by number, as CUDA_VISIBLE_DEVICES does.
pub(crate) fn topology(machine: &Machine, visible: Option<&str>) -> Result<Topology, String> {
    let found = machine.inventory()?;
    let list = |text: &str| text.parse::<CpuList>().ok();
    let nodes = found.numa_nodes.iter().filter_map(|node| Some((node.id, list(&node.cpus)?))).collect();
    // Where there is but one node, the kernel does not say to which a device is attached.
    let numa = |index: usize| found.gpus.get(index).map(|gpu| gpu.numa_node.unwrap_or(0));
    let chosen: Option<Vec<usize>> =
        visible.and_then(|list| list.split(',').map(|index| index.trim().parse().ok()).collect());
    let chosen = chosen.unwrap_or_else(|| (0..found.gpus.len()).collect());
    // As CUDA does, with the first that is not there ends the list.
    let gpus = chosen.into_iter().map_while(numa).collect();
    Ok(Topology { processors: processors(&machine.sys), nodes, gpus, allowed: allowed_cpus() })
}

fn processors(sys: &Path) -> BTreeMap<u32, Processor> {
    let all = sys.join("devices/system/cpu");
    let processor = |name: String| {
        let cpu: u32 = name.strip_prefix("cpu")?.parse().ok()?;
        let dir = all.join(&name);
        let first = |path: &Path| {
            let list = text(path)?.parse::<CpuList>().ok()?;
            list.0.first().copied()
        };
        let package = number(&dir.join("topology/physical_package_id"))?;
        let core = first(&dir.join("topology/thread_siblings_list"))?;
        let cache = dir.join("cache");
        let holds_data = |name: &String| {
            let kind = text(&cache.join(name).join("type")).unwrap_or_default();
            name.starts_with("index") && ["Unified", "Data"].contains(&kind.as_str())
        };
        let largest = entries(&cache)
            .into_iter()
            .filter(holds_data)
            .max_by_key(|name| number::<u32>(&cache.join(name).join("level")));
        let shared = largest.and_then(|name| first(&cache.join(name).join("shared_cpu_list")));
        Some((cpu, Processor { package, core, cache: shared.unwrap_or(core) }))
    };
    entries(&all).into_iter().filter_map(processor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_processors_share_is_read_as_the_kernel_shows_it() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join("devices/system/cpu").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for cpu in [2, 10] {
            write(&format!("cpu{cpu}/topology/physical_package_id"), "1\n");
            write(&format!("cpu{cpu}/topology/thread_siblings_list"), "2,10\n");
            let caches = [("Data", "1", "2,10"), ("Instruction", "9", "0-63"), ("Unified", "3", "0-7")];
            for (index, (kind, level, shared)) in caches.into_iter().enumerate() {
                write(&format!("cpu{cpu}/cache/index{index}/type"), kind);
                write(&format!("cpu{cpu}/cache/index{index}/level"), level);
                write(&format!("cpu{cpu}/cache/index{index}/shared_cpu_list"), shared);
            }
        }
        // One that is offline, and what is no processor.
        write("cpu3/online", "0");
        write("cpufreq/boost", "1");
        let expected = Processor { package: 1, core: 2, cache: 0 };
        assert_eq!(processors(root.path()), [(2, expected), (10, expected)].into());
        assert!(!processors(Path::new("/sys")).is_empty(), "this machine has some");
    }
}
