//! The coordinator daemon, as a library: a driver around the pure core, the gRPC services, and the metrics
//! that jobs report. `muster coordinator` calls [`run`].
//!
//! See ARCHITECTURE.md beside this crate for the map.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads")]

mod access;
mod agents;
mod answers;
mod audit;
mod authority;
mod clock;
mod driver;
mod edge;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod grpc;
mod intake;
mod lag;
mod late;
mod links;
mod metrics;
mod monitor;
mod office;
mod persist;
mod published;
mod seen;
mod server;
mod several;
mod socket;
mod tls;
pub mod transfer;
mod view;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use muster_core::QueueMax;
use muster_core::access::CERTIFICATE_LIFE_MAX;
use muster_core::types::Millis;
pub use muster_monitor::{Http, Listen};
pub use muster_store::EtcdConfig;
use muster_store::{MemoryStore, RedbStore, Store};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::Connected;
use tracing::{info, warn};

use clock::Clock;
pub use edge::peer::LoopbackUsers;
pub use edge::{Held, connections};
pub use error::Error;
use monitor::Monitor;
use office::{Following, Office, Reign, Standing};
pub use server::LIVE;

/// Connections that may wait to be taken: as many as Linux lets wait unless it is told otherwise. One that finds no place
/// is tried again by its machine after a second or three, and many nodes come back at once.
const BACKLOG_MAX: u32 = 4096;

/// Shortest life of a node's certificate: a node tries several times to renew it.
const CERTIFICATE_LIFE_MIN: Duration = Duration::from_secs(10);

/// Settings of a coordinator.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
pub struct Config {
    /// Address to serve gRPC on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Serve on an address that is not loopback although nothing protects it.
    pub insecure: bool,
    /// Address of a port that serves nothing but the health service, for probes that can neither encrypt nor say who they are.
    pub health_listen: Option<SocketAddr>,
    /// Directory with ca.crt, tls.crt and tls.key, with which [`run`] encrypts connections. They may change.
    pub tls_dir: Option<PathBuf>,
    /// How long certificates of nodes are good.
    pub node_certificate_life: Duration,
    /// Path of a Unix socket that is served besides, with all rights. [`run`] sees to it.
    pub socket: Option<PathBuf>,
    /// Refuse calls by a name that is not loopback's. [`run`] sees to it.
    pub loopback_names_only: bool,
    /// Who may call on such a port.
    pub loopback_users: LoopbackUsers,
    /// Have everybody who may see jobs see all of each: commands, variables and output.
    pub open_jobs: bool,
    /// Most that may wait.
    pub queue_max: QueueMax,
    /// Highest priority of a job that no operator submits.
    pub priority_max: i32,
    /// Serve reflection, for which every descriptor is read at the start.
    pub reflection: bool,
    /// Where `/metrics`, `/healthz` and `/readyz` are.
    pub http: Http,
    /// Directory for the store and the metrics; made if it is not there.
    pub data_dir: PathBuf,
    /// Keep an audit in the data directory. Without it the log alone says who did what.
    pub audit: bool,
    /// Where control state is kept.
    pub store: StoreKind,
    /// Time without a heartbeat after which a node is lost.
    pub lease: Duration,
    /// Time between heartbeats, well below the lease.
    pub heartbeat: Duration,
    /// With several coordinators: where clients reach this one. None: at the address it listens on.
    pub advertise: Option<String>,
    /// With several coordinators: time without a word from the leader after which another one leads. Whole seconds.
    pub leader_lease: Duration,
    /// Go on from an etcd that was restored from a backup.
    pub accept_restored_store: bool,
}

impl Config {
    /// Default settings for a data directory.
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            insecure: false,
            health_listen: None,
            tls_dir: None,
            node_certificate_life: Duration::from_hours(24),
            socket: None,
            loopback_names_only: false,
            loopback_users: LoopbackUsers::Own,
            open_jobs: false,
            queue_max: QueueMax::default(),
            priority_max: muster_core::Config::default().priority_max,
            reflection: true,
            http: Http::OFF,
            data_dir,
            audit: true,
            store: StoreKind::Redb,
            lease: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
            advertise: None,
            leader_lease: Duration::from_secs(3),
            accept_restored_store: false,
        }
    }
}

