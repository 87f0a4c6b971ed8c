//! Counts calls by method and status code.
//!
//! A refusal has its code in the headers, an answer has it behind its last message, and a call whose caller goes away or
//! whose time is up has none.

use std::collections::BTreeSet;
use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::Code;
use tonic::body::Body;
use tower::{Layer, Service};

use super::Monitor;

/// Methods that no descriptor here tells of.
const REFLECTION: [&str; 2] = [
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
/// What a caller has made up. There is no end of such names, and each series costs memory.
const UNKNOWN: &str = "unknown";

/// Every method that is served, and [`UNKNOWN`].
pub(super) fn methods() -> BTreeSet<String> {
    let mut methods: BTreeSet<String> = REFLECTION.map(str::to_owned).into();
    methods.insert(UNKNOWN.to_owned());
    for set in [muster_proto::DESCRIPTOR_SET, tonic_health::pb::FILE_DESCRIPTOR_SET] {
        // They are compiled in, and the reflection service has read them.
        for file in FileDescriptorSet::decode(set).unwrap_or_default().file {
            for service in &file.service {
                let of = |method: &str| format!("{}.{}/{method}", file.package(), service.name());
                methods.extend(service.method.iter().map(|method| of(method.name())));
            }
        }
    }
    methods
}

/// The layer; the outermost, so that it sees what the others refuse.
#[derive(Clone, Debug)]
pub(crate) struct CountCalls(pub Monitor);

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, monitor: self.0.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Clone, Debug)]
pub(crate) struct Counted<S> {
    inner: S,
    monitor: Monitor,
}

impl<S, Q, A> Service<Request<Q>> for Counted<S>
where
    S: Service<Request<Q>, Response = Response<A>>,
    S::Future: Send + 'static,
    A: http_body::Body<Data = Bytes> + Send + 'static,
    A::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let mut call = Call::new(&self.monitor, request.uri().path());
        let timer = self.monitor.call_seconds.with_label_values(&[&call.method]).start_timer();
        let answer = self.inner.call(request);
        Box::pin(async move {
            // The only error of the layers within: too many calls at once.
            let answer = answer.await.inspect_err(|_| call.code = Some(Code::ResourceExhausted))?;
            timer.observe_duration();
            call.code = code(answer.headers());
            Ok(answer.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    // As a whole: a closure that names a field alone would take only that, and the call would end here.
                    call.hear(frame.trailers_ref());
                    frame
                }))
            }))
        })
    }
}

/// A call under way. Counted when it is dropped.
struct Call {
    monitor: Monitor,
    method: String,
    code: Option<Code>,
}

impl Call {
    fn new(monitor: &Monitor, path: &str) -> Self {
        let method = path.trim_start_matches('/');
        let method = if monitor.methods.contains(method) { method } else { UNKNOWN }.to_owned();
        Self { monitor: monitor.clone(), method, code: None }
    }

    fn hear(&mut self, trailers: Option<&HeaderMap>) {
        self.code = trailers.and_then(code).or(self.code);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let code = format!("{:?}", self.code.unwrap_or(Code::Cancelled));
        self.monitor.calls.with_label_values(&[self.method.as_str(), code.as_str()]).inc();
    }
}

fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_methods_have_a_series() {
        let monitor = Monitor::new();
        let submit = "muster.v1.JobService/SubmitJob";
        for path in ["/muster.v1.JobService/SubmitJob", "/made.Up/Name", "//", "/grpc.health.v1.Health/Check"]
        {
            drop(Call::new(&monitor, path));
        }
        let count = |method| monitor.calls.with_label_values(&[method, "Cancelled"]).get();
        assert_eq!((count(submit), count(UNKNOWN), count("grpc.health.v1.Health/Check")), (1, 2, 1));
    }
}
