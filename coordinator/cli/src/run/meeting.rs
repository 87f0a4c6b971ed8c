//! Where the nodes of a run meet: nowhere, at a coordinator that is there, or at one that one of them serves.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use muster_core::types::{NodeName, RUN_LABEL, RUN_RANK_LABEL};
use muster_proto::v1;
use muster_worker::Attached;
use tokio::net::{TcpListener, UnixListener, lookup_host};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::TcpIncoming;

use super::Scratch;
use super::args::RunArgs;
use crate::args::{Global, Output};
use crate::client::{Client, Retries};
use crate::exit::Failure;

/// The port at which torchrun's nodes meet, if none is named.
const PORT_DEFAULT: u16 = 29400;
/// torchrun's time for all nodes to come.
const JOIN_TIMEOUT_DEFAULT: Duration = Duration::from_mins(10);
/// Where a run is on one node, its daemon and its coordinator are one process, and neither can lose the other.
const LEASE_ALONE: Duration = Duration::from_hours(24);
/// Time without a heartbeat after which a node of the run is lost.
const LEASE: Duration = Duration::from_secs(10);
/// Time between attempts to reach the coordinator.
const RETRY: Duration = Duration::from_millis(100);
/// Time for this node to take its leave, and for the others once the job has ended.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// Whether this node serves the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Serve {
    Yes,
    No,
    /// If the place is here, and nobody serves there yet.
    IfHere,
}

/// Where nodes meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is one node.
    Alone,
    /// At a coordinator that is there.
    Coordinator,
    /// At one of them.
    Peers(Serve),
}

/// The rendezvous as the command line has it.
#[derive(Clone, Debug)]
pub(super) struct Meeting {
    pub place: Place,
    host: String,
    port: u16,
    /// This node's place among them.
    rank: Option<u32>,
    join_timeout: Duration,
}

impl Meeting {
    pub fn of(args: &RunArgs) -> Result<Self, Failure> {
        let mut meeting = Self {
            place: Place::Alone,
            host: String::new(),
            port: 0,
            rank: None,
            join_timeout: JOIN_TIMEOUT_DEFAULT,
        };
        let is_host = meeting.configure(&args.rdzv_conf)?;
        if args.standalone && args.nnodes.max > 1 {
            return Err(Failure::Usage("--standalone is for one node; leave it out, or --nnodes".to_owned()));
        }
        let named = !args.rdzv_endpoint.is_empty();
        match args.rdzv_backend.as_str() {
            "muster" if !args.standalone => {
                let endpoint = if named { &args.rdzv_endpoint } else { "127.0.0.1:7070" };
                (meeting.host, meeting.port) = host_and_port(endpoint, 7070)?;
                meeting.place = Place::Coordinator;
            }
            "static" | "c10d" | "muster" if args.standalone || args.nnodes.max == 1 => {}
            "static" => {
                (meeting.host, meeting.port) = if named {
                    host_and_port(&args.rdzv_endpoint, args.master_port)?
                } else {
                    (args.master_addr.trim_matches(['[', ']']).to_owned(), args.master_port)
                };
                if args.node_rank >= args.nnodes.max {
                    let (rank, nodes) = (args.node_rank, args.nnodes.max);
                    return Err(Failure::Usage(format!("--node-rank {rank} is not below --nnodes {nodes}")));
                }
                meeting.rank = Some(args.node_rank);
                meeting.place = Place::Peers(if args.node_rank == 0 { Serve::Yes } else { Serve::No });
            }
            "c10d" if named => {
                (meeting.host, meeting.port) = host_and_port(&args.rdzv_endpoint, PORT_DEFAULT)?;
                meeting.place = Place::Peers(match is_host {
                    Some(true) => Serve::Yes,
                    Some(false) => Serve::No,
                    None => Serve::IfHere,
                });
            }
            "c10d" => {
                let why = "--rdzv-backend c10d needs --rdzv-endpoint, the host:port of one of the nodes";
                return Err(Failure::Usage(why.to_owned()));
            }
            other => {
                let why = "is not known here; use static, c10d, or muster with the endpoint of a coordinator";
                return Err(Failure::Usage(format!("--rdzv-backend {other} {why}")));
            }
        }
        if meeting.place != Place::Alone && meeting.port == 0 {
            return Err(Failure::Usage("nodes cannot meet at port 0; name one".to_owned()));
        }
        Ok(meeting)
    }

