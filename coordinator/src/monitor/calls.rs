//! Counts calls by method and status code.
//!
//! A refusal has its code in the headers, an answer has it behind its last message, and a call whose caller goes away or
//! whose time is up has none.

use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use tonic::Code;
use tonic::body::Body;
use tower::{Layer, Service};

use super::Monitor;
use crate::access::rules;

/// What a caller has made up. There is no end of such names, and each series costs memory.
const UNKNOWN: &str = "unknown";

/// The values that the label `method` can have: every method that is served, and [`UNKNOWN`].
pub(super) fn methods() -> impl Iterator<Item = &'static str> {
    rules::served().chain([UNKNOWN])
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
        let timer = self.monitor.call_seconds.with_label_values(&[call.method]).start_timer();
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
    method: &'static str,
    code: Option<Code>,
}

impl Call {
    fn new(monitor: &Monitor, path: &str) -> Self {
        let method = path.trim_start_matches('/');
        let method = methods().find(|known| *known == method).unwrap_or(UNKNOWN);
        Self { monitor: monitor.clone(), method, code: None }
    }

    fn hear(&mut self, trailers: Option<&HeaderMap>) {
        self.code = trailers.and_then(code).or(self.code);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let code = format!("{:?}", self.code.unwrap_or(Code::Cancelled));
        self.monitor.calls.with_label_values(&[self.method, code.as_str()]).inc();
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