impl Config {
    /// Returns the settings of the core.
    fn of_core(&self) -> muster_core::Config {
        muster_core::Config {
            lease: millis(self.lease),
            queue_max: self.queue_max.clone(),
            priority_max: self.priority_max,
            ..muster_core::Config::default()
        }
    }
}

/// Where control state is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// A redb file in the data directory.
    Redb,
    /// Memory: gone with the process.
    Memory,
    /// etcd: this coordinator is one of several, of which one leads.
    Etcd(EtcdConfig),
}

/// Runs a coordinator until `shutdown` is cancelled or it cannot go on.
///
/// Prints `{"listening":"address:port"}`, with `http_listening` where metrics are served, as the first line on standard
/// error once the ports are bound and the state is loaded. Returns after every accepted request was answered and every decision is stored.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    check(&config)?;
    let certificates = config.tls_dir.as_deref().map(tls::Certificates::load).transpose()?;
    let failed = |source| Error::Bind { address: config.listen, source };
    let listener = listen(config.listen).map_err(failed)?;
    let (wanted, address) = (config.listen, listener.local_addr().map_err(failed)?);
    // With TLS a page in a browser has no certificate for the name that it would have us called by.
    let loopback_names_only = address.ip().is_loopback() && !config.insecure && certificates.is_none();
    let socket = Some(config.data_dir.join(socket::NAME));
    let config = Config { listen: address, loopback_names_only, socket, ..config };
    let insecure = config.http.insecure || config.insecure;
    let http = muster_monitor::bind(Http { insecure, ..config.http }).await?;
    let unserved = match config.http.listen {
        Listen::Perhaps(address) if http.is_none() => Some(address),
        Listen::Perhaps(_) | Listen::At(_) | Listen::Off => None,
    };
    let at = http.as_ref().and_then(|http| http.local_addr().ok());
    let more = at.map(|at| format!(",\"http_listening\":\"{at}\"")).unwrap_or_default();
    let says = format!("{{\"listening\":\"{address}\"{more}}}");
    let ready = move || {
        muster_monitor::announce(&says);
        if address.is_ipv4() && wanted.is_ipv6() {
            warn!(%wanted, "this machine has no IPv6: calls are taken at its addresses of IPv4 alone");
        }
        if let Some(address) = unserved {
            warn!(%address, "metrics are not served, for the port is taken: another --http-listen, or `off`, ends this warning");
        }
        muster_monitor::ready();
    };
    let stopping = shutdown.clone();
    let _told = AbortOnDropHandle::new(tokio::spawn(async move {
        stopping.cancelled().await;
        muster_monitor::stopping();
    }));
    let connections = connections(listener);
    match certificates {
        Some(certificates) => {
            let connections = tls::encrypted(connections, certificates);
            Box::pin(serve(config, connections, http, ready, shutdown)).await
        }
        None => Box::pin(serve(config, connections, http, ready, shutdown)).await,
    }
}

/// The same on connections that come from elsewhere, without metrics. `ready` is called once the state is loaded.
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
    Box::pin(serve(config, connections, None, ready, shutdown)).await
}

