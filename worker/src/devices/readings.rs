//! One look at the machine's health: what it has now, what its ports have counted, and how much room is left.

use std::fs;
use std::path::Path;

use muster_worker_core::health::{Readings, Space};
use nix::sys::statvfs::statvfs;

use super::{Machine, fabric};

impl Machine {
    /// Reads everything. Blocks for as long as the GPU driver does.
    pub fn readings(&self, data_dir: &Path) -> Result<Readings, String> {
        let inventory = self.inventory()?;
        let ports = inventory.fabric_ports.iter();
        let counters = ports.map(|port| (port.name(), fabric::counters(&self.sys, port))).collect();
        Ok(Readings { counters, disk: disk(data_dir), memory: memory(), inventory, checks: Vec::new() })
    }
}

/// Of the file system that a directory is on.
pub(super) fn disk(dir: &Path) -> Option<Space> {
    let found = statvfs(dir).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.fragment_size());
    Some(Space { free_bytes: bytes(found.blocks_available()), total_bytes: bytes(found.blocks()) })
}

fn memory() -> Option<Space> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some(Space { free_bytes: bytes("MemAvailable:")?, total_bytes: bytes("MemTotal:")? })
}
