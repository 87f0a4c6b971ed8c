//! This node of a run: what of it runs in this process, how it meets the others, and how it leaves them.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Context;
use muster_core::types::{NodeName, RUN_LABEL, RUN_RANK_LABEL};
use muster_proto::v1;
use muster_worker::Attached;
use tokio::net::{TcpListener, UnixListener, lookup_host};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Scratch;
use super::args::RunArgs;
use super::meeting::{Meeting, Place, Serve};
use super::port;
use crate::args::Global;
use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::output::say;

/// Where a run is on one node, its daemon and its coordinator are one process, and neither can lose the other.
const LEASE_ALONE: Duration = Duration::from_hours(24);
/// Time without a heartbeat after which a node of the run is lost.
const LEASE: Duration = Duration::from_secs(10);
/// First and longest time between attempts to reach the coordinator.
const RETRY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));
/// Time for this node to take its leave, and for the others once the job has ended.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// This node of the run.
pub(super) struct Node {
    pub client: Client,
    pub name: NodeName,
    /// Where the ranks' store serves now.
    pub store: watch::Sender<Option<SocketAddr>>,
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
    /// Starts what runs in this process, and reaches the coordinator.
    pub async fn enter(
        meeting: &Meeting,
        (args, global): (&RunArgs, &Global),
        run_id: &str,
        scratch: &Scratch,
        attached: Attached,
    ) -> Result<Self, Failure> {
        let broken = CancellationToken::new();
        let (store, store_seen) = watch::channel(None);
        let config = muster_coordinator::Config {
            store: muster_coordinator::StoreKind::Memory,
            lease: LEASE,
            // It goes with the run, and so would its audit.
            audit: false,
            // Nobody but the nodes of the run speaks to it.
            reflection: false,
            ..muster_coordinator::Config::new(scratch.dir.path().join("coordinator"))
        };
        let (url, coordinator) = match meeting.place {
            Place::Alone => {
                let socket = scratch.socket();
                let listener = UnixListener::bind(&socket)
                    .context("failed to make a socket in the temporary directory")?;
                let heartbeat = LEASE_ALONE / 4;
                let config = muster_coordinator::Config { lease: LEASE_ALONE, heartbeat, ..config };
                let serving = serve(config, UnixListenerStream::new(listener), broken.clone());
                (format!("unix:{}", socket.display()), Some(serving))
            }
            Place::Coordinator => (meeting.url(), None),
            Place::Peers(wanted) => {
                let listener = bind(&meeting.host, meeting.port, wanted).await?;
                let serving = listener.map(|listener| {
                    if meeting.shares_port() {
                        serve(config, port::shared(listener, store_seen), broken.clone())
                    } else {
                        serve(config, muster_coordinator::connections(listener), broken.clone())
                    }
                });
                (meeting.url(), serving)
            }
        };
        let name = node_name(meeting.place == Place::Alone);
        let mut labels = std::collections::BTreeMap::from([(RUN_LABEL.to_owned(), run_id.to_owned())]);
        labels.extend(meeting.rank.map(|rank| (RUN_RANK_LABEL.to_owned(), rank.to_string())));
        let address = match args.local_addr.as_ref().filter(|host| !host.is_empty()) {
            Some(host) => Some(address_of(host).await?),
            None => None,
        };
        let worker = muster_worker::Config {
            address,
            trust: global.trust()?,
            join_token_file: args.join_token_file.clone(),
            labels,
            attached: Some(attached),
            ..muster_worker::Config::new(vec![url.clone()], name.clone(), scratch.dir.path().join("node"))
        };
        // Where somebody else serves, the daemon begins once he does: it would take its time to try again.
        let early =
            if coordinator.is_none() { Some(reach(&url, global, meeting.join_timeout).await?) } else { None };
        let stop = CancellationToken::new();
        let running = muster_worker::run(worker, stop.clone());
        let ends = broken.clone();
        let worker = tokio::spawn(async move {
            if let Err(error) = running.await {
                say!("muster run: {error}");
                ends.cancel();
            }
        });
        let client = if let Some(client) = early {
            client
        } else {
            tokio::select! {
                client = reach(&url, global, meeting.join_timeout) => client?,
                () = broken.cancelled() => return Err(Failure::JobFailed),
            }
        };
        Ok(Self {
            client,
            name,
            store,
            is_own: meeting.place != Place::Coordinator,
            join_timeout: meeting.join_timeout,
            is_alone: meeting.place == Place::Alone,
            broken,
            stop,
            worker: AbortOnDropHandle::new(worker),
            coordinator,
        })
    }

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
        say!(
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
            say!("muster run: {error}");
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
    let is_meant = host == "localhost" || host.parse::<IpAddr>().is_ok();
    for address in found {
        // A name may have addresses that this machine does not know of, and stand for loopback here: whatever the others find
        // behind it serves, as with torchrun.
        let own = UdpSocket::bind((address.ip(), 0));
        let bound = match own {
            _ if is_meant => muster_coordinator::listen(address),
            Ok(_) => muster_coordinator::listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))),
            Err(error) => Err(error),
        };
        match bound {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && wanted == Serve::IfHere => {
                return Ok(None);
            }
            Err(error) => last = error.to_string(),
        }
    }
    if wanted == Serve::IfHere { Ok(None) } else { Err(failed(&last).into()) }
}

/// Returns the address that --local-addr names: of a name's several one that other nodes reach.
async fn address_of(host: &str) -> Result<IpAddr, Failure> {
    let host = host.trim_matches(['[', ']']);
    let found =
        lookup_host((host, 0)).await.with_context(|| format!("--local-addr {host} has no address"))?;
    let all: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let own = all.iter().find(|address| !address.is_loopback()).or(all.first());
    let own = own.ok_or_else(|| Failure::Usage(format!("--local-addr {host} has no address")))?;
    Ok(muster_worker::for_others(host, *own))
}

/// Whoever serves may come later.
async fn reach(url: &str, global: &Global, limit: Duration) -> Result<Client, Failure> {
    let global = Global { coordinator: vec![url.to_owned()], ..global.clone() };
    let tried = async {
        let mut pause = RETRY.0;
        loop {
            match Client::connect(&global).await {
                Err(Failure::Unreachable(_)) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 5 / 4).min(RETRY.1);
                }
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
