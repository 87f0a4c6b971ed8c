//! The gRPC server: which layers every call passes, in which order and why, and which services it reaches.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use muster_core::Input;
use muster_proto::v1;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::codec::CompressionEncoding;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower_http::classify::{GrpcCode, GrpcErrorsAsFailures, SharedClassifier};
use tower_http::trace::TraceLayer;
use tracing::{info, warn};

use crate::access::layer::{Door, Guard};
use crate::answers::CountAnswers;
use crate::audit::Audit;
use crate::grpc::Api;
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::monitor::calls::CountCalls;
use crate::office::{Office, STALE};
use crate::{Config, Error};
use crate::{edge, lag};

/// Largest message taken or sent.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Longest a call may take to answer (a stream: to begin); a client's own deadline counts if it is shorter.
const CALL_MAX: Duration = Duration::from_secs(30);
/// Calls waiting for an answer at once: one for each connection that there may be, for ten thousand nodes that come back
/// ask at once, and whoever is refused then comes again on a new connection. Above it new ones are refused at once instead of
/// queueing without bound. Readers have half of them at most (`answers.rs`), so that nodes always find some.
const CALLS_MAX: usize = edge::CONNECTIONS_MAX;
/// Streams on one connection.
const CONNECTION_STREAMS_MAX: u32 = 1024;
/// Bytes of one stream on their way that nobody has taken: a heartbeat behind so much of a node's output passes within a
/// quarter of a second at 10 Mbit/s.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// Header bytes of one call.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// A silent connection is probed after this long, and dropped if it stays silent for the second span.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// The health service's name for the process itself, whether it leads or not.
pub const LIVE: &str = "live";
/// Time that calls under way get when the coordinator stops.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Serves until `shutdown`, then lets calls under way finish.
pub(crate) async fn serve<I, C>(
    connections: I,
    config: &Config,
    office: Office,
    (metrics, monitor): (Metrics, Monitor),
    socket: Option<UnixListener>,
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    I: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let api = Api::new(office.clone(), metrics, monitor.clone(), config);
    let (health, health_service) = tonic_health::server::health_reporter();
    let health_service = health_service.accept_compressed(CompressionEncoding::Gzip);
    let (mut names, shown, led) = (vec![""], office.clone(), office.clone());
    let shows = move |request: Request<()>| shown.admit(&request).map(|()| request);
    let leads = move |request: Request<()>| led.admit_to_lead(&request).map(|()| request);

    // Outside each service: who does not lead says who does.
    macro_rules! service {
        ($server:path, $gate:expr) => {{
            let service = <$server>::new(api.clone());
            names.push(<$server as NamedService>::NAME);
            let service = service
                // Taken of clients that compress; what it unpacks to has the same limit. Answers are not compressed.
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            InterceptedService::new(service, $gate.clone())
        }};
    }
    let jobs = service!(v1::job_service_server::JobServiceServer<Api>, shows);
    let nodes = service!(v1::node_service_server::NodeServiceServer<Api>, shows);
    let cluster = service!(v1::cluster_service_server::ClusterServiceServer<Api>, shows);
    let workers = service!(v1::worker_service_server::WorkerServiceServer<Api>, leads);
    let tokens = service!(v1::token_service_server::TokenServiceServer<Api>, shows);
    let agents = service!(v1::rendezvous_service_server::RendezvousServiceServer<Api>, leads);
    // For probes that ask whether the process is well, and not whether it leads.
    health.set_service_status(LIVE, ServingStatus::Serving).await;
    set_health(&health, &names, office.leads()).await;
    let following = follow_health(health, names, office.clone());
    let probed = serve_probes(config.health_listen, health_service.clone(), shutdown.clone());

    let mut routes = Routes::new(health_service)
        .add_service(jobs)
        .add_service(nodes)
        .add_service(cluster)
        .add_service(workers)
        .add_service(agents)
        .add_service(tokens);
    if config.reflection {
        routes = routes
            .add_service(reflection().build_v1()?)
            // grpcurl 1.8.6 speaks only this one.
            .add_service(reflection().build_v1alpha()?);
    }
    let routes = routes.prepare();
    let door = match &config.tls_dir {
        Some(_) => Door::Encrypted,
        None if config.loopback_names_only => Door::Loopback(config.loopback_users.clone()),
        None => Door::Trusted,
    };
    let (watched_office, watched_monitor) = (office.clone(), monitor.clone());
    let (answers, calls) = (CountAnswers::new(), GlobalConcurrencyLimitLayer::new(CALLS_MAX));
    let audit = Audit::start(config.audit.then_some(&config.data_dir));
    let ways = Ways { routes, office, monitor, audit: audit.clone(), answers, calls };
    let asked = config.socket.clone().filter(|_| socket.is_some());
    let watched = watch_lag(asked, config.lease, watched_office, watched_monitor);
    let socket = serve_socket(socket, ways.clone(), shutdown.clone());
    let server = ways.answer(connections, door, shutdown.clone());
    let drained = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_MAX).await;
    };
    let served = tokio::select! {
        served = server => served,
        socket = socket => socket,
        probed = probed => probed,
        () = following => Ok(()),
        () = watched => Ok(()),
        () = drained => {
            warn!("some calls did not finish in time and were dropped");
            Ok(())
        }
    };
    audit.close().await;
    served
}

/// What calls reach, by whichever way they come.
#[derive(Clone)]
struct Ways {
    routes: Routes,
    office: Office,
    monitor: Monitor,
    answers: CountAnswers,
    audit: Audit,
    calls: GlobalConcurrencyLimitLayer,
}

