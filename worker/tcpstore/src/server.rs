//! The store behind a listener: one thread of its own, so that whatever else its host does holds up no rank, and in it
//! one task for each connection.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::connection::{Connection, End};
use crate::limits::{Budget, Limits};
use crate::observe::{ClientView, KEYS_SHOWN_MAX, Snapshot, WaitView};
use crate::refusal::Refusal;
use crate::store::{Client, Replies, Store};
use crate::wire::Request;

/// Connections that wait to be accepted; the kernel cuts it to what the machine allows.
const BACKLOG: i32 = 16 << 10;
/// Time after which a silent peer is asked whether it is there, and between questions: a node that is gone for good
/// leaves no connections behind.
const KEEPALIVE: (Duration, Duration) = (Duration::from_mins(1), Duration::from_secs(10));
/// Pause when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Refusals that are logged; whoever sends nonsense for ever does not fill the disk.
const REFUSALS_LOGGED_MAX: u64 = 100;

/// A store that listens and serves nobody yet: clients can connect already and are served once it starts.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    limits: Limits,
}

impl Server {
    /// Listens on this address alone; at a port of 0, on one that is free.
    ///
    /// # Errors
    /// Those of the kernel: the port is taken, or the address is not this machine's.
    pub fn bind(address: SocketAddr, limits: Limits) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // Connections of a store that was there before do not keep the port.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let listener = TcpListener::from(socket);
        let address = listener.local_addr()?;
        Ok(Self { listener, address, limits })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until what it gives is dropped.
    ///
    /// # Errors
    /// Those of the kernel, which has no thread or no file descriptor left.
    pub fn start(self) -> io::Result<Running> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared::new(self.limits));
        let (stop, stopped) = oneshot::channel();
        let (address, served) = (self.address, shared.clone());
        let thread = std::thread::Builder::new().name("tcpstore".to_owned()).spawn(move || {
            runtime.block_on(async {
                match tokio::net::TcpListener::from_std(self.listener) {
                    Ok(listener) => served.serve(listener, stopped).await,
                    Err(error) => warn!(%error, "the store cannot serve"),
                }
            });
        })?;
        Ok(Running { address, shared, stop: Some(stop), thread: Some(thread) })
    }
}

/// A store that serves. Dropped, it closes its port and all connections.
#[derive(Debug)]
pub struct Running {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who is there and who waits for what.
    pub fn observe(&self) -> Snapshot {
        self.shared.observe()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It panicked, and said so.
            thread.join().ok();
        }
    }
}

/// What all connections share. It is locked by its one thread and by those who observe it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub limits: Limits,
    pub budget: Budget,
    began: Instant,
    state: Mutex<State>,
    refused: AtomicU64,
}

#[derive(Debug)]
struct State {
    store: Store,
    known: HashMap<Client, Arc<Connection>>,
}

/// What a panic left is taken as it is: every change is one call of the store's.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    #[expect(clippy::disallowed_methods, reason = "this is the driver of the store")]
    fn new(limits: Limits) -> Self {
        let budget = Budget::new(limits.held_bytes_max);
        let state = State { store: Store::new(limits, budget.clone()), known: HashMap::new() };
        Self { limits, budget, began: Instant::now(), state: Mutex::new(state), refused: AtomicU64::new(0) }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    async fn serve(self: Arc<Self>, listener: tokio::net::TcpListener, mut stopped: oneshot::Receiver<()>) {
        let mut connections = JoinSet::new();
        let mut next = 0;
        loop {
            let accepted = tokio::select! {
                _ = &mut stopped => return,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((_, peer)) if connections.len() >= self.limits.connections_max => {
                    self.refuse(peer, &format!("{} are connected, the most there may be", connections.len()));
                }
                Ok((stream, peer)) => {
                    next += 1;
                    connections.spawn(self.clone().connection(Client(next), peer, stream));
                }
                Err(error) => {
                    debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A connection's task, from its first byte to its last.
    async fn connection(self: Arc<Self>, id: Client, peer: SocketAddr, stream: TcpStream) {
        stream.set_nodelay(true).ok();
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE.0).with_interval(KEEPALIVE.1);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive).ok();
        let (connection, read) = match Connection::new(id, peer, stream, &self.budget, self.now()) {
            Ok(connection) => connection,
            Err(refusal) => return self.refuse(peer, &refusal.to_string()),
        };
        locked(&self.state).known.insert(id, connection.clone());
        let ended = connection.run(&self, read).await;
        {
            let mut state = locked(&self.state);
            state.known.remove(&id);
            state.store.leave(id);
        }
        match ended {
            Ok(()) => debug!(%peer, "a client closed its connection"),
            Err(End::Gone(error)) => debug!(%peer, %error, "a client is gone"),
            Err(End::Refused(refusal)) => self.refuse(peer, &refusal.to_string()),
        }
    }

    fn refuse(&self, peer: SocketAddr, why: &str) {
        if self.refused.fetch_add(1, Ordering::Relaxed) < REFUSALS_LOGGED_MAX {
            warn!(%peer, why, "a client of the store is disconnected");
        }
    }

    /// Does what a client asks. Its own replies are left in its outbox; others who wait are answered at once.
    pub fn step(&self, from: &Connection, request: Request) -> Result<(), Refusal> {
        let mut replies = Replies::new();
        let mut woken = Vec::new();
        let mut result;
        {
            let mut state = locked(&self.state);
            let State { store, known } = &mut *state;
            result = store.step(self.now(), from.id, request, &mut replies);
            for (client, reply) in &replies {
                if *client == from.id {
                    result = result.and(from.push(reply));
                } else if let Some(other) = known.get(client)
                    && other.push(reply).is_ok()
                {
                    woken.push(other.clone());
                }
            }
        }
        for connection in woken {
            connection.flush_for();
        }
        result
    }

    fn observe(&self) -> Snapshot {
        let state = locked(&self.state);
        let now = self.now();
        let mut waits: HashMap<Client, WaitView> = state
            .store
            .waiting(KEYS_SHOWN_MAX)
            .map(|waiting| (waiting.client, WaitView::new(&waiting, now)))
            .collect();
        let mut clients: Vec<(Client, ClientView)> =
            (state.known.iter()).map(|(id, known)| (*id, known.view(now, waits.remove(id)))).collect();
        clients.sort_by_key(|(id, _)| *id);
        Snapshot {
            clients: clients.into_iter().map(|(_, view)| view).collect(),
            joined: crate::observe::joined(&state.store),
            keys: state.store.len(),
            held_bytes: self.budget.held_bytes(),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}
