//! This node of a run: what of it runs in this process, how it meets the others, and how it leaves them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use muster_core::types::{NodeName, RUN_LABEL, RUN_RANK_LABEL};
use muster_proto::v1;
use muster_worker::Attached;
use tokio::net::{UnixListener, lookup_host};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Scratch;
use super::args::RunArgs;
use super::meet::{Met, meet, reach, reach_coordinator};
use super::meeting::{Meeting, Place};
use super::port;
use crate::args::Global;
use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::output::say;

/// Where a run is on one node, its daemon and its coordinator are one process, and neither can lose the other.
const LEASE_ALONE: Duration = Duration::from_hours(24);
/// Time without a heartbeat after which a node of the run is lost.
const LEASE: Duration = Duration::from_secs(10);
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
            Place::Peers(wanted) => match meet(meeting, wanted, args, run_id).await? {
                Met::Serve(listener, url) => {
                    let serving = if meeting.shares_port() {
                        serve(config, port::shared(listener, store_seen), broken.clone())
                    } else {
                        serve(config, muster_coordinator::connections(listener), broken.clone())
                    };
                    (url, Some(serving))
                }
                Met::Join(url) => (url, None),
            },
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
        let early = match meeting.place {
            Place::Coordinator => Some(reach_coordinator(meeting, &url, global, run_id).await?),
            Place::Peers(_) if coordinator.is_none() => {
                Some(reach(&url, global, meeting.join_timeout).await?)
            }
            Place::Alone | Place::Peers(_) => None,
        };
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

/// Returns the address that --local-addr names: of a name's several one that other nodes reach.
pub(super) async fn address_of(host: &str) -> Result<IpAddr, Failure> {
    let host = host.trim_matches(['[', ']']);
    let found =
        lookup_host((host, 0)).await.with_context(|| format!("--local-addr {host} has no address"))?;
    let all: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let own = all.iter().find(|address| !address.is_loopback()).or(all.first());
    let own = own.ok_or_else(|| Failure::Usage(format!("--local-addr {host} has no address")))?;
    Ok(muster_worker::for_others(host, *own))
}
