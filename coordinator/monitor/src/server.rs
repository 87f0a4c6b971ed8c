//! The page itself. Whoever reaches the port may be hostile: each connection has a bound, and there are few of them.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::catalogue::Catalogue;
use crate::places::{PlaceLimits, Places};

/// Connections at once: some Prometheus servers, probes, and a person. Others wait.
const CONNECTIONS_MAX: usize = 64;
/// Those of one address that is not this machine's: the others are for probes and for Prometheus.
const PEER_MAX: usize = CONNECTIONS_MAX / 4;
/// Longest time in which a request's head must have come.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// Longest time of a connection, so that no client can keep all of them. A scrape is much shorter; Prometheus connects again.
const CONNECTION_MAX: Duration = Duration::from_mins(5);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Time to wait when the process has no file left for a connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What is shown.
pub struct Page {
    /// The metrics.
    pub catalogue: Catalogue,
    /// Whether the daemon does its work; if not, why, in words.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Called before the metrics are read, for those that are the state of something. It is quick.
    pub refresh: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").finish_non_exhaustive()
    }
}

/// Serves until `shutdown`. Trouble with connections is logged: a daemon does not end for it.
pub async fn serve(listener: TcpListener, page: Page, shutdown: CancellationToken) {
    let (page, places) = (Arc::new(page), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
    let parts = Places::new(PlaceLimits { strangers: CONNECTIONS_MAX, peer: PEER_MAX });
    let accepting = async {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let (stream, part) = match listener.accept().await {
                // Who has its part already is ended at once.
                Ok((stream, peer)) => match parts.take(peer.ip()) {
                    Ok(part) => (stream, part),
                    Err(_) => continue,
                },
                Err(error) => {
                    if error.kind() != io::ErrorKind::ConnectionAborted {
                        warn!(%error, "failed to take a connection for metrics");
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                    continue;
                }
            };
            let (page, over) = (page.clone(), shutdown.clone());
            tokio::spawn(async move {
                let answering = service_fn(move |request: Request<Incoming>| {
                    let answer = page.answer(request.method(), request.uri().path());
                    async { Ok::<_, Infallible>(answer) }
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_MAX)
                    .max_buf_size(HEAD_BYTES_MAX)
                    .serve_connection(TokioIo::new(stream), answering);
                tokio::select! {
                    // A client that goes away, or speaks something else, is none of ours to mend.
                    _ = tokio::time::timeout(CONNECTION_MAX, connection) => {}
                    () = over.cancelled() => {}
                }
                drop((place, part));
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = shutdown.cancelled() => {}
    }
}

impl Page {
    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n".to_owned());
            refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        match path {
            "/metrics" => {
                (self.refresh)();
                let (text, kind) = self.catalogue.text();
                let mut response = Response::new(Full::from(text));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
                response
            }
            "/healthz" => plain(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => match (self.ready)() {
                Ok(()) => plain(StatusCode::OK, "ready\n".to_owned()),
                Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
            },
            _ => plain(StatusCode::NOT_FOUND, "here are /metrics, /healthz and /readyz\n".to_owned()),
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn what_is_answered() {
        let catalogue = Catalogue::new("test", "1.2.3");
        let looks = catalogue.gauge("looks", "How often somebody looked.");
        let page = Page {
            catalogue,
            ready: Box::new(|| Err("nobody leads".to_owned())),
            refresh: Box::new(move || looks.inc()),
        };
        let table = [
            (Method::GET, "/metrics", 200, "muster_build_info{role=\"test\",version=\"1.2.3\"} 1\n"),
            (
                Method::GET,
                "/metrics",
                200,
                "# HELP looks How often somebody looked.\n# TYPE looks gauge\nlooks 2\n",
            ),
            (Method::GET, "/metrics", 200, "process_resident_memory_bytes "),
            (Method::GET, "/healthz", 200, "ok\n"),
            (Method::GET, "/readyz", 503, "not ready: nobody leads\n"),
            (Method::GET, "/", 404, "/metrics"),
            (Method::POST, "/metrics", 405, "only GET"),
        ];
        for (method, path, status, expected) in table {
            let response = page.answer(&method, path);
            assert_eq!(response.status(), status, "{method} {path}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let text = String::from_utf8_lossy(&body);
            assert!(text.contains(expected), "{method} {path}: {text}");
        }
    }
}
