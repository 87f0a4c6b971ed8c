//! The one stream to the coordinator: connect, join, say hello, and connect again with jittered backoff when
//! it breaks. Ranks run on meanwhile.

pub(crate) mod connection;
mod leader;
mod queues;
mod route;
mod signs;

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use muster_core::Inventory;
use muster_core::types::{Millis, limits};
use muster_proto::convert::{NotLeader, inventory_to_wire, span_from_wire};
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use muster_proto::v1::{self, worker_service_client::WorkerServiceClient};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tracing::{debug, warn};

use crate::clock::boot_now;
use crate::credentials::Credentials;
use crate::{Config, Error, trust};
use connection::{Known, address_towards, connect};
pub(crate) use leader::Leader;
use leader::Newest;
use queues::Prioritised;
use route::Route;
use signs::{Signs, is_broken};

/// First and longest pause between attempts to connect. With jitter over the whole pause, ten thousand nodes
/// come back spread over it rather than all at once.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Time to connect, and least time to be answered.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long another daemon may hold our name before we give up: an earlier life of this one lets go of it
/// within a lease.
const NAME_HELD_MAX: Duration = Duration::from_secs(30);
/// Heartbeats whose sending time is remembered until they are acknowledged: more than fit in the silence after which a
/// session is given up.
const UNACKNOWLEDGED_MAX: usize = 64;
/// Heartbeats on their way up: more that wait say nothing new.
const URGENT_MAX: usize = 8;
/// Reports on their way up.
const CONTROL_MAX: usize = 16;
/// Batches of points on their way up; the others wait in files.
const POINTS_MAX: usize = 2;
/// Pieces of log on their way up, at most 64 KiB each.
const LOGS_MAX: usize = 32;
/// Largest message, as the coordinator's.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// What the session tells the daemon.
#[derive(Debug)]
pub enum Event {
    /// A session begins.
    Open {
        /// With whom.
        coordinator: String,
        /// What it was told that the machine has.
        inventory: Arc<Inventory>,
        /// Takes the first message.
        hello: oneshot::Sender<v1::Hello>,
        /// Take the others.
        queues: Queues,
    },
    /// The coordinator said something.
    Heard(Box<Down>),
    /// The stream is gone.
    Closed,
    /// A heartbeat that was sent then is acknowledged.
    Renewed {
        /// When it was sent.
        sent: Millis,
        /// The lease's length.
        lease: Millis,
    },
    /// No coordinator runs.
    CoordinatorGone {
        /// When that was tried.
        at: Millis,
    },
}

/// The ends into which the daemon puts what goes up.
#[derive(Debug)]
pub struct Queues {
    /// Reports, and whatever else the coordinator decides by.
    pub control: mpsc::Sender<v1::SessionRequest>,
    /// Points, which go after those.
    pub points: mpsc::Sender<v1::SessionRequest>,
    /// Output, which goes after everything else.
    pub logs: mpsc::Sender<v1::SessionRequest>,
}

/// Who this node is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The daemon's settings.
    pub config: Config,
    /// This start of the daemon.
    pub incarnation: String,
    /// This boot of the machine.
    pub boot_id: String,
    /// Identity of the data directory.
    pub data_id: String,
    /// The data directory.
    pub data_dir: PathBuf,
    /// What the machine has, the last that is known.
    pub inventory: watch::Receiver<Arc<Inventory>>,
    /// When ranks are asked to end unless there is word, or proof that there is no coordinator; none if none are.
    pub fenced_at: watch::Receiver<Option<Millis>>,
}

/// How an attempt ended.
#[derive(Debug)]
enum Failure {
    /// The coordinator could not be reached.
    Connect(Status),
    /// It did not take the node.
    Join(Status),
    /// It took the node; the session broke later.
    Session(Status),
}

/// Whether no further attempt can succeed. `held` is for how long another daemon has held our name.
///
/// Only a refused Join is final. A session that breaks, for whatever reason, must not cost the ranks their lives.
fn is_final(failure: &Failure, held: Option<Duration>) -> bool {
    match failure {
        Failure::Join(status) => match status.code() {
            Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => true,
            Code::AlreadyExists => held.is_some_and(|held| held > NAME_HELD_MAX),
            _ => false,
        },
        Failure::Connect(_) | Failure::Session(_) => false,
    }
}

