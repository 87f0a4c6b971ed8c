//! The coordinator daemon, as a library: a driver around the pure core, the gRPC services, and the metrics
//! that jobs report. `muster coordinator` calls [`run`].
//!
//! See ARCHITECTURE.md beside this crate for the map.

mod agents;
mod clock;
mod driver;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod grpc;
mod links;
mod metrics;
mod persist;
mod server;
mod view;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use muster_core::types::Millis;
use muster_store::{MemoryStore, RedbStore, Store};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, TcpIncoming};
use tracing::info;

/// Connections that may wait to be taken: as many as Linux lets wait unless it is told otherwise. One that finds no place
/// is tried again by its machine after a second or three, and many nodes come back at once.
const BACKLOG_MAX: u32 = 4096;

/// Settings of a coordinator.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to serve gRPC on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Serve on an address that is not loopback although nothing protects it.
    pub insecure: bool,
    /// Directory for the store and the metrics; made if it is not there.
    pub data_dir: PathBuf,
    /// Where control state is kept.
    pub store: StoreKind,
    /// Time without a heartbeat after which a node is lost.
    pub lease: Duration,
    /// Time between heartbeats, well below the lease.
    pub heartbeat: Duration,
}

impl Config {
    /// Default settings for a data directory.
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            insecure: false,
            data_dir,
            store: StoreKind::Redb,
            lease: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
        }
    }
}

/// Where control state is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// A redb file in the data directory.
    Redb,
    /// Memory: gone with the process.
    Memory,
}

/// Why a coordinator could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Anybody who reaches the port could run programs on every node.
    #[error(
        "{0} is not a loopback address, and without TLS and tokens anybody who reaches it could run programs on \
         every node; listen on 127.0.0.1 and use an SSH tunnel, or pass --insecure if the network is yours alone"
    )]
    NotLoopback(SocketAddr),
    /// Heartbeats would not keep the lease.
    #[error("a lease of {lease:?} needs heartbeats at most a third as long, not {heartbeat:?}")]
    Lease {
        /// The lease asked for.
        lease: Duration,
        /// The heartbeat asked for.
        heartbeat: Duration,
    },
    /// The data directory cannot be used.
    #[error("failed to make the data directory {path}: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The address cannot be bound.
    #[error(
        "failed to listen on {address}: {source}; another coordinator may run there: choose another --listen"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] muster_store::Error),
    /// The store holds something that this version cannot read.
    #[error("failed to read the store: {0}")]
    Decode(String),
    /// The server broke.
    #[error("failed to serve gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The descriptors cannot be served.
    #[error("failed to build the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A thread or task could not be run.
    #[error("failed to run a task of the coordinator: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Runs a coordinator until `shutdown` is cancelled or it cannot go on.
///
/// Prints `{"listening":"address:port"}` as the first line on standard error once the port is bound and the
/// state is loaded. Returns after every accepted request was answered and every decision is stored.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    check(&config)?;
    let failed = |source| Error::Bind { address: config.listen, source };
    let listener = listen(config.listen).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let ready = || {
        // Nobody may be there to read it.
        writeln!(io::stderr(), "{}", serde_json::json!({ "listening": address.to_string() })).ok();
    };
    run_on(config, connections(listener), ready, shutdown).await
}

/// The connections of a listener, as a coordinator takes them.
pub fn connections(listener: tokio::net::TcpListener) -> TcpIncoming {
    // Streams carry small messages one by one: without this each waits for the acknowledgement of the one before, which the
    // other side delays by 40 ms. The server's own setting is not for connections that are handed to it.
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// The same on connections that come from elsewhere. `ready` is called once the state is loaded.
pub async fn run_on<I, C>(
    config: Config,
    connections: I,
    ready: impl FnOnce(),
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    I: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    std::fs::create_dir_all(&config.data_dir)
        .map_err(|source| Error::DataDir { path: config.data_dir.clone(), source })?;
    let store: Box<dyn Store> = match config.store {
        StoreKind::Redb => Box::new(RedbStore::open(&config.data_dir.join("store.redb"))?),
        StoreKind::Memory => Box::new(MemoryStore::default()),
    };
    let metrics = metrics::Metrics::new(config.data_dir.join("metrics"));
    let core_config = muster_core::Config { lease: millis(config.lease), ..muster_core::Config::default() };
    let (handle, driver) = driver::start(store, core_config, metrics.clone())?;

    ready();
    info!(data_dir = %config.data_dir.display(), version = env!("CARGO_PKG_VERSION"), "coordinator ready");

    // The driver outlives the server: requests that are under way still get their answers.
    let driver_stop = CancellationToken::new();
    let mut driver_task = tokio::spawn(driver.run(driver_stop.clone()));
    let served = tokio::select! {
        served = server::serve(connections, &config, handle, metrics, shutdown.clone()) => served,
        // The driver only ends by itself when it cannot go on.
        ended = &mut driver_task => return ended?,
    };
    driver_stop.cancel();
    driver_task.await??;
    info!("coordinator stopped");
    served
}

fn listen(address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    // So that a coordinator that is started again need not wait for the connections of the one before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG_MAX)
}

fn check(config: &Config) -> Result<(), Error> {
    if !config.listen.ip().is_loopback() && !config.insecure {
        return Err(Error::NotLoopback(config.listen));
    }
    if config.heartbeat.is_zero() || config.heartbeat * 3 > config.lease {
        return Err(Error::Lease { lease: config.lease, heartbeat: config.heartbeat });
    }
    Ok(())
}

fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}