impl Ways {
    /// Answers the calls of these connections until `stop`.
    async fn answer<I, C>(self, connections: I, door: Door, stop: CancellationToken) -> Result<(), Error>
    where
        I: Stream<Item = io::Result<C>>,
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let Self { routes, office, monitor, audit, answers, calls } = self;
        let guard = Guard { door, office: office.clone(), audit };
        // From the outside in.
        let layers = ServiceBuilder::new()
            // First, so that whatever is refused is counted.
            .layer(CountCalls(monitor))
            // Next, so that refused calls are traced too.
            .layer(TraceLayer::new(SharedClassifier::new(failures())))
            // gRPC clients know a message that is too large by RESOURCE_EXHAUSTED; tonic says OUT_OF_RANGE.
            .map_response(oversized_is_resource_exhausted)
            // Who reads while the store or etcd is in trouble is told that it may no longer be so.
            .map_response(move |response| marked_stale(response, &office))
            // Before a place is taken: who may not call takes none from those who may.
            .layer(guard)
            // Behind it, for it goes by who calls; readers have a share of the places and of what may be unread.
            .layer(answers)
            // Refuses at once, with RESOURCE_EXHAUSTED, when the limit below is reached …
            .load_shed()
            // … which counts calls over all connections together.
            .layer(calls);
        let served = Server::builder()
            // Outside all of them: the deadline, ours or the client's grpc-timeout, whichever is shorter.
            .timeout(CALL_MAX)
            .initial_stream_window_size(Some(STREAM_WINDOW_BYTES))
            .max_concurrent_streams(CONNECTION_STREAMS_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .layer(layers)
            .add_routes(routes)
            .serve_with_incoming_shutdown(connections, stop.cancelled_owned());
        Ok(served.await?)
    }
}

/// Extends leases while calls are answered late, as far as that can be found out. Never ends.
async fn watch_lag(socket: Option<PathBuf>, lease: Duration, office: Office, monitor: Monitor) {
    let Some(socket) = socket else { return std::future::pending().await };
    let extend = || {
        let (office, monitor) = (office.clone(), monitor.clone());
        async move {
            if let Ok(reign) = office.reign()
                && office.leads()
            {
                monitor.pauses.inc();
                reign.driver.tell(Input::Stalled).await.ok();
            }
        }
    };
    lag::watch(&socket, lease, extend).await;
}

/// Serves the Unix socket, if there is one. Ends only with an error, or when it is to stop.
async fn serve_socket(
    socket: Option<UnixListener>,
    ways: Ways,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    if let Some(socket) = socket {
        ways.answer(edge::local(socket), Door::Trusted, shutdown).await?;
    }
    std::future::pending().await
}

/// Serves the health service alone, if there is a port for that. Ends only with an error.
async fn serve_probes<H>(
    address: Option<SocketAddr>,
    health: HealthServer<H>,
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    H: Health,
{
    if let Some(address) = address {
        let failed = |source| Error::Bind { address, source };
        let listener = crate::listen(address).map_err(failed)?;
        info!(address = %listener.local_addr().map_err(failed)?, "the health service alone is served here");
        Server::builder()
            .timeout(CALL_MAX)
            .max_concurrent_streams(CONNECTION_STREAMS_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .add_service(health)
            .serve_with_incoming_shutdown(edge::probes(listener), shutdown.cancelled_owned())
            .await?;
    }
    std::future::pending().await
}

/// Readiness goes with leading.
async fn set_health(health: &HealthReporter, names: &[&str], leads: bool) {
    let status = if leads { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in names {
        health.set_service_status(name, status).await;
    }
}

/// Never ends.
async fn follow_health(health: HealthReporter, names: Vec<&'static str>, office: Office) {
    let mut changes = office.changes();
    while changes.changed().await.is_ok() {
        set_health(&health, &names, office.leads()).await;
    }
    std::future::pending::<()>().await;
}

fn marked_stale<B>(mut response: http::Response<B>, office: &Office) -> http::Response<B> {
    if let Some(why) = office.stale() {
        response.headers_mut().insert(STALE, why);
    }
    response
}

/// What is logged as an error: whatever is not the caller's own mistake, or the caller's going away, or what says by
/// itself that another coordinator or another time is meant.
fn failures() -> GrpcErrorsAsFailures {
    let expected = [
        GrpcCode::Unavailable,
        GrpcCode::Cancelled,
        GrpcCode::InvalidArgument,
        GrpcCode::NotFound,
        GrpcCode::AlreadyExists,
        GrpcCode::FailedPrecondition,
        GrpcCode::Aborted,
        // Refused callers have a line of their own.
        GrpcCode::PermissionDenied,
        GrpcCode::Unauthenticated,
    ];
    expected.into_iter().fold(GrpcErrorsAsFailures::new(), GrpcErrorsAsFailures::with_success)
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(muster_proto::DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // So that grpcurl can show the details of our errors.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}

/// No handler of ours answers OUT_OF_RANGE: where it appears, tonic refused a message for its size.
fn oversized_is_resource_exhausted<B>(mut response: http::Response<B>) -> http::Response<B> {
    const STATUS: &str = "grpc-status";
    let code = |code: tonic::Code| http::HeaderValue::from(code as i32);
    if response.headers().get(STATUS) == Some(&code(tonic::Code::OutOfRange)) {
        response.headers_mut().insert(STATUS, code(tonic::Code::ResourceExhausted));
    }
    response
}
