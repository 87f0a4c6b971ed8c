//! The harness of the end-to-end tests: real daemons as processes, the real command line, the real grpcurl.
//! Nothing here links the code under test.

#![expect(clippy::unwrap_used, reason = "a harness fails a test by panicking")]
#![expect(clippy::disallowed_methods, reason = "tests wait on the clock of the machine")]

mod bed;
mod buildah;
mod cluster;
mod etcd;
mod http;
mod machine;
mod netns;
mod place;
mod several;
mod slurm;
mod tools;

use std::fmt::Debug;
use std::time::{Duration, Instant};

pub use bed::{BEATS, Beat, Bed, beats};
pub use buildah::{Buildah, Container};
pub use cluster::{Clocks, Cluster, Daemon, Settings, address_of, http_address};
pub use etcd::{Etcd, has_etcd};
pub use http::http_get;
pub use machine::{FakeMachine, RAILS, Rail};
pub use netns::{Cut, Netns, address as netns_address, address_v6 as netns_address_v6};
pub use place::{Nodes, Place, files, free_port, lines, run_dir};
pub use several::{FAST, Several};
pub use slurm::{Options as SlurmOptions, Slurm};
pub use tools::{
    Outcome, binary, brought, deployed, faketime_path, grpcurl, grpcurl_path, ibstat_path, processors,
    prometheus_path, python, skip, torch_python, torchrun_python, trainer, user,
};

/// Longest wait for anything: far above what a loaded two-core machine needs.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// Waits until `look` gives something, and fails with what it saw last.
pub fn eventually<T, E: Debug>(what: &str, mut look: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => assert!(Instant::now() < deadline, "{what} did not happen; last seen: {seen:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process of this id is there (a zombie is not).
pub fn is_running(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Processes whose command line or environment contains `mark`.
pub fn processes_with(mark: &str) -> Vec<(i32, String)> {
    let me = i32::try_from(std::process::id()).unwrap();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let text = |file: &str| {
            let bytes = std::fs::read(entry.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let command = text("cmdline");
        if pid != me && is_running(pid) && (command.contains(mark) || text("environ").contains(mark)) {
            found.push((pid, command));
        }
    }
    found
}
