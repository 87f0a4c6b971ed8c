//! What the daemon stands on in a simulated network: its clock, its connections, and model ranks that run for as long as
//! their command says. The daemon and its session are the real ones. Never part of a program that is shipped.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use muster_core::types::{Assignment, GangId, Millis, Rank, RankExit};
use muster_worker_core::{Fence, Input};
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use turmoil::net::TcpStream;

use crate::session::connection::Notes;
use crate::shim::{Command, Ends};

/// Signals that end model ranks.
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
/// Time that a rank takes to end once it is asked to.
const STOPS_AFTER: Duration = Duration::from_millis(200);

/// What one node has executed of a gang.
#[derive(Clone, Debug)]
pub struct Life {
    /// The node's data directory's id.
    pub node: String,
    /// Its job and generation.
    pub gang: GangId,
    /// When its ranks began, in simulated time.
    pub began: Millis,
    /// When the last of them ended.
    pub ended: Option<Millis>,
}

thread_local! {
    static LIVES: RefCell<Vec<Life>> = const { RefCell::new(Vec::new()) };
    static CUT: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
    static LAST: RefCell<Millis> = const { RefCell::new(Millis(0)) };
}

/// Takes what was executed so far on this thread.
pub fn take_lives() -> Vec<Life> {
    LIVES.take()
}

/// Simulated time, as whoever moves it knows it.
pub fn set_now(now: Duration) {
    LAST.set(millis(now));
}

/// Simulated time, in a simulation.
pub(crate) fn now() -> Option<Millis> {
    let now = turmoil::in_simulation().then(turmoil::sim_elapsed).flatten()?;
    set_now(now);
    Some(millis(now))
}

fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

/// Whether what this host sends is lost, or what is sent to it.
pub fn set_cut(host: &str, cut: bool) {
    CUT.with_borrow_mut(|all| if cut { all.insert(host.to_owned()) } else { all.remove(host) });
}

/// Makes a connection over the simulated network. The URL says who calls whom: `http://caller.called:port`.
///
/// The simulated network refuses a connection whose first packet is lost, and makes one whose second is. Here it is not
/// answered, as in a real one.
pub(crate) async fn dial(uri: Uri, notes: Notes) -> io::Result<TcpStream> {
    let (caller, called) = uri.host().and_then(|host| host.split_once('.')).unwrap_or_default();
    let port = uri.port_u16().unwrap_or(80);
    let connected = TcpStream::connect((called.to_owned(), port)).await;
    if CUT.with_borrow(|all| all.contains(caller)) {
        return std::future::pending().await;
    }
    if let Ok(mut reached) = notes.lock() {
        reached.note(SocketAddr::new(turmoil::lookup(called), port), &connected);
    }
    connected
}

/// The same for a client.
pub async fn connect(endpoint: &Endpoint) -> Result<Channel, Error> {
    crate::session::connection::connect(endpoint).await.0
}

/// Ranks that run. When it is dropped they have ended, for whatever reason.
struct Running(usize);

impl Running {
    fn begin(node: String, gang: GangId) -> Self {
        let began = LAST.with_borrow(|now| *now);
        LIVES.with_borrow_mut(|lives| {
            lives.push(Life { node, gang, began, ended: None });
            Self(lives.len() - 1)
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let now = LAST.with_borrow(|now| *now);
        LIVES.with_borrow_mut(|lives| lives[self.0].ended = Some(now));
    }
}

/// How a rank ended.
enum End {
    Done,
    Signal(i32),
}

/// A model shim: launches when it is told, ends its ranks when they have worked, when it is told, or when their lease has
/// run out. The second argument of their command says for how many milliseconds they work.
pub(crate) async fn follow(
    assignment: Assignment,
    mut ends: Ends,
    node: String,
    events: mpsc::Sender<Input>,
) {
    let gang = assignment.gang.clone();
    let port = (assignment.placement.group_rank == 0).then_some(29_500);
    events.send(Input::Prepared(gang.clone(), port)).await.ok();
    let mut fence = loop {
        tokio::select! {
            command = ends.commands.recv() => match command {
                Some(Command::Launch { fence, .. }) => break fence,
                Some(Command::Stop(_)) => return over(&gang, &mut ends, &events).await,
                Some(_) => {}
                None => return,
            },
            () = ends.kill.cancelled() => return over(&gang, &mut ends, &events).await,
        }
    };
    let running = Running::begin(node, gang.clone());
    events.send(Input::Launched(gang.clone())).await.ok();
    let work = assignment.spec.command.get(1).and_then(|ms| ms.parse().ok()).unwrap_or(0);
    let done = tokio::time::sleep(Duration::from_millis(work));
    tokio::pin!(done);
    let end = loop {
        tokio::select! {
            () = &mut done => break End::Done,
            () = until(fence) => {
                events.send(Input::Fenced(gang.clone())).await.ok();
                tokio::time::sleep(STOPS_AFTER).await;
                break End::Signal(SIGTERM);
            }
            Ok(()) = ends.fence.changed() => fence = ends.fence.borrow_and_update().or(fence),
            command = ends.commands.recv() => match command {
                Some(Command::Stop(_)) => {
                    tokio::time::sleep(STOPS_AFTER).await;
                    break End::Signal(SIGTERM);
                }
                Some(_) => {}
                None => return std::future::pending().await,
            },
            () = ends.kill.cancelled() => break End::Signal(SIGKILL),
        }
    };
    now();
    drop(running);
    let first = assignment.placement.first_rank.0;
    for rank in first..first + assignment.placement.procs {
        let (code, signal) = match end {
            End::Done => (Some(0), None),
            End::Signal(signal) => (None, Some(signal)),
        };
        let time = now().unwrap_or_default();
        let (rank, stderr_tail) = (Rank(rank), String::new());
        let exit = RankExit { rank, code, signal, time, stderr_tail, out_of_memory: false, error: None };
        events.send(Input::Exited(gang.clone(), exit)).await.ok();
    }
    over(&gang, &mut ends, &events).await;
}

/// Nothing runs any more; waits to be released.
async fn over(gang: &GangId, ends: &mut Ends, events: &mpsc::Sender<Input>) {
    events.send(Input::Gone(gang.clone())).await.ok();
    while !matches!(ends.commands.recv().await, Some(Command::Release) | None) {}
}

/// Waits until ranks are to be asked to end; for ever without a lease.
async fn until(fence: Option<Fence>) {
    match fence {
        Some(fence) => {
            let left = fence.term.since(now().unwrap_or_default());
            tokio::time::sleep(Duration::from_millis(left.0)).await;
        }
        None => std::future::pending().await,
    }
}
