//! Counts the calls of readers, and the bytes of answers that they have not read, by caller and in all. What nodes and
//! agents say passes: it has bounds of its own, and must never wait for a reader.
//!
//! An answer that is not read lies encoded in the buffers of HTTP/2, long after its handler and its body are gone. So bytes
//! are counted until they have been written to the connection, and a call until its body is gone.

mod body;
mod share;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Extensions, Request, Response};
use muster_proto::convert;
use tokio::sync::Semaphore;
use tonic::Code;
use tonic::body::Body;
use tonic::transport::server::{TcpConnectInfo, UdsConnectInfo};
use tower::{Layer, Service};

use crate::access::Identity;
use crate::access::rules::{self, Rule};
use body::Counted;
use share::{Answers, Caller, Kind};

/// Lists that are made at once. Each holds a page, decoded and encoded, and some milliseconds of a processor.
const LISTS_AT_ONCE: usize = 8;

/// The layer. All listeners share what it counts.
#[derive(Clone, Debug)]
pub(crate) struct CountAnswers {
    answers: Answers,
    lists: Arc<Semaphore>,
}

impl CountAnswers {
    pub fn new() -> Self {
        Self { answers: Answers::default(), lists: Arc::new(Semaphore::new(LISTS_AT_ONCE)) }
    }
}

impl<S> Layer<S> for CountAnswers {
    type Service = CountedService<S>;

    fn layer(&self, inner: S) -> CountedService<S> {
        CountedService { inner, layer: self.clone() }
    }
}

/// A service whose answers are counted.
#[derive(Clone, Debug)]
pub(crate) struct CountedService<S> {
    inner: S,
    layer: CountAnswers,
}

impl<S, Q, A> Service<Request<Q>> for CountedService<S>
where
    S: Service<Request<Q>, Response = Response<A>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    Q: Send + 'static,
    A: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    A::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let Some(kind) = kind(request.uri().path()) else {
            let answer = self.inner.call(request);
            return Box::pin(async move { Ok(answer.await?.map(Body::new)) });
        };
        let place = match self.layer.answers.enter(caller(request.extensions()), kind) {
            Ok(place) => Arc::new(place),
            Err(refused) => return Box::pin(async move { Ok(refusal(&refused)) }),
        };
        match kind {
            Kind::List => {
                let lists = self.layer.lists.clone();
                // The service that is ready is the one to be called, and a clone of it takes its place.
                let next = self.inner.clone();
                let mut inner = std::mem::replace(&mut self.inner, next);
                Box::pin(async move {
                    // Never closed.
                    let _turn = lists.acquire_owned().await.ok();
                    if let Err(refused) = place.check_unread() {
                        return Ok(refusal(&refused));
                    }
                    let answer = inner.call(request).await?;
                    Ok(Counted::answer(answer, place).unwrap_or_else(|refused| refusal(&refused)))
                })
            }
            Kind::Call | Kind::Stream | Kind::Logs => {
                let answer = self.inner.call(request);
                Box::pin(async move {
                    Ok(Counted::answer(answer.await?, place).unwrap_or_else(|refused| refusal(&refused)))
                })
            }
        }
    }
}

fn refusal(refused: &share::Refused) -> Response<Body> {
    let message = refused.to_string();
    convert::refusal(Code::ResourceExhausted, refused.reason(), message).into_http()
}

/// Returns what a method's calls are counted as; none if they are not.
fn kind(path: &str) -> Option<Kind> {
    let (service, method) = path.rsplit_once('/').unwrap_or(("", path));
    match rules::rule(path) {
        Some((Rule::Node | Rule::Joining | Rule::LeastOrNode(_), _)) => None,
        Some((Rule::Open | Rule::Known | Rule::Least(_), _)) | None => Some(match method {
            "WatchJob" | "WatchNodes" | "StreamMetrics" | "ServerReflectionInfo" => Kind::Stream,
            "StreamLogs" => Kind::Logs,
            "Watch" if service == "/grpc.health.v1.Health" => Kind::Stream,
            "ListJobs" | "ListNodes" | "ListTokens" => Kind::List,
            _ => Kind::Call,
        }),
    }
}

/// Returns who calls: the identity where there is one, else where the call comes from.
fn caller(extensions: &Extensions) -> Caller {
    if extensions.get::<UdsConnectInfo>().is_some() {
        return Caller::Socket;
    }
    match extensions.get::<Identity>() {
        Some(known @ (Identity::Bearer(_) | Identity::Node(_))) => Caller::Known(known.to_string().into()),
        Some(Identity::Local(_)) | None => {
            let peer = extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
            Caller::Peer(peer.map(|peer| peer.ip().to_canonical()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_counted_as_what_they_are() {
        let table = [
            ("/muster.v1.JobService/GetJob", Some(Kind::Call)),
            ("/muster.v1.JobService/ListJobs", Some(Kind::List)),
            ("/muster.v1.JobService/StreamLogs", Some(Kind::Logs)),
            ("/grpc.health.v1.Health/Check", Some(Kind::Call)),
            ("/grpc.health.v1.Health/Watch", Some(Kind::Stream)),
            ("/made.Up/Name", Some(Kind::Call)),
            ("/muster.v1.WorkerService/Session", None),
            ("/muster.v1.WorkerService/IssueCertificate", None),
            ("/muster.v1.RendezvousService/Join", None),
        ];
        for (path, expected) in table {
            assert_eq!(kind(path), expected, "{path}");
        }
        // A method that is new here and streams would be taken for one that does not.
        for path in rules::served().map(|path| format!("/{path}")) {
            let streams = ["Watch", "Stream", "ServerReflectionInfo"]
                .iter()
                .any(|word| path.rsplit('/').next().is_some_and(|method| method.starts_with(word)));
            assert_eq!(matches!(kind(&path), Some(Kind::Stream | Kind::Logs)), streams, "{path}");
        }
    }
}