async fn serve<I, C>(
    config: Config,
    connections: I,
    http: Option<TcpListener>,
    ready: impl FnOnce(),
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    I: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let monitor = Monitor::new();
    let page = |office: &Office| {
        // Ends with the process, or with whoever runs several in one.
        http.map(|http| {
            tokio::spawn(muster_monitor::serve(http, monitor.page(office.clone()), shutdown.clone()))
        })
        .map(AbortOnDropHandle::new)
    };
    // Nobody else has anything to look for there.
    muster_monitor::own_data_dir(&config.data_dir, 0o700)?;
    let metrics = metrics::Metrics::new(config.data_dir.join("metrics"));
    let clock = Clock::start();
    let version = env!("CARGO_PKG_VERSION");
    let store: Box<dyn Store> = match &config.store {
        StoreKind::Redb => Box::new(RedbStore::open(&config.data_dir.join("store.redb"))?),
        StoreKind::Memory => Box::new(MemoryStore::default()),
        StoreKind::Etcd(etcd) => {
            if config.lease < config.leader_lease * 3 {
                warn!(
                    lease = ?config.lease,
                    leader_lease = ?config.leader_lease,
                    "where a leader's machine vanishes without a word, nodes may stop their ranks before another one leads; \
                     give --lease three times --leader-lease"
                );
            }
            let (standing, office) = watch::channel(Standing::Following(Following::default()));
            let (office, url) = (Office::new(office, clock), advertised(&config));
            let candidate = several::Candidate {
                etcd: etcd.clone(),
                url,
                config: config.clone(),
                metrics: metrics.clone(),
                monitor: monitor.clone(),
                clock,
                standing,
            };
            let _page = page(&office);
            let socket = socket::open(config.socket.as_deref());
            ready();
            info!(data_dir = %config.data_dir.display(), version, "coordinator serves; it leads when it is elected");
            let mut standing = tokio::spawn(candidate.run(shutdown.clone()));
            let serving = server::serve(
                connections,
                &config,
                office,
                (metrics, monitor.clone()),
                socket,
                shutdown.clone(),
            );
            tokio::pin!(serving);
            let served = tokio::select! {
                served = &mut serving => {
                    shutdown.cancel();
                    standing.await??;
                    served
                }
                // It has resigned before the last calls are answered, and the next one need not wait for that; or it cannot
                // go on.
                ended = &mut standing => {
                    ended??;
                    serving.await
                }
            };
            info!("coordinator stopped");
            return served;
        }
    };
    let (handle, mut driver) =
        driver::start(store, config.of_core(), metrics.clone(), monitor.clone(), clock, Arc::new(|| true))?;
    let over = shutdown.child_token();
    let reign = Reign {
        agents: agents::Runs::new(clock, over.clone()),
        driver: handle,
        term: driver.term(),
        coordinators: 1,
        cluster_id: driver.cluster_id().into(),
        over,
    };
    let (standing, office) = watch::channel(Standing::Leading(reign));
    let office = Office::new(office, clock);
    let _page = page(&office);
    let socket = socket::open(config.socket.as_deref());

    ready();
    info!(data_dir = %config.data_dir.display(), version, "coordinator ready");

    // The driver outlives the server: requests that are under way still get their answers.
    let driver_stop = CancellationToken::new();
    let stop = driver_stop.clone();
    let mut driver_task = tokio::spawn(async move { driver.run(&stop, &CancellationToken::new()).await });
    let served = tokio::select! {
        served = server::serve(connections, &config, office, (metrics, monitor.clone()), socket, shutdown.clone()) => served,
        // The driver only ends by itself when it cannot go on.
        ended = &mut driver_task => {
            ended??;
            // Another process has taken the store over.
            return Err(muster_store::Error::Fenced.into());
        }
    };
    driver_stop.cancel();
    driver_task.await??;
    drop(standing);
    info!("coordinator stopped");
    served
}

/// Where clients reach this coordinator.
fn advertised(config: &Config) -> String {
    config.advertise.clone().unwrap_or_else(|| {
        let scheme = if config.tls_dir.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", config.listen)
    })
}

/// Listens where many may come at once, such as every rank and node of a large run.
///
/// # Errors
/// Those of the kernel: the port is taken, or the address is not this machine's.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    muster_monitor::listen(address, BACKLOG_MAX)
}

fn check(config: &Config) -> Result<(), Error> {
    if !config.listen.ip().is_loopback() && !config.insecure && config.tls_dir.is_none() {
        return Err(Error::NotLoopback(config.listen));
    }
    let life = config.node_certificate_life;
    if life < CERTIFICATE_LIFE_MIN || millis(life) > CERTIFICATE_LIFE_MAX {
        return Err(Error::CertificateLife(life));
    }
    if config.heartbeat.is_zero() || config.heartbeat * 3 > config.lease {
        return Err(Error::Lease { lease: config.lease, heartbeat: config.heartbeat });
    }
    if let StoreKind::Etcd(_) = &config.store {
        if config.leader_lease.as_secs() < 2 || config.leader_lease.subsec_nanos() != 0 {
            return Err(Error::LeaderLease(config.leader_lease));
        }
        if config.advertise.is_none() && config.listen.ip().is_unspecified() {
            return Err(Error::Advertise(config.listen));
        }
        let plain = |url: &&String| config.tls_dir.is_some() && url.starts_with("http://");
        if let Some(url) = config.advertise.as_ref().filter(plain) {
            return Err(Error::AdvertisedPlain(url.clone()));
        }
    }
    Ok(())
}

fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}
