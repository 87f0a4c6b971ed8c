//! The coordinator under test: a process that is killed and started again, and what it says of its jobs and nodes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use muster_proto::v1::{self, job_service_client::JobServiceClient, node_service_client::NodeServiceClient};
use muster_tests::binary;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tonic::transport::{Channel, Endpoint};

/// Submissions under way at once.
const SUBMITS_MAX: usize = 64;
/// The most that the lists give at once.
const PAGE: u32 = 1000;
/// Clock ticks of /proc in a second: the same on every Linux.
const TICKS: f64 = 100.0;

/// The process.
pub struct Coordinator {
    child: Child,
    dir: PathBuf,
    lives: u32,
    is_encrypted: bool,
    /// Where it listens.
    pub address: String,
}

impl Coordinator {
    /// Starts it on a directory, on a free port; encrypted with certificates that it makes there.
    pub async fn start(dir: PathBuf, is_encrypted: bool) -> Self {
        if is_encrypted {
            muster(&["pki", "init", "--dir", &tls_dir(&dir)]);
        }
        let child = spawn(&dir, 0, "127.0.0.1:0", is_encrypted);
        let mut this = Self { child, dir, lives: 0, is_encrypted, address: String::new() };
        this.address = this.listening().await;
        this
    }

    /// By which nodes call it.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.is_encrypted { "https" } else { "http" }, self.address)
    }

    /// Makes a token by which so many nodes get their certificates; the file with it.
    pub fn join_token(&self, nodes: usize) -> PathBuf {
        let args = ["token", "create", "--role", "node", "--uses", &nodes.to_string()];
        let text = muster(&[&args[..], &["--coordinator", &self.socket()]].concat());
        let file = self.dir.join("join");
        std::fs::write(&file, text).expect("a token can be written");
        file
    }

    /// Its Unix socket, by which this program calls it.
    fn socket(&self) -> String {
        format!("unix:{}", self.dir.join("data/muster.sock").display())
    }

    /// Kills it without a chance to do anything.
    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// Starts it again on the same directory and port; returns once it listens.
    pub async fn restart(&mut self) {
        self.lives += 1;
        self.child = spawn(&self.dir, self.lives, &self.address, self.is_encrypted);
        self.listening().await;
    }

    async fn listening(&mut self) -> String {
        loop {
            let log = self.log(self.lives);
            let first = log.lines().next().and_then(|line| serde_json::from_str::<Value>(line).ok());
            if let Some(address) = first.as_ref().and_then(|line| line["listening"].as_str()) {
                return address.to_owned();
            }
            let ended = self.child.try_wait().expect("it is ours");
            assert!(ended.is_none(), "the coordinator ended: {log}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn log(&self, life: u32) -> String {
        std::fs::read_to_string(self.dir.join(format!("log-{life}"))).unwrap_or_default()
    }

    /// Lines of the current life's log that contain this.
    pub fn logged(&self, what: &str) -> usize {
        self.log(self.lives).lines().filter(|line| line.contains(what)).count()
    }

    /// Seconds of processor time, and the high-water mark of memory in MiB.
    pub fn cost(&self) -> (f64, f64) {
        cost(&self.child.id().to_string())
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(self.socket()).expect("a valid URL");
        endpoint.connect().await.expect("the coordinator is there")
    }

    /// Submits these jobs, and returns once all are stored.
    pub async fn submit(&self, specs: Vec<v1::JobSpec>) {
        let client = JobServiceClient::new(self.channel().await);
        let permits = Arc::new(Semaphore::new(SUBMITS_MAX));
        let mut all = tokio::task::JoinSet::new();
        for spec in specs {
            let permit = permits.clone().acquire_owned().await.expect("it is not closed");
            let mut client = client.clone();
            all.spawn(async move {
                let request = v1::SubmitJobRequest { request_id: String::new(), spec: Some(spec) };
                client.submit_job(request).await.expect("it is taken");
                drop(permit);
            });
        }
        all.join_all().await;
    }

    /// Every job.
    pub async fn jobs(&self) -> Vec<v1::Job> {
        let mut client = JobServiceClient::new(self.channel().await).max_decoding_message_size(8 << 20);
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = v1::ListJobsRequest { page_size: PAGE, page_token, ..Default::default() };
            let page = client.list_jobs(request).await.expect("jobs are listed").into_inner();
            all.extend(page.jobs);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return all;
            }
        }
    }

    /// How many nodes are ready, of how many.
    pub async fn nodes(&self) -> (usize, usize) {
        let mut client = NodeServiceClient::new(self.channel().await).max_decoding_message_size(8 << 20);
        let (mut ready, mut known, mut page_token) = (0, 0, String::new());
        loop {
            let request = v1::ListNodesRequest { page_size: PAGE, page_token };
            let page = client.list_nodes(request).await.expect("nodes are listed").into_inner();
            known += page.nodes.len();
            ready += page.nodes.iter().filter(|node| node.state() == v1::NodeState::Ready).count();
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return (ready, known);
            }
        }
    }

    /// What it has lost or started again although nobody died, besides what the nodes see.
    pub async fn losses(&self) -> Value {
        let jobs = self.jobs().await;
        let restarted = jobs.iter().filter(|job| job.generation() > 1 || job.restarts_used() > 0).count();
        json!({"nodes_lost": self.logged("node lost"), "jobs_restarted": restarted})
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What a command of the command line prints.
fn muster(args: &[&str]) -> String {
    let ended = Command::new(binary("muster")).args(args).output().expect("muster can be started");
    assert!(ended.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ended.stderr));
    String::from_utf8_lossy(&ended.stdout).into_owned()
}

fn tls_dir(dir: &Path) -> String {
    dir.join("tls").display().to_string()
}

fn spawn(dir: &Path, life: u32, listen: &str, is_encrypted: bool) -> Child {
    let log = std::fs::File::create(dir.join(format!("log-{life}"))).expect("a log can be made");
    let data_dir = dir.join("data");
    let mut command = Command::new(binary("muster"));
    command.args(["coordinator", "--exit-with-stdin", "--listen", listen, "--data-dir"]).arg(data_dir);
    if is_encrypted {
        command.args(["--tls-dir", &tls_dir(dir)]);
    }
    command
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("muster can be started")
}

/// Of a process, or of this one as `self`.
pub fn cost(pid: &str) -> (f64, f64) {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    let fields: Vec<&str> =
        stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    // User and system time; the state is the third field of the file and the first of these.
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    let status = read("status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    let peak: f64 = peak.trim().trim_end_matches("kB").trim().parse().unwrap_or(0.0);
    ((ticks(11) + ticks(12)) / TICKS, peak / 1024.0)
}
