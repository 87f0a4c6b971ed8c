//! The layer by which every call is judged before it reaches a service, and noted where it is refused or changes something.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Extensions, Request, Response};
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{info, warn};

use super::rules::{self, Rule};
use super::{Identity, denied, identify, unauthenticated};
use crate::edge;
use crate::office::Office;

/// Where audit lines go, to be kept apart by RUST_LOG.
const AUDIT: &str = "audit";
/// Longest part of what a caller has made up that is logged.
const SHOWN_CHARS_MAX: usize = 128;

/// What a node is told that shows nothing.
const NODE_WORDS: &str = "this needs the certificate of a node: start it with --join-token-file FILE and the token that `muster token \
                          create --role node` prints";

/// By which way calls come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// A Unix socket, or a port on which nothing is encrypted and that was opened by --insecure or for one run.
    Trusted,
    /// A port of loopback on which nothing is encrypted. Whoever calls it by another name was led here.
    Loopback,
    /// TLS: whoever calls says who he is.
    Encrypted,
}

/// The layer.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    pub door: Door,
    pub office: Office,
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, guard: self.clone() }
    }
}

/// A service whose calls are judged.
#[derive(Clone, Debug)]
pub(crate) struct Guarded<S> {
    inner: S,
    guard: Guard,
}

/// A call that may go on, or not; and who made it, if that is known.
type Judged = (Option<Identity>, Result<bool, Status>);

impl Guard {
    /// Whether the call may go on, and whether it changes something.
    fn judge<Q>(&self, request: &Request<Q>) -> Judged {
        let rule = rules::rule(request.uri().path());
        if self.door == Door::Loopback
            && let Err(status) = edge::only_by_loopback_names(request.uri())
        {
            return (None, Err(status));
        }
        if self.door != Door::Encrypted {
            // What does not exist is answered so by the router.
            return (Some(Identity::Local), Ok(rule.is_some_and(|(_, changes)| changes)));
        }
        let Some((rule, changes)) = rule else {
            return (None, Err(denied("this coordinator has no such method")));
        };
        if rule == Rule::Open {
            return (None, Ok(changes));
        }
        let certificates = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        let certificates = certificates.and_then(TlsConnectInfo::peer_certs);
        let certificate = certificates.as_ref().and_then(|chain| chain.first()).map(AsRef::as_ref);
        // Only who leads knows the tokens. The others say who does, which is no secret.
        let driver = match self.office.reign_for(accepted_at(request.extensions())) {
            Ok(reign) => reign.driver,
            Err(status) => return (None, Err(status)),
        };
        let named = request.headers().contains_key(http::header::AUTHORIZATION);
        match identify(request.headers(), certificate, &driver.tokens(), driver.clock().now()) {
            Ok(identity) => {
                let may = rules::check(rule, &identity).map(|()| changes);
                (Some(identity), may)
            }
            // A node is told of what nodes show.
            Err(_) if certificate.is_none() && !named && matches!(rule, Rule::Node | Rule::Joining) => {
                (None, Err(unauthenticated(NODE_WORDS)))
            }
            Err(status) => (None, Err(status)),
        }
    }
}

impl<S, Q, A> Service<Request<Q>> for Guarded<S>
where
    S: Service<Request<Q>, Response = Response<A>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    A: Default + Send + 'static,
{
    type Response = Response<A>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<A>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Q>) -> Self::Future {
        // Handlers look for the addresses where connections without TLS have them.
        let tls = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        if let Some(tcp) = tls.map(|tls| tls.get_ref().clone()) {
            request.extensions_mut().insert(tcp);
        }
        let (identity, judged) = self.guard.judge(&request);
        // Nothing behind this may log it.
        request.headers_mut().remove(http::header::AUTHORIZATION);
        // Most calls only read, and leave none.
        let line = match judged {
            Ok(changes) => changes.then(|| Line::new(&request, identity.as_ref())),
            Err(status) => {
                // Who is sent on to the leader is refused nothing.
                if status.code() != Code::Unavailable {
                    Line::new(&request, identity.as_ref()).denied(&status);
                }
                return Box::pin(async move { Ok(status.into_http()) });
            }
        };
        if let Some(identity) = identity {
            request.extensions_mut().insert(identity);
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            if let Some(line) = line {
                let status = Status::from_header_map(answer.headers());
                line.done(status.map_or(Code::Ok, |status| status.code()));
            }
            Ok(answer)
        })
    }
}

fn accepted_at(extensions: &Extensions) -> Option<SocketAddr> {
    extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::local_addr)
}

/// What an audit line says. No secret is ever in it.
struct Line {
    who: String,
    role: &'static str,
    method: String,
    peer: String,
}

impl Line {
    fn new<Q>(request: &Request<Q>, identity: Option<&Identity>) -> Self {
        let peer = request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        Self {
            who: identity.map_or_else(|| "nobody".to_owned(), ToString::to_string),
            role: identity.map_or("none", Identity::role),
            method: request.uri().path().chars().take(SHOWN_CHARS_MAX).collect(),
            peer: peer.map_or_else(|| "local".to_owned(), |peer| peer.to_string()),
        }
    }

    fn denied(&self, status: &Status) {
        let Self { who, role, method, peer } = self;
        warn!(target: AUDIT, %who, role, ?method, %peer, outcome = ?status.code(), why = status.message(), "denied");
    }

    fn done(&self, outcome: Code) {
        let Self { who, role, method, peer } = self;
        info!(target: AUDIT, %who, role, %method, %peer, ?outcome, "asked for");
    }
}