/// Keeps a session open. Only returns when no attempt can ever succeed.
pub async fn keep(identity: Identity, events: mpsc::Sender<Event>) -> Error {
    let Config { name, join_token_file, trust, .. } = &identity.config;
    let credentials = Credentials::load(name, &identity.data_dir, join_token_file.clone(), trust);
    let mut route = match Route::new(&identity.config.coordinators, &identity.config.trust) {
        Ok(route) => route,
        Err(error) => return error,
    };
    let (mut held_since, mut said) = (None, HashMap::new());
    let known = Known::load(identity.data_dir.clone(), identity.boot_id.clone());
    let newest = Newest::load(identity.data_dir.clone());
    let mut signs = Signs::new(&identity.config, known, newest, events.clone(), identity.fenced_at.clone());
    loop {
        let began = Instant::now();
        let target = route.next();
        signs.current = target.index;
        let endpoint = signs.probed(&target.endpoint);
        let mut opened = None;
        let tried = match credentials.ready(&target.url).await {
            Ok(()) => {
                // What is shown may have been renewed.
                let endpoint = route.endpoint(&target).map_or(endpoint, |endpoint| signs.probed(&endpoint));
                let to = (target.url.as_str(), &endpoint, &credentials);
                once(&identity, to, &events, &mut signs, &mut opened).await
            }
            Err(status) if status.code() == Code::Unavailable => Err(Failure::Connect(status)),
            Err(status) => Err(Failure::Join(status)),
        };
        if let Err(failure) = tried {
            let (Failure::Connect(status) | Failure::Join(status) | Failure::Session(status)) = &failure;
            let error = status.message();
            // While all are away each attempt finds the same.
            if said.get(&target.index).is_none_or(|said| said != error) {
                warn!(coordinator = %target.url, error, "no session with the coordinator");
                said.insert(target.index, error.to_owned());
            } else {
                debug!(coordinator = %target.url, error, "no session with the coordinator");
            }
            if let Some(says) = NotLeader::from_status(status) {
                route.follow(&target, &says.leader);
            }
            let is_held = matches!(&failure, Failure::Join(status) if status.code() == Code::AlreadyExists);
            held_since = is_held.then(|| held_since.unwrap_or(began));
            let refused = matches!(
                &failure,
                Failure::Join(status) if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated)
            );
            if refused && credentials.can_join_anew() {
                continue;
            }
            if is_final(&failure, held_since.map(|since| began.duration_since(since))) {
                return Error::Refused(status.message().to_owned());
            }
        }
        // To have waited long for a session is no success.
        if opened.is_some_and(|opened: Instant| opened.elapsed() > BACKOFF.1) {
            said.clear();
            route.succeeded();
        }
        if opened.is_some() {
            route.lost(&target);
        }
        // Ranks live by what the attempts find out: there must be several in a lease.
        tokio::time::sleep(route.wait(signs.lease() / 4)).await;
    }
}

/// The heartbeat and the lease that the coordinator wants; the usual ones where it says nothing that can be.
pub(crate) fn times(joined: &v1::JoinResponse) -> (Millis, Millis) {
    let span = |field, wire: Option<&_>, default: Millis| {
        span_from_wire(field, wire, default).unwrap_or(default).clamp(Millis(10), limits::SPAN_MAX)
    };
    let heartbeat = span("heartbeat_interval", joined.heartbeat_interval.as_ref(), Millis::from_secs(1));
    (heartbeat, span("lease", joined.lease.as_ref(), Millis::from_secs(10)))
}

/// One session, from connecting to its end. `opened` says since when there is one.
async fn once(
    identity: &Identity,
    (url, endpoint, credentials): (&str, &Endpoint, &Credentials),
    events: &mpsc::Sender<Event>,
    signs: &mut Signs,
    opened: &mut Option<Instant>,
) -> Result<(), Failure> {
    let inventory = identity.inventory.borrow().clone();
    let (mut client, joined) = join(identity, &inventory, url, endpoint, signs).await?;
    let (heartbeat, lease) = times(&joined);
    signs.lease = lease;

    let (urgent, urgent_queue) = mpsc::channel(URGENT_MAX);
    let (control, control_queue) = mpsc::channel(CONTROL_MAX);
    let (points, points_queue) = mpsc::channel(POINTS_MAX);
    let (logs, logs_queue) = mpsc::channel(LOGS_MAX);
    let ends = || Failure::Session(Status::cancelled("the daemon ends"));
    let (reply, hello) = oneshot::channel();
    let (coordinator, queues) = (url.to_owned(), Queues { control, points, logs });
    let open = Event::Open { coordinator, inventory, hello: reply, queues };
    events.send(open).await.map_err(|_| ends())?;
    let hello = hello.await.map_err(|_| ends())?;
    // The queue is new, and nothing is taken from it before the stream is opened below: hello goes first.
    urgent.try_send(request(Up::Hello(hello))).ok();
    let hello_sent = boot_now();
    let renewing = client.clone();
    let session = async {
        let queues = [urgent_queue, control_queue, points_queue, logs_queue];
        let stream = client.session(Prioritised(queues));
        let stream = signs.watch(endpoint, stream).await??.into_inner();
        // Whoever opens the session grants the lease. Ranks never run without one.
        events
            .send(Event::Renewed { sent: hello_sent, lease })
            .await
            .map_err(|_| Status::cancelled("the daemon ends"))?;
        *opened = Some(Instant::now());
        let (newest, survey) = signs.parts();
        tokio::select! {
            ended = pump(stream, urgent, events, newest, heartbeat, lease) => ended,
            () = survey => Ok(()),
            // The next session shows the new one.
            () = credentials.renewed(&renewing) => Ok(()),
        }
    };
    let result = session.await;
    events.send(Event::Closed).await.ok();
    result.map_err(Failure::Session)
}

