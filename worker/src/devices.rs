//! What this machine has, read from files that the kernel shows. `root` is `/`, or a tree that a test made.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use muster_core::types::Resources;
use muster_core::{Device, Inventory};

/// What the machine has.
pub(crate) fn inventory(root: &Path, visible: Option<&str>, labels: BTreeMap<String, String>) -> Inventory {
    let gpus = gpus(root, visible);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let total = Resources {
        gpus: gpus.len() as u32,
        cpu_millis: u32::try_from(cores * 1000).unwrap_or(u32::MAX),
        memory_bytes: memory_bytes(root),
    };
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let version = env!("CARGO_PKG_VERSION").to_owned();
    Inventory { total, gpus, labels, hostname: hostname.unwrap_or_default(), version }
}

/// The kernel's id of this boot.
pub(crate) fn boot_id(root: &Path) -> String {
    let id = fs::read_to_string(root.join("proc/sys/kernel/random/boot_id")).unwrap_or_default();
    id.trim().to_owned()
}

/// The machine's memory, or the limit of the daemon's control group where that is less.
fn memory_bytes(root: &Path) -> u64 {
    let info = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let machine = kib.unwrap_or(0) * 1024;
    let limits = ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit =
        limits.iter().filter_map(|path| fs::read_to_string(root.join(path)).ok()?.trim().parse().ok()).min();
    limit.map_or(machine, |limit: u64| limit.min(machine))
}

/// NVIDIA's driver shows one directory per GPU. Only those in `visible`, the daemon's own
/// CUDA_VISIBLE_DEVICES, are ours to give.
fn gpus(root: &Path, visible: Option<&str>) -> Vec<Device> {
    let Ok(entries) = fs::read_dir(root.join("proc/driver/nvidia/gpus")) else { return Vec::new() };
    let mut found: Vec<Device> = entries
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.ok()?.path().join("information")).ok()?;
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_prefix(':'));
                line.map(|value| value.trim().to_owned())
            };
            let index = field("Device Minor")?.parse().ok()?;
            let (uuid, model) = (field("GPU UUID").unwrap_or_default(), field("Model").unwrap_or_default());
            // The driver's files do not tell the memory; NVML does, once it is used.
            Some(Device { index, uuid, model, memory_bytes: 0 })
        })
        .collect();
    found.sort_by_key(|gpu| gpu.index);
    if let Some(visible) = visible {
        let wanted: Vec<&str> = visible.split(',').map(str::trim).collect();
        found.retain(|gpu| wanted.iter().any(|w| *w == gpu.index.to_string() || *w == gpu.uuid));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake_gpus(count: u32) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for i in 0..count {
            let dir = root.path().join(format!("proc/driver/nvidia/gpus/0000:0{i}:00.0"));
            fs::create_dir_all(&dir).unwrap();
            let text = format!("Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-{i}\nDevice Minor: \t {i}\n");
            fs::write(dir.join("information"), text).unwrap();
        }
        root
    }

    #[test]
    fn gpus_are_those_the_driver_shows_and_the_daemon_may_see() {
        let root = fake_gpus(4);
        let indices = |visible| gpus(root.path(), visible).iter().map(|gpu| gpu.index).collect::<Vec<_>>();
        assert_eq!(indices(None), [0, 1, 2, 3]);
        assert_eq!(indices(Some("2,GPU-0")), [0, 2]);
        assert_eq!(indices(Some("")), [0; 0]);
        assert_eq!(gpus(root.path(), None)[1].model, "NVIDIA H100");
    }

    #[test]
    fn this_machine_has_cores_and_memory() {
        let found = inventory(Path::new("/"), None, BTreeMap::new());
        assert!(found.total.cpu_millis >= 1000 && found.total.memory_bytes > 1 << 20, "{found:?}");
    }
}
