//! What is said on the command line about a machine: where its devices are looked for, and what it has that is not there.

use std::path::{Path, PathBuf};

use anyhow::Context;
use muster_cli::messages;
use muster_worker::Given;

/// Flags that tell a daemon, or the doctor, about its machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct MachineArgs {
    /// Directory that stands in the place of /sys where devices are looked for, for tests.
    #[arg(long, value_name = "DIR")]
    pub sysfs_root: Option<PathBuf>,
    /// What the machine has, as `muster node NAME --output json` shows it under inventory; for what is not named there the
    /// machine itself is asked. Makes a fake node, for tests.
    #[arg(long, value_name = "FILE")]
    pub inventory: Option<PathBuf>,
}

impl MachineArgs {
    /// Reads the file at each look.
    pub fn given(&self) -> Option<Given> {
        let path = self.inventory.clone()?;
        Some(Given::new(move || read(&path).map_err(|error| format!("{error:#}"))))
    }
}

fn read(path: &Path) -> anyhow::Result<muster_proto::v1::Inventory> {
    let of_file = || format!("failed to read the inventory in {}", path.display());
    let text = std::fs::read_to_string(path).with_context(of_file)?;
    let value = serde_json::from_str(&text).context("it is not valid JSON").with_context(of_file)?;
    messages::read("Inventory", value).with_context(of_file)
}