/// Connects, and registers the node.
async fn join(
    identity: &Identity,
    inventory: &Inventory,
    url: &str,
    endpoint: &Endpoint,
    signs: &mut Signs,
) -> Result<(WorkerServiceClient<Channel>, v1::JoinResponse), Failure> {
    let began = boot_now();
    let connecting = connect(endpoint);
    let (channel, reached) = if trust::is_encrypted(url) {
        // It ends only when the coordinator's process has answered, which may hang.
        let watched = signs.watch(endpoint, async { Ok(connecting.await) }).await;
        watched.flatten().map_err(Failure::Connect)?
    } else {
        connecting.await
    };
    let channel = match channel {
        Ok(channel) => channel,
        Err(error) => {
            // What was found out while a connection was waited for that was taken stands.
            if reached.peer.is_none() {
                signs.refused(began, &reached).await;
            }
            let why = trust::why(&error);
            return Err(Failure::Connect(Status::unavailable(format!("failed to connect to {url}: {why}"))));
        }
    };
    let client = WorkerServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let address = match identity.config.address {
        Some(address) => address,
        None => address_towards(endpoint, reached.peer).await.map_err(Failure::Connect)?,
    };
    let mut joining = client.clone();
    match signs.watch(endpoint, joining.join(join_request(identity, inventory, address))).await {
        Ok(Ok(joined)) => {
            signs.joined(&reached, joined.get_ref()).await.map_err(Failure::Join)?;
            Ok((client, joined.into_inner()))
        }
        // What was found out while it was waited for stands.
        Ok(Err(status)) if is_broken(&status) => {
            // Certificates of clients are looked at when the connection is there already.
            Err(Failure::Connect(Status::unavailable(format!("{url}: {}", trust::why(&status)))))
        }
        Ok(Err(status)) => {
            match NotLeader::from_status(&status) {
                Some(says) => signs.does_not_lead(began, &reached, &says).await,
                // Whoever answers is there.
                None => signs.somebody().await,
            }
            Err(Failure::Join(status))
        }
        Err(silent) => Err(Failure::Connect(silent)),
    }
}

/// Hands on what is heard, and beats. Ends when the stream does, or when a good part of a lease passes without a word:
/// what is wrong must be known before ranks are asked to end. Not sooner: of ten thousand nodes that leave a coordinator which
/// is merely slow each comes back as a new connection, and that is what makes it slow.
async fn pump(
    mut stream: tonic::Streaming<v1::SessionResponse>,
    urgent: mpsc::Sender<v1::SessionRequest>,
    events: &mpsc::Sender<Event>,
    newest: &Newest,
    heartbeat: Millis,
    lease: Millis,
) -> Result<(), Status> {
    let ends = |_| Status::cancelled("the daemon ends");
    let mut beat = tokio::time::interval(Duration::from_millis(heartbeat.0));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let silence_max = Duration::from_millis((lease.0 * 3 / 8).max(heartbeat.0 * 5 / 4));
    // When the heartbeats were sent that are not acknowledged yet, the oldest first.
    let mut sent: VecDeque<(u64, Millis)> = VecDeque::new();
    let (mut seq, mut heard) = (0, Instant::now());
    loop {
        tokio::select! {
            biased;
            _ = beat.tick() => {
                seq += 1;
                let at = boot_now();
                // A queue that is full holds heartbeats enough.
                if urgent.try_send(request(Up::Heartbeat(v1::Heartbeat { seq }))).is_ok() {
                    sent.push_back((seq, at));
                }
                sent.truncate(UNACKNOWLEDGED_MAX);
            }
            // What has come is heard before its absence is held against the coordinator: it may be this machine that
            // was slow.
            message = stream.message() => {
                heard = Instant::now();
                let Some(message) = message? else { return Err(Status::aborted("the coordinator closed it")) };
                if !newest.counts(message.term) {
                    return Err(Status::aborted("a coordinator that was deposed goes on speaking"));
                }
                let renewed = match &message.message {
                    Some(Down::HeartbeatAck(ack)) => {
                        let known = sent.partition_point(|(seq, _)| *seq <= ack.seq);
                        sent.drain(..known).next_back().map(|(_, at)| at)
                    }
                    _ => None,
                };
                if let Some(sent) = renewed {
                    events.send(Event::Renewed { sent, lease }).await.map_err(ends)?;
                }
                if let Some(message) = message.message {
                    events.send(Event::Heard(Box::new(message))).await.map_err(ends)?;
                }
            }
            () = tokio::time::sleep_until(heard + silence_max) => {
                return Err(Status::unavailable("the coordinator says nothing"));
            }
        }
    }
}

/// Makes a request of a message.
pub fn request(message: Up) -> v1::SessionRequest {
    v1::SessionRequest { message: Some(message) }
}

fn join_request(identity: &Identity, inventory: &Inventory, address: IpAddr) -> v1::JoinRequest {
    v1::JoinRequest {
        node_name: identity.config.name.to_string(),
        address: address.to_string(),
        incarnation: identity.incarnation.clone(),
        boot_id: identity.boot_id.clone(),
        data_id: identity.data_id.clone(),
        inventory: Some(inventory_to_wire(inventory)),
    }
}

#[cfg(test)]
mod tests;
