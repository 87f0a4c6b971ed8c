//! The gRPC server: which layers every call passes, in which order and why, and which services it reaches.

use std::io;
use std::time::Duration;

use muster_proto::v1;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tower::ServiceBuilder;
use tower_http::classify::{GrpcCode, GrpcErrorsAsFailures, SharedClassifier};
use tower_http::trace::TraceLayer;

use crate::driver::Handle;
use crate::grpc::Api;
use crate::metrics::Metrics;
use crate::{Config, Error};

/// Largest message taken or sent.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Longest a call may take to answer (a stream: to begin); a client's own deadline counts if it is shorter.
const CALL_MAX: Duration = Duration::from_secs(30);
/// Calls waiting for an answer at once. Above it new ones are refused at once instead of queueing without
/// bound; open streams do not count, they have bounds of their own.
const CALLS_MAX: usize = 4096;
/// Streams on one connection.
const CONNECTION_STREAMS_MAX: u32 = 1024;
/// Header bytes of one call.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// A silent connection is probed after this long, and dropped if it stays silent for the second span.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// Time that calls under way get when the coordinator stops.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Serves until `shutdown`, then lets calls under way finish.
pub(crate) async fn serve<I, C>(
    connections: I,
    config: &Config,
    driver: Handle,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    I: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let api = Api::new(driver, metrics, config, shutdown.clone());
    let (health, health_service) = tonic_health::server::health_reporter();

    macro_rules! service {
        ($server:path) => {{
            let service = <$server>::new(api.clone());
            health.set_serving::<$server>().await;
            service.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
        }};
    }
    let jobs = service!(v1::job_service_server::JobServiceServer<Api>);
    let nodes = service!(v1::node_service_server::NodeServiceServer<Api>);
    let cluster = service!(v1::cluster_service_server::ClusterServiceServer<Api>);
    let workers = service!(v1::worker_service_server::WorkerServiceServer<Api>);
    let agents = service!(v1::rendezvous_service_server::RendezvousServiceServer<Api>);

    // From the outside in.
    let layers = ServiceBuilder::new()
        // First, so that refused calls are traced too.
        .layer(TraceLayer::new(SharedClassifier::new(failures())))
        // gRPC clients know a message that is too large by RESOURCE_EXHAUSTED; tonic says OUT_OF_RANGE.
        .map_response(oversized_is_resource_exhausted)
        // Refuses at once, with RESOURCE_EXHAUSTED, when the limit below is reached …
        .load_shed()
        // … which counts calls over all connections together.
        .layer(tower::limit::GlobalConcurrencyLimitLayer::new(CALLS_MAX));

    let stop = shutdown.clone();
    let server = Server::builder()
        // Outside all of them: the deadline, ours or the client's grpc-timeout, whichever is shorter.
        .timeout(CALL_MAX)
        .max_concurrent_streams(CONNECTION_STREAMS_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .layer(layers)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        // grpcurl 1.8.6 speaks only this one.
        .add_service(reflection().build_v1alpha()?)
        .add_service(jobs)
        .add_service(nodes)
        .add_service(cluster)
        .add_service(workers)
        .add_service(agents)
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned());
    let drained = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_MAX).await;
    };
    tokio::select! {
        served = server => Ok(served?),
        () = drained => {
            tracing::warn!("some calls did not finish in time and were dropped");
            Ok(())
        }
    }
}

/// What is logged as an error: whatever is not the caller's own mistake, or the caller's going away.
fn failures() -> GrpcErrorsAsFailures {
    let callers = [
        GrpcCode::Cancelled,
        GrpcCode::InvalidArgument,
        GrpcCode::NotFound,
        GrpcCode::AlreadyExists,
        GrpcCode::FailedPrecondition,
        GrpcCode::Aborted,
    ];
    callers.into_iter().fold(GrpcErrorsAsFailures::new(), GrpcErrorsAsFailures::with_success)
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
