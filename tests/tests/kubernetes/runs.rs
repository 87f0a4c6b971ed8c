//! What the overlay for trying it says, done on a simulated network: the arguments of its pods, their probes, and the README's
//! first job.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use muster_tests::{
    Netns, Outcome, binary, eventually, grpcurl_path, netns_address, netns_address_v6, python,
};
use serde_json::Value;

use crate::flags::expanded;
use crate::objects::{Objects, list, text};
use crate::root;

/// Name of the one coordinator's pod, as DNS has it.
const COORDINATOR: &str = "muster-coordinator-0.muster-coordinator";

/// A container's program on a host of its own. Dropped, it is killed.
pub(crate) struct Pod<'a> {
    container: &'a Value,
    process: Child,
    netns: &'a Netns,
    host: usize,
}

impl<'a> Pod<'a> {
    /// Starts the first container of a workload.
    pub fn start(objects: &'a Objects, workload: &str, netns: &'a Netns, host: usize, dir: &Path) -> Self {
        let workloads = objects.workloads();
        let workload = workloads.iter().find(|one| one.name == workload).unwrap();
        let container = workload.containers().next().unwrap();
        let data = dir.join("data").display().to_string();
        let arguments = expanded(objects, container).into_iter().map(|one| one.replace("/var/lib", &data));
        let (_, map) = objects.of_kind("ConfigMap").into_iter().next().unwrap();
        let urls = text(&map["data"]["coordinators"]).replace(COORDINATOR, &netns_address(0));
        let prefix = netns.prefix(host);
        let log = std::fs::File::create(dir.join(format!("{host}.log"))).unwrap();
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(binary("muster")).args(arguments).env("MUSTER_COORDINATOR", urls);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { container, process, netns, host }
    }

    /// Asks as the kubelet does until each of its probes is content.
    pub fn is_well(&self) {
        let mut asked = 0;
        let probes = ["startupProbe", "livenessProbe", "readinessProbe"].map(|probe| &self.container[probe]);
        // The kubelet asks at the pod's first address, which is of either family.
        let v6 = self.netns.has_v6().then(|| format!("[{}]", netns_address_v6(self.host)));
        let addresses: Vec<String> = [netns_address(self.host)].into_iter().chain(v6).collect();
        for (address, probe) in addresses.iter().flat_map(|address| probes.map(|probe| (address, probe))) {
            let (grpc, http) = (&probe["grpc"], &probe["httpGet"]);
            let command = if grpc.is_object() {
                let url = format!("http://{address}:{}", grpc["port"]);
                let muster = binary("muster").display().to_string();
                let service = text(&grpc["service"]).to_owned();
                [&muster, "healthcheck", "--coordinator", &url, "--service", &service]
                    .map(str::to_owned)
                    .to_vec()
            } else if http.is_object() {
                let ports = list(&self.container["ports"]);
                let port = ports.iter().find(|port| port["name"] == http["port"]).unwrap();
                let url = format!("http://{address}:{}{}", port["containerPort"], text(&http["path"]));
                let program = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)";
                [python(), "-c", program, &url].map(str::to_owned).to_vec()
            } else {
                continue;
            };
            asked += 1;
            eventually("a probe's consent", || {
                let outcome = self.run(&command);
                if outcome.code == 0 { Ok(()) } else { Err(outcome) }
            });
        }
        assert!(asked > 0, "it has probes");
    }

    /// Runs a program on the same host.
    pub fn run(&self, words: &[String]) -> Outcome {
        let prefix = self.netns.prefix(self.host);
        let mut command = Command::new(&prefix[0]);
        Outcome::of(command.args(&prefix[1..]).args(words).env_remove("MUSTER_COORDINATOR"))
    }

    /// Submits the README's job with the README's words, and waits until it has succeeded.
    pub fn run_the_first_job(&self) {
        let readme = std::fs::read_to_string(root().join("deploy/kubernetes/README.md")).unwrap();
        let (_, rest) = readme.split_once("grpcurl -plaintext -d '").unwrap();
        let (job, _) = rest.split_once('\'').unwrap();
        let address = format!("{}:7070", netns_address(self.host));
        let grpcurl = grpcurl_path().unwrap().display().to_string();
        let call = |method: &str, request: &str| {
            let words = [&grpcurl, "-plaintext", "-d", request, &address, method].map(str::to_owned);
            self.run(&words).json().remove(0)
        };
        let submitted = call("muster.v1.JobService/SubmitJob", job);
        let asked = serde_json::json!({ "jobId": submitted["job"]["id"] }).to_string();
        eventually("the job's end", || {
            let job = call("muster.v1.JobService/GetJob", &asked);
            if job["job"]["state"] == "JOB_STATE_SUCCEEDED" { Ok(()) } else { Err(job) }
        });
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}
