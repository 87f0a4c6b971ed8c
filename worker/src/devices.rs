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

/// What this machine has, as far as this process may use it.
pub(crate) fn here(labels: BTreeMap<String, String>) -> Inventory {
    inventory(Path::new("/"), std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(), labels)
}

/// The kernel's id of this boot.
pub(crate) fn boot_id(root: &Path) -> String {
    let id = fs::read_to_string(root.join("proc/sys/kernel/random/boot_id")).unwrap_or_default();
    id.trim().to_owned()
}

/// The machine's memory, or the limit of the daemon's control group, or of one above it, where that is less.
fn memory_bytes(root: &Path) -> u64 {
    let info = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let machine = kib.unwrap_or(0) * 1024;
    // In a container the daemon's group is the root of what it sees; under systemd it is further down.
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let places = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        match controllers {
            "" => Some(("sys/fs/cgroup", "memory.max", path)),
            "memory" => Some(("sys/fs/cgroup/memory", "memory.limit_in_bytes", path)),
            _ => None,
        }
    });
    let limits = places.flat_map(|(mount, file, path)| {
        let above = Path::new(path.trim_start_matches('/')).ancestors();
        above.map(|group| root.join(mount).join(group).join(file)).collect::<Vec<_>>()
    });
    let limit = limits.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok()).min();
    limit.map_or(machine, |limit: u64| limit.min(machine))
}

/// NVIDIA's driver shows one directory per GPU, named by its place on the bus. Their order is the index: that of
/// nvidia-smi and of CUDA_DEVICE_ORDER=PCI_BUS_ID, also in a container that shows only some GPUs, where the device
/// minor is not. Only those in `visible`, the daemon's own CUDA_VISIBLE_DEVICES, are ours to give.
fn gpus(root: &Path, visible: Option<&str>) -> Vec<Device> {
    let Ok(entries) = fs::read_dir(root.join("proc/driver/nvidia/gpus")) else { return Vec::new() };
    let mut places: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    places.sort();
    let read = |place: &std::path::PathBuf| fs::read_to_string(place.join("information")).ok();
    let texts = places.iter().filter_map(read);
    let mut found: Vec<Device> = (0..)
        .zip(texts)
        .map(|(index, text)| {
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_prefix(':'));
                line.map(|value| value.trim().to_owned()).unwrap_or_default()
            };
            // The driver's files do not tell the memory; NVML does, once it is used.
            Device { index, uuid: field("GPU UUID"), model: field("Model"), memory_bytes: 0 }
        })
        .collect();
    if let Some(visible) = visible {
        let wanted: Vec<&str> = visible.split(',').map(str::trim).collect();
        found.retain(|gpu| wanted.iter().any(|w| *w == gpu.index.to_string() || *w == gpu.uuid));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// As a container shows them that was given the upper GPUs of its machine.
    fn fake_gpus(count: u32) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for i in 0..count {
            let minor = i + 4;
            let text = format!("Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-{i}\nDevice Minor: \t {minor}\n");
            write(root.path(), &format!("proc/driver/nvidia/gpus/0000:{i}a:00.0/information"), &text);
        }
        root
    }

    #[test]
    fn memory_is_the_tightest_limit() {
        let v2 = "0::/system.slice/muster.service\n";
        let v1 = "9:cpu,cpuacct:/a\n8:memory:/a/b\n1:name=systemd:/\n";
        let table: [(&str, &str, &str, u64); 6] = [
            ("0::/\n", "sys/fs/cgroup/memory.max", "1048576\n", 1 << 20),
            ("0::/\n", "sys/fs/cgroup/memory.max", "max\n", 4 << 30),
            (v2, "sys/fs/cgroup/system.slice/muster.service/memory.max", "1048576\n", 1 << 20),
            (v2, "sys/fs/cgroup/system.slice/memory.max", "1048576\n", 1 << 20),
            (v1, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n", 1 << 20),
            (v1, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n", 4 << 30),
        ];
        for (group, file, limit, expected) in table {
            let root = tempfile::tempdir().unwrap();
            write(root.path(), "proc/meminfo", "MemTotal:        4194304 kB\nMemFree: 1 kB\n");
            write(root.path(), "proc/self/cgroup", group);
            write(root.path(), file, limit);
            assert_eq!(memory_bytes(root.path()), expected, "{file}");
        }
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
