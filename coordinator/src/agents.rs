//! The runs of agents that Muster did not start: a task each, which owns the run and feeds it what its agents say.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use muster_core::agents::{Hello, Link, Run, Said, Tell, Tells};
use muster_core::types::{Incarnation, Owner, RequestId, limits};
use muster_core::{Caller, not_owned};
use muster_proto::{convert, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::{debug, info};

use crate::clock::Clock;
use crate::driver::RequestError;

/// Runs at once.
const RUNS_MAX: usize = 4096;
/// Agents of all runs together: more than the largest round has, so that spares fit.
const AGENTS_MAX: usize = 2 * limits::NODES_MAX as usize;
/// What agents of one run have said and has not been looked at.
const INBOX_MAX: usize = 1024;
/// Messages to one agent that wait for it. It is told a few for each round; one that does not take them is gone.
pub(crate) const OUTBOX_MAX: usize = 16;
/// A run that nobody is in is forgotten after this long, and with it that it has ended: agents that were cut off come back
/// sooner.
const FORGET_AFTER: Duration = Duration::from_mins(1);

/// What goes to an agent.
pub(crate) type Outbox = mpsc::Sender<Result<v1::RendezvousServiceJoinResponse, Status>>;

/// An agent's stream, as far as its run knows it.
#[derive(Debug)]
pub(crate) struct Joined {
    pub agent: Incarnation,
    pub link: Link,
    run: mpsc::Sender<Command>,
    /// Cancelled when the run has nothing more to say to the agent.
    pub over: CancellationToken,
    /// Given back with the rest.
    #[expect(dead_code, reason = "it is held, not read")]
    place: OwnedSemaphorePermit,
}

impl Joined {
    /// Tells the run what the agent said; false if the run is gone.
    pub async fn say(&self, said: Said) -> bool {
        let command = Command::Said { agent: self.agent.clone(), link: self.link, said };
        self.run.send(command).await.is_ok()
    }
}

#[derive(Debug)]
enum Command {
    Join { link: Link, hello: Hello, client: Client, answer: oneshot::Sender<Result<(), String>> },
    Said { agent: Incarnation, link: Link, said: Said },
}

/// Where a stream goes out. Dropped, it ends the stream.
#[derive(Debug)]
struct Client {
    outbox: Outbox,
    over: CancellationToken,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

/// A run that there is.
#[derive(Debug)]
struct Listed {
    /// Who began it, where that is known. It stays theirs until nobody is left and it is forgotten.
    owner: Option<Owner>,
    inbox: mpsc::Sender<Command>,
}

fn full(what: String) -> Status {
    convert::refusal(Code::ResourceExhausted, "TOO_MANY_AGENTS", what)
}

/// All runs.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    by_id: Arc<Mutex<HashMap<RequestId, Listed>>>,
    places: Arc<Semaphore>,
    links: Arc<AtomicU64>,
    clock: Clock,
    shutdown: CancellationToken,
}

impl Runs {
    pub fn new(clock: Clock, shutdown: CancellationToken) -> Self {
        let places = Arc::new(Semaphore::new(AGENTS_MAX));
        Self { by_id: Arc::default(), places, links: Arc::default(), clock, shutdown }
    }

    /// An agent's stream begins.
    pub async fn join(&self, hello: Hello, by: &Caller, outbox: Outbox) -> Result<Joined, Status> {
        let place = (self.places.clone().try_acquire_owned())
            .map_err(|_| full(format!("{AGENTS_MAX} agents are here, the most that are served")))?;
        let (agent, link) = (hello.agent.clone(), self.links.fetch_add(1, Ordering::Relaxed));
        let run = self.inbox(&hello, by)?;
        let over = CancellationToken::new();
        let client = Client { outbox, over: over.clone() };
        let (answer, answered) = oneshot::channel();
        let sent = run.send(Command::Join { link, hello, client, answer }).await;
        // A run forgets itself only while nobody holds its inbox; it is gone only when everything stops.
        let stopping = || Status::from(RequestError::Stopping);
        sent.map_err(|_| stopping())?;
        let refused = |why| convert::refusal(Code::FailedPrecondition, "OTHER_RUN", why);
        answered.await.map_err(|_| stopping())?.map_err(refused)?;
        Ok(Joined { agent, link, run, over, place })
    }

    /// Where the run of this agent listens, which begins if there is none.
    fn inbox(&self, hello: &Hello, by: &Caller) -> Result<mpsc::Sender<Command>, Status> {
        let mut runs = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(run) = runs.get(&hello.run) {
            if by.may_change(run.owner.as_ref()) {
                return Ok(run.inbox.clone());
            }
            let message = format!(
                "run {} {}; a run of your own needs another --rdzv-id",
                hello.run,
                not_owned(run.owner.as_ref())
            );
            return Err(convert::refusal(Code::PermissionDenied, "NOT_OWNER", message));
        }
        if runs.len() >= RUNS_MAX {
            return Err(full(format!("there are {RUNS_MAX} runs of agents, the most that are served")));
        }
        let (sender, inbox) = mpsc::channel(INBOX_MAX);
        runs.insert(hello.run.clone(), Listed { owner: by.name.clone(), inbox: sender.clone() });
        let run = Run::new(hello.spec, self.clock.started());
        tokio::spawn(self.clone().drive(hello.run.clone(), run, inbox));
        Ok(sender)
    }

    /// Forgets the run unless somebody is about to come.
    fn forget(&self, id: &RequestId, inbox: &mpsc::Receiver<Command>) -> bool {
        let mut runs = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
        // One sender is the map's own; others are only made under its lock.
        let unused = inbox.sender_strong_count() == 1 && inbox.is_empty();
        unused && runs.remove(id).is_some()
    }

    async fn drive(self, id: RequestId, mut run: Run, mut inbox: mpsc::Receiver<Command>) {
        let mut clients: HashMap<Link, Client> = HashMap::new();
        loop {
            let now = self.clock.now();
            let wake = run.wake_at().map_or(FORGET_AFTER, |at| Duration::from_millis(at.since(now).0));
            let command = tokio::select! {
                command = inbox.recv() => command,
                () = tokio::time::sleep(wake) => None,
                () = self.shutdown.cancelled() => {
                    for client in clients.values() {
                        client.outbox.try_send(Err(RequestError::Stopping.into())).ok();
                    }
                    return;
                }
            };
            let now = self.clock.now();
            let nothing_said = command.is_none();
            let round = run.round().map(|round| round.round);
            let mut tells = Tells::new();
            match command {
                Some(Command::Join { link, hello, client, answer }) => {
                    debug!(run = %id, agent = %hello.agent, node = %hello.node, held = ?hello.held, "agent comes");
                    clients.insert(link, client);
                    let joined = run.join(now, link, hello);
                    let refused =
                        joined.map(|told| tells = told).inspect_err(|_| drop(clients.remove(&link)));
                    answer.send(refused).ok();
                }
                Some(Command::Said { agent, link, said }) => {
                    debug!(run = %id, %agent, ?said, "agent says");
                    let ends = matches!(said, Said::Leave(_) | Said::Gone);
                    tells = run.hear(now, &agent, link, said);
                    if ends {
                        clients.remove(&link);
                    }
                }
                None => run.settle(now, &mut tells),
            }
            if let Some(begun) = run.round().filter(|begun| Some(begun.round) != round) {
                info!(run = %id, round = begun.round, agents = begun.world_size, store = %begun.store, "a round begins");
            }
            for (link, tell) in tells {
                if let Tell::Recall(reason) | Tell::Closed(reason) = &tell {
                    debug!(run = %id, link, %reason, "agent is told that it is over");
                }
                let last = matches!(tell, Tell::Closed(_));
                let Some(client) = clients.get(&link) else { continue };
                if client.outbox.try_send(Ok(convert::agent_tell_to_wire(tell))).is_err() || last {
                    clients.remove(&link);
                }
            }
            let idle = nothing_said && wake == FORGET_AFTER && run.is_empty() && clients.is_empty();
            if idle && self.forget(&id, &inbox) {
                return;
            }
        }
    }
}
