//! A connection to whichever coordinator leads: calls that reach another one are made again where it says.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use muster_proto::convert::NotLeader;
use muster_worker::trust::{self, Token, Trust};
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt;
use tower::{Service, ServiceExt};

use crate::exit::Failure;
use crate::output::say;

/// Time to connect to one coordinator.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a call waits for somebody to lead: a failover takes about five seconds.
const LEADERLESS_MAX: Duration = Duration::from_secs(15);
/// How long one of several may owe an answer before the next is asked. It may hang.
const ANSWER_MAX: Duration = Duration::from_secs(4);
/// The same for the only one: beyond what it gives itself.
const ALONE_MAX: Duration = Duration::from_mins(1);
/// A connection on which nothing comes is probed after this long, and given up after as long again: streams go on elsewhere.
const PROBE: Duration = Duration::from_secs(5);
/// Pause before the next coordinator is asked who leads.
const ASK_PAUSE: Duration = Duration::from_millis(100);
/// The header of an answer that may no longer be so.
const STALE: &str = "muster-stale";

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Response = http::Response<Body>;

/// Shared by its clones: what one of them learns, all know.
#[derive(Clone, Debug)]
pub(crate) struct Leading(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    urls: Vec<String>,
    trust: Trust,
    token: Option<Token>,
    /// Which of them is tried next.
    next: usize,
    channel: Channel,
    url: String,
    /// Warnings that were shown.
    shown: BTreeSet<String>,
}

impl State {
    /// How the next call goes, and what is shown there.
    fn way(&self) -> (Channel, Option<http::HeaderValue>) {
        // Nobody on the way may read it.
        let shown = self.token.as_ref().filter(|_| trust::is_encrypted(&self.url));
        (self.channel.clone(), shown.map(Token::header))
    }
}

/// The endpoint of a URL, with its times.
pub(crate) fn endpoint(url: &str, trust: &Trust) -> Result<Endpoint, Failure> {
    let endpoint = trust.endpoint(url);
    let endpoint = endpoint.map_err(|why| {
        Failure::Usage(format!("{:?} is not the URL of a coordinator: {why}", trust::shown(url)))
    })?;
    let endpoint = endpoint.http2_keep_alive_interval(PROBE).keep_alive_timeout(PROBE);
    Ok(endpoint.connect_timeout(CONNECT_MAX))
}

impl Leading {
    /// Connects to the first that takes the connection, whether it leads or not.
    pub async fn connect(urls: &[String], trust: &Trust, token: Option<Token>) -> Result<Self, Failure> {
        let endpoints = urls.iter().map(|url| endpoint(url, trust)).collect::<Result<Vec<_>, _>>()?;
        let mut refusals = Vec::new();
        for (index, (url, endpoint)) in urls.iter().zip(endpoints).enumerate() {
            match endpoint.connect().await {
                Ok(channel) => {
                    let (urls, trust, url) = (urls.to_vec(), trust.clone(), url.clone());
                    let state =
                        State { urls, trust, token, next: index + 1, channel, url, shown: BTreeSet::new() };
                    return Ok(Self(Arc::new(Mutex::new(state))));
                }
                Err(error) => refusals.push(format!("{url}: {}", trust::why(&error))),
            }
        }
        Err(Failure::Unreachable(format!(
            "cannot reach a coordinator at {}; start one with `muster coordinator`, or name another with \
             --coordinator or MUSTER_COORDINATOR",
            refusals.join(", nor at ")
        )))
    }

    /// Where it is connected.
    pub fn url(&self) -> String {
        self.state().url.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is whole before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes to this coordinator, or without one to the next of the list; not if it cannot be reached.
    async fn go(&self, to: Option<String>) {
        let url = to.unwrap_or_else(|| {
            let mut state = self.state();
            let url = state.urls[state.next % state.urls.len()].clone();
            state.next = (state.next + 1) % state.urls.len();
            url
        });
        let (from, trust) = (self.url(), self.state().trust.clone());
        if from == url || !trust::may_send(&from, &url) {
            return;
        }
        let Ok(endpoint) = endpoint(&url, &trust) else { return };
        if let Ok(channel) = endpoint.connect().await {
            let mut state = self.state();
            (state.channel, state.url) = (channel, url);
        }
    }

    /// Makes a call until the leader has answered it. All of ours may be made twice.
    async fn call(self, request: http::Request<Body>) -> Result<Response, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let end = Instant::now() + LEADERLESS_MAX;
        loop {
            let (channel, shown) = self.state().way();
            let mut request = http::Request::from_parts(head.clone(), Body::new(Full::new(body.clone())));
            if let Some(shown) = shown {
                request.headers_mut().insert(http::header::AUTHORIZATION, shown);
            }
            let alone = self.state().urls.len() == 1;
            let most = if alone { ALONE_MAX } else { ANSWER_MAX };
            let answer = match tokio::time::timeout(most, channel.oneshot(request)).await {
                Err(_) => Err("it did not answer".into()),
                Ok(Ok(response)) => match refused(&response) {
                    None => {
                        self.warn(&response);
                        return Ok(response);
                    }
                    Some(says) => Ok((response, says.leader)),
                },
                Ok(Err(error)) => Err(BoxError::from(error)),
            };
            match answer {
                // Who names no leader may know one soon.
                Ok((response, leader)) if Instant::now() < end => {
                    drop(response);
                    if leader.is_empty() || leader == self.url() {
                        tokio::time::sleep(ASK_PAUSE).await;
                    }
                    self.go(Some(leader).filter(|leader| !leader.is_empty())).await;
                }
                Err(_) if !alone && Instant::now() < end => {
                    tokio::time::sleep(ASK_PAUSE).await;
                    self.go(None).await;
                }
                Ok((response, _)) => return Ok(response),
                Err(error) => {
                    let said = trust::said(error.as_ref());
                    let said = said.map(|why| Status::unavailable(format!("{}: {why}", self.url())));
                    return Err(said.map_or(error, BoxError::from));
                }
            }
        }
    }

    fn warn(&self, response: &Response) {
        let Some(why) = response.headers().get(STALE).and_then(|why| why.to_str().ok()) else { return };
        if self.state().shown.insert(why.to_owned()) {
            say!("warning: this may no longer be so: {why}");
        }
    }
}

impl Service<http::Request<Body>> for Leading {
    type Response = Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(Self::call(self.clone(), request))
    }
}

/// What one has answered that does not lead, or has just stopped.
fn refused(response: &Response) -> Option<NotLeader> {
    let status = Status::from_header_map(response.headers())?;
    let stopping = status.get_details_error_info().is_some_and(|info| info.reason == "STOPPING");
    NotLeader::from_status(&status).or_else(|| stopping.then(NotLeader::default))
}
