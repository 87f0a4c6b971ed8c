//! What this machine has: providers, each of which adds what it finds to one inventory. They read files that the kernel
//! shows and ask the GPU driver; they change nothing and decide nothing.
//!
//! A tree that a test made can stand in the place of `/sys`, and a file can say what a machine has that is not there.

mod cores;
pub mod doctor;
pub(crate) mod fabric;
mod given;
mod gpus;
pub(crate) mod location;
pub(crate) mod network;
mod numa;
mod pci;
mod readings;
mod system;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use muster_core::Inventory;

pub(crate) use cores::topology;
pub use given::Given;
pub(crate) use system::allowed_cpus;

/// Where GPUs, ports, processors and limits are found.
pub(crate) trait Discovery {
    /// Adds what it finds.
    fn discover(&self, found: &mut Inventory);
}

/// The providers of one machine, and what was said about it on the command line.
#[derive(Debug)]
pub(crate) struct Machine {
    sys: PathBuf,
    labels: BTreeMap<String, String>,
    given: Option<Given>,
    gpus: gpus::Gpus,
}

impl Machine {
    /// This machine, with `sys` in the place of `/sys` and with what a file says of it.
    pub fn new(sys: Option<PathBuf>, given: Option<Given>, labels: BTreeMap<String, String>) -> Self {
        let sys = sys.unwrap_or_else(|| "/sys".into());
        Self { sys, labels, given, gpus: gpus::Gpus::by_driver() }
    }

    /// This machine as far as files show it: loading the GPU driver's library can take seconds.
    pub fn at_a_glance(labels: BTreeMap<String, String>) -> Self {
        Self { sys: "/sys".into(), labels, given: None, gpus: gpus::Gpus::by_files() }
    }

    /// What the machine has now. The error says what is wrong with the file that describes it. May take seconds.
    pub fn inventory(&self) -> Result<Inventory, String> {
        let mut found = Inventory { version: env!("CARGO_PKG_VERSION").to_owned(), ..Inventory::default() };
        let sys = self.sys.as_path();
        let providers: [&dyn Discovery; 5] = [
            &system::System { root: Path::new("/") },
            &numa::Numa { sys },
            &network::Network { sys },
            &fabric::Fabric { sys },
            &self.gpus,
        ];
        for provider in providers {
            provider.discover(&mut found);
        }
        if let Some(given) = &self.given {
            given.merge_into(&mut found)?;
        }
        found.labels.extend(self.labels.clone());
        found.total.gpus = found.gpus.len() as u32;
        pci::relate(sys, &mut found);
        Ok(found)
    }
}

/// The kernel's id of this boot.
pub(crate) fn boot_id(root: &Path) -> String {
    let id = fs::read_to_string(root.join("proc/sys/kernel/random/boot_id")).unwrap_or_default();
    id.trim().to_owned()
}

/// A file's text without the line's end; none if it is not there or empty.
fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// A number in a file.
fn number<T: std::str::FromStr>(path: &Path) -> Option<T> {
    text(path)?.parse().ok()
}

/// The entries of a directory by name, numbers in names counted as such: `mlx5_2` is before `mlx5_10`.
fn entries(dir: &Path) -> Vec<String> {
    let Ok(listed) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        listed.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_by_cached_key(|name| {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        (stem.to_owned(), name[stem.len()..].parse::<u64>().ok(), name.clone())
    });
    names
}
