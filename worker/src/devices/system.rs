//! Processors, memory and limits: of the machine, or of the control group that the daemon is in where that is less.

use std::fs;
use std::path::{Path, PathBuf};

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
        found.total = Resources {
            gpus: 0,
            cpu_millis: cpu_millis(self.root, allowed_cpus().0.len()),
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

/// The thousandths of a core that the daemon may use: those of its processors, or the limit of its control group, or of one
/// above it, where that is less. A limit may be below one core.
fn cpu_millis(root: &Path, allowed: usize) -> u32 {
    let all = u64::try_from(allowed.max(1)).unwrap_or(u64::MAX).saturating_mul(1000);
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let limit = |group: PathBuf| {
        let read = |name: &str| fs::read_to_string(group.join(name)).ok();
        let (quota, period) = match read("cpu.max") {
            Some(max) => {
                let (quota, period) = max.trim().split_once(' ')?;
                (number(quota)?, number(period)?)
            }
            None => (number(&read("cpu.cfs_quota_us")?)?, number(&read("cpu.cfs_period_us")?)?),
        };
        quota.saturating_mul(1000).checked_div(period)
    };
    let limits = groups(root, "cpu").into_iter().filter_map(limit);
    let millis = limits.min().map_or(all, |limit| limit.clamp(1, all));
    u32::try_from(millis).unwrap_or(u32::MAX)
}

/// The directories of the daemon's control group and of those above it, for one controller. In a container the daemon's group is
/// the root of what it sees; under systemd it is further down.
fn groups(root: &Path, controller: &str) -> Vec<PathBuf> {
    let listed = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut all = Vec::new();
    for line in listed.lines() {
        let Some((controllers, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':'))
        else {
            continue;
        };
        let mount = match controllers {
            "" => root.join("sys/fs/cgroup"),
            _ if controllers.split(',').any(|one| one == controller) => {
                // Those that are mounted together have a link with the name of each.
                root.join("sys/fs/cgroup").join(controller)
            }
            _ => continue,
        };
        let above = Path::new(path.trim_start_matches('/')).ancestors();
        all.extend(above.map(|group| mount.join(group)));
    }
    all
}

/// The machine's memory, or the limit of the daemon's control group, or of one above it, where that is less.
fn memory_bytes(root: &Path) -> u64 {
    let info = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let machine = kib.unwrap_or(0) * 1024;
    // The second is that of the first version.
    let files = ["memory.max", "memory.limit_in_bytes"];
    let limits = groups(root, "memory").into_iter().flat_map(|group| files.map(|file| group.join(file)));
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

    type Files<'a> = &'a [(&'a str, &'a str)];

    #[test]
    fn processors_are_the_tightest_limit_which_may_be_below_one_core() {
        let v2 = "0::/pod.slice/muster\n";
        let v1 = "4:cpu,cpuacct:/a/b\n1:name=systemd:/\n";
        let table: [(&str, Files<'_>, u32); 8] = [
            ("0::/\n", &[], 4000),
            ("0::/\n", &[("cpu.max", "50000 100000\n")], 500),
            ("0::/\n", &[("cpu.max", "max 100000\n")], 4000),
            ("0::/\n", &[("cpu.max", "250000 100000\n")], 2500),
            (v2, &[("pod.slice/cpu.max", "150000 100000\n"), ("pod.slice/muster/cpu.max", "max 1\n")], 1500),
            ("0::/\n", &[("cpu.max", "900000 100000\n")], 4000),
            (v1, &[("cpu/a/cpu.cfs_quota_us", "20000\n"), ("cpu/a/cpu.cfs_period_us", "100000\n")], 200),
            (v1, &[("cpu/a/b/cpu.cfs_quota_us", "-1\n"), ("cpu/a/b/cpu.cfs_period_us", "100000\n")], 4000),
        ];
        for (group, files, expected) in table {
            let root = tempfile::tempdir().unwrap();
            write(root.path(), "proc/self/cgroup", group);
            for (file, text) in files {
                write(root.path(), &format!("sys/fs/cgroup/{file}"), text);
            }
            assert_eq!(cpu_millis(root.path(), 4), expected, "{files:?}");
        }
    }

    #[test]
    fn this_machine_has_cores_memory_and_limits() {
        let mut found = Inventory::default();
        System { root: Path::new("/") }.discover(&mut found);
        assert!(found.total.cpu_millis > 0 && found.total.memory_bytes > 1 << 20, "{found:?}");
        assert!(found.open_files_max.is_none_or(|files| files > 3), "{found:?}");
        assert!(!allowed_cpus().0.is_empty());
    }
}
