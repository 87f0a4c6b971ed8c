//! The daemons of the demo: started as separate processes, and none left behind.
//!
//! Each gets the read end of a pipe as its standard input and ends when that does: however this process dies,
//! the kernel closes its end. Workers stop their ranks before they end; those of one that was killed end with its
//! lease.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use muster_proto::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use super::START_MAX;
use crate::client::Client;
use crate::exit::Failure;
use crate::output::say;

/// Time for a daemon to end in good order; above what a worker gives its ranks.
const STOP_MAX: Duration = Duration::from_secs(30);
/// Time between looks at what a daemon has done.
const POLL: Duration = Duration::from_millis(20);

pub(super) struct Daemons {
    binary: PathBuf,
    dir: PathBuf,
    /// In the order in which they were started.
    children: Vec<(String, Child)>,
}

impl Daemons {
    pub fn new(binary: PathBuf, dir: &Path) -> Self {
        Self { binary, dir: dir.to_owned(), children: Vec::new() }
    }

    /// Starts a coordinator on a free port and workers that know it. Returns the coordinator's URL.
    pub async fn start(&mut self, workers: u32) -> Result<String, Failure> {
        self.spawn("coordinator", &["coordinator", "--listen", "127.0.0.1:0", "--http-listen", "off"])?;
        let address = self.listening().await?;
        let url = format!("http://{address}");
        for number in 1..=workers {
            let name = format!("node-{number}");
            self.spawn(&name, &["worker", "--coordinator", &url, "--name", &name])?;
        }
        Ok(url)
    }

    /// Waits until every worker has joined.
    pub async fn wait_for_workers(&mut self, client: &Client, workers: u32) -> Result<(), Failure> {
        let deadline = tokio::time::Instant::now() + START_MAX;
        loop {
            let request = v1::ListNodesRequest::default();
            let nodes = client.nodes().list_nodes(request).await?.into_inner().nodes;
            let ready = nodes.iter().filter(|node| node.state() == v1::NodeState::Ready).count();
            if ready >= workers as usize {
                return Ok(());
            }
            self.check_alive(deadline, "the workers did not join")?;
            tokio::time::sleep(POLL).await;
        }
    }

    /// Workers first, so that they can say goodbye and stop their ranks; then the coordinator.
    pub async fn stop(&mut self) {
        while let Some((name, mut child)) = self.children.pop() {
            if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
                kill(Pid::from_raw(id), Signal::SIGTERM).ok();
            }
            if tokio::time::timeout(STOP_MAX, child.wait()).await.is_err() {
                say!("{name} did not end in time and is killed");
                child.kill().await.ok();
            }
        }
    }

    fn spawn(&mut self, name: &str, args: &[&str]) -> Result<(), Failure> {
        let log = std::fs::File::create(self.log(name)).context("failed to make a log file")?;
        let child = Command::new(&self.binary)
            .args(args)
            .arg("--exit-with-stdin")
            .arg("--data-dir")
            .arg(self.dir.join(name))
            .env_remove("MUSTER_COORDINATOR")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C in the terminal is for the demo, which then stops them in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("failed to start {}", self.binary.display()))?;
        self.children.push((name.to_owned(), child));
        Ok(())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// The address in the first line of the coordinator's log.
    async fn listening(&mut self) -> Result<String, Failure> {
        let deadline = tokio::time::Instant::now() + START_MAX;
        loop {
            let log = std::fs::read_to_string(self.log("coordinator")).unwrap_or_default();
            if let Some((first, _)) = log.split_once('\n') {
                let line: serde_json::Value = serde_json::from_str(first)
                    .with_context(|| format!("the coordinator did not start: {}", log.trim_end()))?;
                let address = line["listening"].as_str().context("the coordinator names no address")?;
                return Ok(address.to_owned());
            }
            self.check_alive(deadline, "the coordinator did not start")?;
            tokio::time::sleep(POLL).await;
        }
    }

    fn check_alive(&mut self, deadline: tokio::time::Instant, what: &str) -> Result<(), Failure> {
        for index in 0..self.children.len() {
            let (name, child) = &mut self.children[index];
            if let Ok(Some(status)) = child.try_wait() {
                let name = name.clone();
                let log = std::fs::read_to_string(self.log(&name)).unwrap_or_default();
                return Err(Failure::Other(anyhow::anyhow!(
                    "{name} ended with {status}:\n{}",
                    log.trim_end()
                )));
            }
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Failure::Other(anyhow::anyhow!("{what} within {START_MAX:?}")));
        }
        Ok(())
    }
}
