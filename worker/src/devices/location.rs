//! Where Slurm says that this machine is in the network.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use muster_worker_core::slurm::{Network, Switches};
use tracing::warn;

/// Most of a topology.conf that is read: that of a hundred thousand nodes has a few MiB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Labels for what the file says of this machine, or else what the environment does. `name` is the node's; machines are also
/// known by their host name and by what Slurm calls them.
pub(crate) fn labels(
    file: Option<&Path>,
    name: &str,
    others: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, String> {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(path) = file else {
        let address = variable("SLURM_TOPOLOGY_ADDR").unwrap_or_default();
        let pattern = variable("SLURM_TOPOLOGY_ADDR_PATTERN").unwrap_or_default();
        let node = variable("SLURMD_NODENAME").unwrap_or_default();
        return Ok(Switches::of_environment(&address, &pattern, &node).labels(others));
    };
    let text = read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    // As slurmctld takes it: from where the file is.
    let beside = path.parent().unwrap_or(Path::new(""));
    let include = |name: &str| read(&beside.join(name)).map_err(|error| error.to_string());
    let network = Network::read(&path.display().to_string(), &text, &include)?;
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let short = host.split('.').next().unwrap_or_default().to_owned();
    let names = [variable("SLURMD_NODENAME").unwrap_or_default(), name.to_owned(), host, short];
    let found = names.iter().map(|name| network.find(name)).find(|found| *found != Switches::default());
    if found.is_none() {
        warn!(file = %path.display(), node = %name, "this node is not in it; where it is in the network is not known");
    }
    Ok(found.unwrap_or_default().labels(others))
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}
