//! How this node finds the others: it serves the run, or finds who does, within the time that there
//! is for it.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::net::{TcpListener, lookup_host};
use tokio::time::Instant;

use super::WAITING_SHOWN_AFTER;
use super::answer::{self, Answer, Store};
use super::args::RunArgs;
use super::meeting::{Meeting, Serve};
use super::node::address_of;
use crate::args::Global;
use crate::client::Client;
use crate::exit::Failure;
use crate::output::say;

/// First and longest time between attempts to reach the coordinator.
const RETRY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));
/// Key in a job's store at which nodes find who serves their run, before the name of the run.
const STORE_KEY: &str = "muster.run.";

/// How nodes meet.
#[derive(Debug)]
pub(super) enum Met {
    /// This one serves the run, at this URL.
    Serve(TcpListener, String),
    /// Another one does.
    Join(String),
}

/// Serves the run, or finds the node that does.
pub(super) async fn meet(
    meeting: &Meeting,
    wanted: Serve,
    args: &RunArgs,
    run_id: &str,
) -> Result<Met, Failure> {
    let mut waits = Waits::new(meeting.join_timeout);
    if meeting.is_agent_store {
        return meet_in_store(meeting, args, run_id, waits).await;
    }
    let (host, port) = (meeting.host.as_str(), meeting.port);
    loop {
        if let Some(listener) = bind(host, port, wanted).await? {
            return Ok(Met::Serve(listener, meeting.url()));
        }
        match waits.ask(host, port, run_id).await {
            Answer::Http2 => return Ok(Met::Join(meeting.url())),
            other => waits.pause(&meeting.url(), &other).await?,
        }
    }
}

/// Takes the place, if it is this node's to take.
async fn bind(host: &str, port: u16, wanted: Serve) -> Result<Option<TcpListener>, Failure> {
    if wanted == Serve::No {
        return Ok(None);
    }
    let failed = |why: &str| anyhow::anyhow!("failed to serve the run at {host}:{port}: {why}");
    let found = lookup_host((host, port)).await.map_err(|error| failed(&error.to_string()))?;
    let mut last = "the name has no address".to_owned();
    let is_meant = host == "localhost" || host.parse::<IpAddr>().is_ok();
    for address in found {
        // A name may have addresses that this machine does not know of, and stand for loopback
        // here: whatever the others find behind it serves, as with torchrun.
        let own = UdpSocket::bind((address.ip(), 0));
        let bound = match own {
            _ if is_meant => muster_coordinator::listen(address),
            Ok(_) => muster_coordinator::listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))),
            Err(error) => Err(error),
        };
        match bound {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && wanted == Serve::IfHere => {
                return Ok(None);
            }
            Err(error) => last = error.to_string(),
        }
    }
    if wanted == Serve::IfHere { Ok(None) } else { Err(failed(&last).into()) }
}

/// Waits for the coordinator that runs there for longer than this run.
pub(super) async fn reach_coordinator(
    meeting: &Meeting,
    url: &str,
    global: &Global,
    run_id: &str,
) -> Result<Client, Failure> {
    let mut waits = Waits::new(meeting.join_timeout);
    if !meeting.is_encrypted {
        loop {
            match waits.ask(&meeting.host, meeting.port, run_id).await {
                Answer::Http2 => break,
                other => waits.pause(url, &other).await?,
            }
        }
    }
    reach(url, global, waits.left()).await
}

/// Finds the others by the store of the job whose ranks they are. The first of them writes there
/// where it serves.
async fn meet_in_store(
    meeting: &Meeting,
    args: &RunArgs,
    run_id: &str,
    mut waits: Waits,
) -> Result<Met, Failure> {
    let (host, port) = (meeting.host.as_str(), meeting.port);
    let key = format!("{STORE_KEY}{run_id}");
    // A node that has gone has left its address, which the next one may replace.
    let mut gone = String::new();
    loop {
        let asked = async {
            let mut store = Store::connect(host, port).await?;
            let ip = match args.local_addr.as_ref().filter(|host| !host.is_empty()) {
                Some(host) => address_of(host).await.map_err(|_| io::ErrorKind::AddrNotAvailable)?,
                None => store.local_address()?,
            };
            let listener = muster_coordinator::listen(SocketAddr::from((ip, 0)))?;
            let own = listener.local_addr()?.to_string();
            let found = store.compare_set(&key, &gone, &own).await?;
            Ok::<_, io::Error>((found == own, listener, found))
        };
        match tokio::time::timeout(waits.left(), asked).await {
            Ok(Ok((true, listener, own))) => return Ok(Met::Serve(listener, format!("http://{own}"))),
            Ok(Ok((false, _, found))) => {
                let url = format!("http://{found}");
                let answer = match found.parse::<SocketAddr>() {
                    Ok(at) => waits.ask(&at.ip().to_string(), at.port(), run_id).await,
                    Err(_) => Answer::Other,
                };
                if answer == Answer::Http2 {
                    return Ok(Met::Join(url));
                }
                if answer.is_refused() {
                    gone = found;
                }
                waits.pause(&url, &answer).await?;
            }
            Ok(Err(error)) => waits.pause(&meeting.url(), &Answer::nothing(&error)).await?,
            Err(_) => waits.pause(&meeting.url(), &Answer::Other).await?,
        }
    }
}

/// Whoever serves may come later.
pub(super) async fn reach(url: &str, global: &Global, limit: Duration) -> Result<Client, Failure> {
    let global = Global { coordinator: vec![url.to_owned()], ..global.clone() };
    let tried = async {
        let mut pause = RETRY.0;
        loop {
            match Client::connect(&global).await {
                Err(Failure::Unreachable(_)) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 5 / 4).min(RETRY.1);
                }
                connected => return connected,
            }
        }
    };
    let late = || {
        Failure::Other(anyhow::anyhow!(
            "nobody serves the run at {url}; waited {} s (join_timeout)",
            limit.as_secs()
        ))
    };
    tokio::time::timeout(limit, tried).await.map_err(|_| late())?
}

/// Waits for a node that has yet to come, with pauses that grow, and says what is there instead.
struct Waits {
    limit: Duration,
    start: Instant,
    pause: Duration,
    has_said: bool,
    /// What answered the last time.
    last: Answer,
}

impl Waits {
    fn new(limit: Duration) -> Self {
        Self { limit, start: Instant::now(), pause: RETRY.0, has_said: false, last: Answer::Other }
    }

    /// Asks what is there, for as long as there is time.
    async fn ask(&mut self, host: &str, port: u16, run_id: &str) -> Answer {
        if let Ok(answer) = tokio::time::timeout(self.left(), answer::ask(host, port, run_id)).await {
            self.last = answer;
        }
        self.last.clone()
    }

    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.start.elapsed())
    }

    /// Pauses, or fails once the time is over.
    async fn pause(&mut self, url: &str, answer: &Answer) -> Result<(), Failure> {
        let left = self.left();
        if left.is_zero() {
            let seconds = self.limit.as_secs_f64();
            let words =
                format!("nobody serves the run at {url}: {answer}; waited {seconds} s (join_timeout)");
            return Err(Failure::Other(anyhow::anyhow!("{words}")));
        }
        let is_other = !matches!(answer, Answer::Nothing(..));
        if is_other && !self.has_said && self.start.elapsed() >= WAITING_SHOWN_AFTER {
            self.has_said = true;
            say!("muster run: waiting for a node that serves the run at {url}: {answer}");
        }
        tokio::time::sleep(self.pause.min(left)).await;
        self.pause = (self.pause * 5 / 4).min(RETRY.1);
        Ok(())
    }
}