    /// Reads --rdzv-conf. Whether it says that this node serves.
    fn configure(&mut self, conf: &str) -> Result<Option<bool>, Failure> {
        let mut is_host = None;
        for pair in conf.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let bad = || Failure::Usage(format!("--rdzv-conf: {pair:?} is not understood"));
            let (key, value) = pair.split_once('=').ok_or_else(bad)?;
            match key.trim() {
                "join_timeout" | "timeout" => {
                    let seconds: f64 = value.trim().parse().map_err(|_| bad())?;
                    self.join_timeout = Duration::try_from_secs_f64(seconds).map_err(|_| bad())?;
                }
                "is_host" => {
                    is_host = Some(match value.trim().to_lowercase().as_str() {
                        "1" | "true" | "t" | "yes" | "y" => true,
                        "0" | "false" | "f" | "no" | "n" => false,
                        _ => return Err(bad()),
                    });
                }
                key => eprintln!("muster run: --rdzv-conf {key} has no effect here"),
            }
        }
        Ok(is_host)
    }

    /// Starts what runs in this process, and reaches the coordinator.
    pub async fn enter(
        &self,
        args: &RunArgs,
        run_id: &str,
        scratch: &Scratch,
        attached: Attached,
    ) -> Result<Node, Failure> {
        let broken = CancellationToken::new();
        let config = muster_coordinator::Config {
            store: muster_coordinator::StoreKind::Memory,
            lease: LEASE,
            ..muster_coordinator::Config::new(scratch.dir.path().join("coordinator"))
        };
        let (url, coordinator) = match self.place {
            Place::Alone => {
                let socket = scratch.socket();
                let listener = UnixListener::bind(&socket)
                    .context("failed to make a socket in the temporary directory")?;
                let heartbeat = LEASE_ALONE / 4;
                let config = muster_coordinator::Config { lease: LEASE_ALONE, heartbeat, ..config };
                let serving = serve(config, UnixListenerStream::new(listener), broken.clone());
                (format!("unix:{}", socket.display()), Some(serving))
            }
            Place::Coordinator => (self.url(), None),
            Place::Peers(wanted) => {
                let listener = bind(&self.host, self.port, wanted).await?;
                (
                    self.url(),
                    listener.map(|listener| serve(config, TcpIncoming::from(listener), broken.clone())),
                )
            }
        };
        let name = node_name(self.place == Place::Alone);
        let mut labels = std::collections::BTreeMap::from([(RUN_LABEL.to_owned(), run_id.to_owned())]);
        labels.extend(self.rank.map(|rank| (RUN_RANK_LABEL.to_owned(), rank.to_string())));
        let address = match &args.local_addr {
            Some(host) => Some(address_of(host).await?),
            None => None,
        };
        let worker = muster_worker::Config {
            address,
            labels,
            attached: Some(attached),
            ..muster_worker::Config::new(vec![url.clone()], name.clone(), scratch.dir.path().join("node"))
        };
        let stop = CancellationToken::new();
        let running = muster_worker::run(worker, stop.clone());
        let ends = broken.clone();
        let worker = tokio::spawn(async move {
            if let Err(error) = running.await {
                eprintln!("muster run: {error}");
                ends.cancel();
            }
        });
        let client = tokio::select! {
            client = reach(&url, self.join_timeout) => client?,
            () = broken.cancelled() => return Err(Failure::JobFailed),
        };
        Ok(Node {
            client,
            name,
            is_own: self.place != Place::Coordinator,
            join_timeout: self.join_timeout,
            is_alone: self.place == Place::Alone,
            broken,
            stop,
            worker: AbortOnDropHandle::new(worker),
            coordinator,
        })
    }

    fn url(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("http://{host}:{}", self.port)
    }
}

/// This node of the run.
pub(super) struct Node {
    pub client: Client,
    pub name: NodeName,
    /// The coordinator is there for this run alone.
    pub is_own: bool,
    pub join_timeout: Duration,
    /// The daemon or the coordinator in this process cannot go on; it was said why.
    pub broken: CancellationToken,
    is_alone: bool,
    stop: CancellationToken,
    worker: AbortOnDropHandle<()>,
    coordinator: Option<AbortOnDropHandle<()>>,
}

