//! One connection: its requests in, its replies out. While a client does not take its replies, nothing more is read
//! from it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use crate::input::Input;
use crate::limits::Budget;
use crate::observe::{ClientView, WaitView, rank_in};
use crate::refusal::Refusal;
use crate::reply::{Outbox, Reply};
use crate::server::{Shared, locked};
use crate::store::Client;
use crate::wire::Request;

/// Read at once, in bytes: one buffer for all connections of a thread, so that an idle one costs none.
const READ_BYTES: usize = 64 << 10;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    /// The client closed it, or its machine is gone.
    #[error("the client is gone: {0}")]
    Gone(#[from] io::Error),
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
}

/// The side of a connection that others reach too: whoever sets a key sends at once what those get who wait for it.
#[derive(Debug)]
pub(crate) struct Connection {
    pub id: Client,
    pub peer: SocketAddr,
    write: OwnedWriteHalf,
    outbox: Mutex<Outbox>,
    /// Somebody else could not send all.
    stuck: Notify,
    since: Duration,
    process: OnceLock<u32>,
    rank: OnceLock<u32>,
    requests: AtomicU64,
}

impl Connection {
    /// Begun at `since`.
    pub fn new(
        id: Client,
        peer: SocketAddr,
        stream: TcpStream,
        budget: &Budget,
        since: Duration,
    ) -> Result<(Arc<Self>, OwnedReadHalf), Refusal> {
        let (read, write) = stream.into_split();
        let connection = Self {
            id,
            peer,
            write,
            outbox: Mutex::new(Outbox::new(budget)?),
            stuck: Notify::new(),
            since,
            process: OnceLock::new(),
            rank: OnceLock::new(),
            requests: AtomicU64::new(0),
        };
        Ok((Arc::new(connection), read))
    }

    /// Serves it until it ends; well, if the client closes it.
    pub async fn run(&self, shared: &Shared, mut read: OwnedReadHalf) -> Result<(), End> {
        let mut input = Input::new(shared.limits, &shared.budget)?;
        let max = shared.limits.handshake_max;
        // Over before the rest, so that no timer runs on with each connection.
        let handshake = tokio::time::timeout(max, async {
            while !input.is_validated() {
                if poll_fn(|context| receive(&mut read, &mut input, context)).await? == 0 {
                    return Ok(false);
                }
                // The validation has no reply, and asks for nothing else.
                input.take()?;
            }
            Ok(true)
        });
        match handshake.await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Ok(()),
            Ok(Err(end)) => return Err(end),
            Err(_) => return Err(Refusal::Silent(max.as_secs()).into()),
        }
        loop {
            let mut is_sent = self.flush()?;
            while is_sent && let Some(request) = input.take()? {
                self.note(&request);
                shared.step(self, request)?;
                is_sent = self.flush()?;
            }
            if !is_sent {
                self.write.writable().await?;
                continue;
            }
            tokio::select! {
                biased;
                length = poll_fn(|context| receive(&mut read, &mut input, context)) => if length? == 0 {
                    return Ok(());
                },
                () = self.stuck.notified() => {}
            }
        }
    }

    /// What is seen of it. What its wait is, the store knows.
    pub fn view(&self, now: Duration, wait: Option<WaitView>) -> ClientView {
        ClientView {
            peer: self.peer,
            process: self.process.get().copied(),
            rank: self.rank.get().copied(),
            connected: now.saturating_sub(self.since),
            requests: self.requests.load(Ordering::Relaxed),
            wait,
        }
    }

    fn note(&self, request: &Request) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        match request {
            Request::Ping(process) => _ = self.process.set(*process),
            Request::Set(key, _) if self.rank.get().is_none() => {
                if let Some(rank) = rank_in(key) {
                    self.rank.set(rank).ok();
                }
            }
            _ => {}
        }
    }

    /// Adds a reply, to be sent with the next flush.
    pub fn push(&self, reply: &Reply) -> Result<(), Refusal> {
        locked(&self.outbox).push(reply)
    }

    /// Sends for another task; what does not go now is its own task's.
    pub fn flush_for(&self) {
        if !matches!(self.flush(), Ok(true)) {
            self.stuck.notify_one();
        }
    }

    /// Sends what the kernel takes; whether that was all.
    fn flush(&self) -> Result<bool, End> {
        let mut outbox = locked(&self.outbox);
        while !outbox.is_empty() {
            let sent = match outbox.slice() {
                Some(bytes) => self.write.try_write(bytes),
                None => self.write.try_write_vectored(&outbox.slices()),
            };
            match sent {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(sent) => outbox.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    outbox.hold()?;
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

/// Reads what is there; 0 at the end.
fn receive(
    read: &mut OwnedReadHalf,
    input: &mut Input,
    context: &mut Context<'_>,
) -> Poll<Result<usize, End>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(read).poll_read(context, &mut buffer))?;
        let bytes = buffer.filled();
        input.push(bytes)?;
        Poll::Ready(Ok(bytes.len()))
    })
}
