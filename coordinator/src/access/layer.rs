//! The layer by which every call is judged before it reaches a service, and noted where it is refused or changes something.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Extensions, Request, Response};
use muster_core::Caller;
use tonic::body::Body;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::rules::{self, Rule};
use super::{Identity, denied, identify, local, unauthenticated};
use crate::audit::subject::{Kind, Subject};
use crate::audit::{Audit, Record};
use crate::edge::peer::LoopbackUsers;
use crate::edge::{self, Known};
use crate::office::Office;

/// Longest part of what a caller has made up that is logged.
const SHOWN_CHARS_MAX: usize = 128;
/// Longest reason in an audit line: some messages quote what a caller has sent.
const REASON_CHARS_MAX: usize = 512;

/// What a node is told that shows nothing.
const NODE_WORDS: &str = "this needs the certificate of a node: start it with --join-token-file FILE and the token that `muster token \
                          create --role node` prints";

/// By which way calls come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// A Unix socket, or a port on which nothing is encrypted and that was opened by --insecure or for one run.
    Trusted,
    /// A port of loopback on which nothing is encrypted, for these users. Whoever calls it by another
    /// name was led here.
    Loopback(LoopbackUsers),
    /// TLS: whoever calls says who he is.
    Encrypted,
}

/// The layer.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    pub door: Door,
    pub office: Office,
    pub audit: Audit,
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
type Judged = (Option<Identity>, Result<Option<Kind>, Status>);

impl Guard {
    /// Returns who of this machine calls; none where calls are authenticated.
    fn local<Q>(&self, request: &Request<Q>) -> Option<Result<Caller, Status>> {
        let found = request.extensions();
        match &self.door {
            Door::Encrypted => None,
            Door::Trusted => {
                let known = found.get::<Known<UdsConnectInfo>>().map(|known| &known.inner);
                let peer = known.or_else(|| found.get()).and_then(|info| info.peer_cred);
                Some(Ok(local::trusted(peer.map(|peer| peer.uid()))))
            }
            Door::Loopback(users) => {
                let user = found.get::<Known<TcpConnectInfo>>().map(|known| known.check_user(users));
                let user = user.unwrap_or(Ok(None));
                let by_name = edge::only_by_loopback_names(request.uri());
                Some(user.and_then(|user| by_name.map(|()| local::caller(user))))
            }
        }
    }

    /// Returns whether the call may go on, and what it changes.
    fn judge<Q>(&self, request: &Request<Q>) -> Judged {
        let rule = rules::rule(request.uri().path());
        if let Some(caller) = self.local(request) {
            let identity = match caller {
                Ok(caller) => Identity::Local(caller),
                Err(status) => return (None, Err(status)),
            };
            // What does not exist is answered so by the router.
            let may = rule.map_or(Ok(()), |(rule, _)| rules::check(rule, &identity));
            return (Some(identity), may.map(|()| rule.and_then(|(_, changes)| changes)));
        }
        let Some((rule, changes)) = rule else {
            return (None, Err(denied("this coordinator has no such method")));
        };
        if rule == Rule::Open {
            return (None, Ok(changes));
        }
        let certificates = request.extensions().get::<TlsConnectInfo<Known<TcpConnectInfo>>>();
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

impl<S, A> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<A>>,
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // Handlers look for the addresses where tonic's own connections have them.
        let found = request.extensions();
        let tls = found.get::<TlsConnectInfo<Known<TcpConnectInfo>>>().map(TlsConnectInfo::get_ref);
        let tcp = tls.or_else(|| found.get()).map(|known| known.inner.clone());
        let unix = found.get::<Known<UdsConnectInfo>>().map(|known| known.inner.clone());
        tcp.map(|tcp| request.extensions_mut().insert(tcp));
        unix.map(|unix| request.extensions_mut().insert(unix));
        let (identity, judged) = self.guard.judge(&request);
        // Nothing behind this may log it.
        request.headers_mut().remove(http::header::AUTHORIZATION);
        let kind = rules::rule(request.uri().path()).and_then(|(_, changes)| changes);
        let audit = self.guard.audit.clone();
        match judged {
            Ok(changes) => {
                if let Some(identity) = &identity {
                    let rule = rules::rule(request.uri().path()).map(|(rule, _)| rule);
                    note_identified(request.extensions(), rule == Some(Rule::Node));
                    request.extensions_mut().insert(identity.clone());
                }
                // Most calls only read, and leave no line.
                let Some(kind) = changes else { return Box::pin(self.inner.call(request)) };
                let (record, subject) = (record(&request, identity.as_ref()), Subject::new(kind));
                request.extensions_mut().insert(subject.clone());
                let answer = self.inner.call(request.map(|body| subject.noted(body)));
                Box::pin(async move {
                    let answer = answer.await?;
                    let status = Status::from_header_map(answer.headers());
                    let (outcome, reason) = status.map_or((Code::Ok, String::new()), |status| {
                        (status.code(), shortened(status.message()))
                    });
                    audit.changed(Record { object: subject.object(), reason, ..record }, outcome);
                    Ok(answer)
                })
            }
            // Who is sent on to the leader is refused nothing.
            Err(status) if status.code() == Code::Unavailable => {
                Box::pin(async move { Ok(status.into_http()) })
            }
            Err(status) => {
                let (record, peer) = (record(&request, identity.as_ref()), peer(request.extensions()));
                Box::pin(async move {
                    let mut object = None;
                    if let Some(kind) = kind {
                        let subject = Subject::new(kind);
                        subject.read(request.into_body()).await;
                        object = subject.object();
                    }
                    let record = Record { object, reason: shortened(status.message()), ..record };
                    audit.refused(record, status.code(), peer.map(|peer| peer.ip()));
                    Ok(status.into_http())
                })
            }
        }
    }
}

/// Lets the connection of a call whose caller is known stay; that of a node has a part in the reserve.
fn note_identified(of: &Extensions, is_a_nodes: bool) {
    let tls = of.get::<TlsConnectInfo<Known<TcpConnectInfo>>>().map(TlsConnectInfo::get_ref);
    if let Some(tcp) = tls.or_else(|| of.get()) {
        tcp.identified();
        if is_a_nodes {
            tcp.mark_node();
        }
    } else if let Some(unix) = of.get::<Known<UdsConnectInfo>>() {
        unix.identified();
    }
}

fn accepted_at(extensions: &Extensions) -> Option<SocketAddr> {
    extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::local_addr).map(muster_monitor::canonical)
}

fn peer(extensions: &Extensions) -> Option<SocketAddr> {
    extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr).map(muster_monitor::canonical)
}

/// Returns what is known of a call before it is answered. No secret is ever in it.
fn record<Q>(request: &Request<Q>, identity: Option<&Identity>) -> Record {
    Record {
        who: identity.map_or_else(|| "nobody".to_owned(), ToString::to_string),
        role: identity.map_or("none", Identity::role),
        from: peer(request.extensions()).map_or_else(|| "local".to_owned(), |peer| peer.to_string()),
        method: request.uri().path().chars().take(SHOWN_CHARS_MAX).collect(),
        ..Record::default()
    }
}

fn shortened(message: &str) -> String {
    message.chars().take(REASON_CHARS_MAX).collect()
}