impl Node {
    /// Whoever serves a run of its own does not come back: once a lease has passed, the ranks have been stopped.
    pub fn retries(&self) -> Retries {
        if self.is_own { Retries::lasting(LEASE + LEASE / 10) } else { Retries::default() }
    }

    /// What it means that the coordinator is not heard any more.
    pub fn lost(&self, failure: Failure) -> Failure {
        let url = self.client.url();
        if !self.is_own {
            return failure;
        }
        eprintln!(
            "muster run: the node that serves the run at {url} is gone; the ranks here were stopped when the lease ended"
        );
        Failure::JobFailed
    }

    /// Takes leave. Whoever serves the run waits for the others, which still have to hear of its end.
    pub async fn leave(&self, job: Result<v1::Job, Failure>) -> Result<v1::Job, Failure> {
        if self.is_alone {
            return job;
        }
        self.stop.cancel();
        let gone = async {
            while !self.worker.is_finished() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            while self.coordinator.is_some() && self.others_are_here().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LEAVE_MAX, gone).await.ok();
        job
    }

    async fn others_are_here(&self) -> bool {
        let listed = self.client.nodes().list_nodes(v1::ListNodesRequest::default()).await;
        let nodes = listed.map(|response| response.into_inner().nodes).unwrap_or_default();
        nodes.iter().any(|node| node.state() == v1::NodeState::Ready)
    }
}

fn serve<I, C>(
    config: muster_coordinator::Config,
    connections: I,
    broken: CancellationToken,
) -> AbortOnDropHandle<()>
where
    I: tokio_stream::Stream<Item = io::Result<C>> + Send + 'static,
    C: tokio::io::AsyncRead
        + tokio::io::AsyncWrite
        + tonic::transport::server::Connected
        + Unpin
        + Send
        + 'static,
    C::ConnectInfo: Clone + Send + Sync + 'static,
{
    AbortOnDropHandle::new(tokio::spawn(async move {
        let served = muster_coordinator::run_on(config, connections, || (), CancellationToken::new()).await;
        if let Err(error) = served {
            eprintln!("muster run: {error}");
            broken.cancel();
        }
    }))
}

/// This machine's name, as far as it can be one. Several commands of one machine may meet.
fn node_name(is_alone: bool) -> NodeName {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let host =
        host.filter(|host| NodeName::new(host.clone()).is_ok()).unwrap_or_else(|| "localhost".to_owned());
    let own = uuid::Uuid::new_v4().simple().to_string();
    let name = if is_alone { host } else { format!("{}-{}", &host[..host.len().min(48)], &own[..8]) };
    NodeName::new(name).unwrap_or_else(|_| unreachable!("a host name and digits are a name"))
}

/// Takes the place, if it is this node's to take.
async fn bind(host: &str, port: u16, wanted: Serve) -> Result<Option<TcpListener>, Failure> {
    if wanted == Serve::No {
        return Ok(None);
    }
    let failed = |why: &str| anyhow::anyhow!("failed to serve the run at {host}:{port}: {why}");
    let found = lookup_host((host, port)).await.map_err(|error| failed(&error.to_string()))?;
    let mut last = "the name has no address".to_owned();
    for address in found {
        // Many machines have their own name stand for a loopback address, at which no other reaches them.
        let is_literal = host == "localhost" || host.parse::<IpAddr>().is_ok();
        let address = if address.ip().is_loopback() && !is_literal {
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
        } else {
            address
        };
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && wanted == Serve::IfHere => {
                return Ok(None);
            }
            Err(error) => last = error.to_string(),
        }
    }
    if wanted == Serve::IfHere { Ok(None) } else { Err(failed(&last).into()) }
}

async fn address_of(host: &str) -> Result<IpAddr, Failure> {
    let found =
        lookup_host((host, 0)).await.with_context(|| format!("--local-addr {host} has no address"))?;
    let mut addresses = found.map(|address| address.ip());
    addresses.next().ok_or_else(|| Failure::Usage(format!("--local-addr {host} has no address")))
}

