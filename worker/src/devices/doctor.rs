//! Looks at a host before its first job. What that means is decided in the core (`muster_worker_core::doctor`).

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use muster_core::types::Millis;
use muster_worker_core::doctor::{Diagnosis, Facts, examine};

use super::{Given, Machine, entries, network, readings};
use crate::clock::unix_now;

/// Time for a host to answer.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Ports that are tried of another host: torch's own, and one of those that the system chooses.
const PORTS: [u16; 2] = [29_500, 45_678];

/// What the doctor is asked to look at.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Stands in the place of `/sys`.
    pub sysfs_root: Option<PathBuf>,
    /// Says what the machine has that is not there.
    pub given: Option<Given>,
    /// The daemon's data directory.
    pub data_dir: PathBuf,
    /// The coordinator, and why it cannot be reached.
    pub coordinator: Option<(String, Option<String>)>,
    /// The coordinator's time.
    pub coordinator_time: Option<Millis>,
    /// Other hosts.
    pub peers: Vec<String>,
}

/// Looks at everything. Blocks for as long as hosts do not answer. An error says what is wrong with the description.
pub fn diagnose(asked: Asked) -> Result<Vec<Diagnosis>, String> {
    // Read before anything that takes time.
    let now = unix_now();
    let skew_ms = asked.coordinator_time.map(|theirs| theirs.0.abs_diff(now.0));
    let own = asked.sysfs_root.is_none() && asked.given.is_none();
    let machine = Machine::new(asked.sysfs_root, asked.given, BTreeMap::new());
    let peers = std::thread::scope(|scope| {
        let asking: Vec<_> =
            asked.peers.iter().map(|peer| (peer.clone(), scope.spawn(move || reach(peer)))).collect();
        asking.into_iter().map(|(peer, answer)| (peer, answer.join().unwrap_or(None))).collect()
    });
    Ok(examine(&Facts {
        inventory: machine.inventory()?,
        verbs: own.then(verbs),
        peer_memory: own.then(|| Path::new("/sys/module/nvidia_peermem").exists()),
        disk: asked.data_dir.ancestors().find_map(readings::disk),
        address: network::address_for_others().map(|address| address.to_string()),
        coordinator: asked.coordinator,
        skew_ms,
        peers,
    }))
}

/// The devices by which programs reach fabric ports. They are opened: in a container a listing says nothing.
fn verbs() -> BTreeMap<String, Option<String>> {
    let dir = Path::new("/dev/infiniband");
    let devices = entries(dir).into_iter().filter(|name| name.starts_with("uverbs"));
    let open = |name: String| {
        let path = dir.join(name);
        let why = OpenOptions::new().read(true).write(true).open(&path).err();
        (path.display().to_string(), why.map(|error| error.to_string()))
    };
    devices.map(open).collect()
}

/// Why a host's ports cannot be reached. One that refuses a connection is reached: nothing listens there yet.
fn reach(host: &str) -> Option<String> {
    for port in PORTS {
        let mut addresses = match (host, port).to_socket_addrs() {
            Ok(addresses) => addresses,
            Err(error) => return Some(format!("its name is not known here: {error}")),
        };
        let address = addresses.next()?;
        match TcpStream::connect_timeout(&address, ANSWER_MAX) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                return Some(format!(
                    "{address} does not answer: a firewall drops what is sent there, or the host is off"
                ));
            }
            Err(error) => return Some(format!("{address} cannot be reached: {error}")),
        }
    }
    None
}
