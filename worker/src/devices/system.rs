//! Processors, memory and limits: of the machine, or of the control group that the daemon is in where that is less.

use std::fs;
use std::path::Path;

use muster_core::Inventory;
use muster_core::types::{CpuList, Resources};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

use super::Discovery;

/// What every machine has. `root` is `/`, or a tree that a test made.
pub(super) struct System<'a> {
    pub root: &'a Path,
}

impl Discovery for System<'_> {
    fn discover(&self, found: &mut Inventory) {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        found.total = Resources {
            gpus: 0,
            cpu_millis: u32::try_from(cores * 1000).unwrap_or(u32::MAX),
            memory_bytes: memory_bytes(self.root),
        };
        let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        found.hostname = hostname.unwrap_or_default();
        let shm = statvfs(&self.root.join("dev/shm")).ok();
        found.shm_bytes = shm.map_or(0, |shm| shm.blocks() * shm.fragment_size());
        found.memlock_bytes = limit(Resource::RLIMIT_MEMLOCK);
        found.open_files_max = limit(Resource::RLIMIT_NOFILE);
    }
}

/// The limit that ranks inherit; none without one.
fn limit(what: Resource) -> Option<u64> {
    getrlimit(what).ok().map(|(soft, _)| soft).filter(|soft| *soft != RLIM_INFINITY)
}

/// The processors that this process may use.
pub(crate) fn allowed_cpus() -> CpuList {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return CpuList::default() };
    let all = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
    CpuList(all.map(|cpu| cpu as u32).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
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
    fn this_machine_has_cores_memory_and_limits() {
        let mut found = Inventory::default();
        System { root: Path::new("/") }.discover(&mut found);
        assert!(found.total.cpu_millis >= 1000 && found.total.memory_bytes > 1 << 20, "{found:?}");
        assert!(found.open_files_max.is_none_or(|files| files > 3), "{found:?}");
        assert!(!allowed_cpus().0.is_empty());
    }
}