/// Whoever serves may come later.
async fn reach(url: &str, limit: Duration) -> Result<Client, Failure> {
    let global = Global { coordinator: vec![url.to_owned()], output: Output::Text };
    let tried = async {
        loop {
            match Client::connect(&global).await {
                Err(Failure::Unreachable(_)) => tokio::time::sleep(RETRY).await,
                connected => return connected,
            }
        }
    };
    let late = || {
        Failure::Other(anyhow::anyhow!(
            "nobody serves the run at {url}; waited {} s (join_timeout)",
            limit.as_secs()
        ))
    };
    tokio::time::timeout(limit, tried).await.map_err(|_| late())?
}

fn host_and_port(endpoint: &str, default: u16) -> Result<(String, u16), Failure> {
    let bad = || Failure::Usage(format!("{endpoint:?} is not host:port"));
    let endpoint = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let (host, port) = match endpoint.rsplit_once(':') {
        Some((host, _)) if host.contains(':') && !host.starts_with('[') => (endpoint, None),
        Some((host, port)) if !endpoint.ends_with(']') => (host, Some(port)),
        _ => (endpoint, None),
    };
    let port = port.map_or(Ok(default), |port| port.parse().map_err(|_| bad()))?;
    let host = host.trim_matches(['[', ']']);
    if host.is_empty() { Err(bad()) } else { Ok((host.to_owned(), port)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    fn meeting(line: &str) -> Result<(Place, String, Option<u32>), String> {
        let words = ["muster", "run"].into_iter().chain(line.split_whitespace()).chain(["x"]);
        let Command::Run(args) = Args::try_parse_from(words).unwrap().command else { panic!("{line}") };
        match Meeting::of(&args) {
            Ok(meeting) => Ok((meeting.place, meeting.url(), meeting.rank)),
            Err(Failure::Usage(why)) => Err(why),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn nodes_meet_where_torchrun_s_would() {
        let c10d = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint";
        let muster = "--rdzv-backend muster";
        let peers = Place::Peers;
        let table = [
            ("", Place::Alone, "", None),
            ("--standalone --rdzv-backend c10d", Place::Alone, "", None),
            ("--rdzv-backend c10d --rdzv-endpoint h:1", Place::Alone, "", None),
            ("--nnodes 2", peers(Serve::Yes), "http://127.0.0.1:29500", Some(0)),
            ("--nnodes 2 --node-rank 1 --master-addr h", peers(Serve::No), "http://h:29500", Some(1)),
            ("--nnodes 2 --master-addr [::1] --master-port 7", peers(Serve::Yes), "http://[::1]:7", Some(0)),
            (&format!("{c10d} h"), peers(Serve::IfHere), "http://h:29400", None),
            (
                &format!("{c10d} h:7 --rdzv-conf is_host=true,join_timeout=3"),
                peers(Serve::Yes),
                "http://h:7",
                None,
            ),
            (
                &format!("{c10d} [fe80::1]:7 --rdzv-conf is_host=0"),
                peers(Serve::No),
                "http://[fe80::1]:7",
                None,
            ),
            (&format!("{c10d} fe80::1"), peers(Serve::IfHere), "http://[fe80::1]:29400", None),
            (muster, Place::Coordinator, "http://127.0.0.1:7070", None),
            (
                &format!("{muster} --rdzv-endpoint http://h:7/ --nnodes 1:4"),
                Place::Coordinator,
                "http://h:7",
                None,
            ),
        ];
        for (line, place, url, rank) in table {
            let found = meeting(line).unwrap();
            assert_eq!((found.0, found.2), (place, rank), "{line}");
            assert!(place == Place::Alone || found.1 == url, "{line}: {}", found.1);
        }
    }

    #[test]
    fn what_cannot_be_met_at_is_refused() {
        for (line, words) in [
            ("--nnodes 2 --rdzv-backend etcd", "use static, c10d, or muster"),
            ("--nnodes 2 --rdzv-backend c10d", "needs --rdzv-endpoint"),
            ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h:0", "cannot meet at port 0"),
            ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h:x", "is not host:port"),
            ("--nnodes 2 --node-rank 2", "is not below --nnodes 2"),
            ("--nnodes 2 --standalone", "is for one node"),
            ("--rdzv-conf join_timeout", "is not understood"),
            ("--rdzv-conf join_timeout=-1", "is not understood"),
        ] {
            let why = meeting(line).unwrap_err();
            assert!(why.contains(words), "{line}: {why}");
        }
    }
}
