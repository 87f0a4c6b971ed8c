//! What the ranks wrote, read from their files when the coordinator asks, no faster than it takes it.
//!
//! Any output on disk can be read, also that of gangs long forgotten. Nothing here deletes: what old jobs left
//! under `<data_dir>/logs` is the operator's to remove.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_core::types::{GangId, Generation, JobId, Rank};
use muster_monitor::IntCounter;
use muster_proto::v1;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;

use crate::launch::prepare::log_dir;

/// Bytes in one message.
const CHUNK_BYTES_MAX: usize = 64 << 10;
/// Subscriptions of one session.
const SUBSCRIPTIONS_MAX: usize = 4096;
/// Most credit one message may give; permits of a semaphore are counted in bytes.
const CREDIT_BYTES_MAX: u64 = 64 << 20;
/// Time between looks at a file whose end was reached while its rank may still write.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// Gangs whose ranks may still write, each with the ranks that have ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live(Arc<Mutex<BTreeMap<GangId, BTreeSet<Rank>>>>);

impl Live {
    /// The gang's ranks may write from now on.
    pub fn insert(&self, gang: GangId) {
        self.lock().insert(gang, BTreeSet::new());
    }

    /// One rank has ended.
    pub fn end(&self, gang: &GangId, rank: Rank) {
        if let Some(ended) = self.lock().get_mut(gang) {
            ended.insert(rank);
        }
    }

    /// All have.
    pub fn remove(&self, gang: &GangId) {
        self.lock().remove(gang);
    }

    fn may_write(&self, gang: &GangId, rank: Rank) -> bool {
        self.lock().get(gang).is_some_and(|ended| !ended.contains(&rank))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GangId, BTreeSet<Rank>>> {
        // Every change is one call.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The subscriptions of one session; they end with it.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions(HashMap<u64, (Arc<Semaphore>, AbortHandle)>);

impl Subscriptions {
    /// Starts to send what is asked for.
    pub fn add(
        &mut self,
        request: v1::LogSubscribe,
        (data_dir, live): (PathBuf, Live),
        up: mpsc::Sender<v1::SessionRequest>,
        sent: IntCounter,
    ) {
        self.0.retain(|_, (_, task)| !task.is_finished());
        let number = request.subscription;
        let credit = Arc::new(Semaphore::new(0));
        let full = self.0.len() >= SUBSCRIPTIONS_MAX;
        add_credit(&credit, request.credit_bytes);
        let reader = Reader { request, credit: credit.clone(), up, sent };
        let task = tokio::spawn(async move {
            let result = if full {
                Err(format!("{SUBSCRIPTIONS_MAX} logs are being read from this node already"))
            } else {
                reader.copy(data_dir, live).await
            };
            let error = result.err().unwrap_or_default();
            reader.send(None, error.is_empty(), error).await;
        });
        if let Some((_, older)) = self.0.insert(number, (credit, task.abort_handle())) {
            older.abort();
        }
    }

    /// Allows more of one.
    pub fn credit(&self, credit: &v1::LogCredit) {
        if let Some((permits, _)) = self.0.get(&credit.subscription) {
            add_credit(permits, credit.bytes);
        }
    }

    /// Ends one.
    pub fn remove(&mut self, subscription: u64) {
        if let Some((_, task)) = self.0.remove(&subscription) {
            task.abort();
        }
    }
}

impl Drop for Subscriptions {
    fn drop(&mut self) {
        for (_, task) in self.0.values() {
            task.abort();
        }
    }
}

fn add_credit(credit: &Semaphore, bytes: u64) {
    // More than the semaphore can hold would panic; a peer that sends nonsense gets the most there is.
    let room = CREDIT_BYTES_MAX.saturating_sub(credit.available_permits() as u64);
    credit.add_permits(bytes.min(room) as usize);
}

struct Reader {
    request: v1::LogSubscribe,
    credit: Arc<Semaphore>,
    up: mpsc::Sender<v1::SessionRequest>,
    /// Counts bytes.
    sent: IntCounter,
}

impl Reader {
    async fn copy(&self, data_dir: PathBuf, live: Live) -> Result<(), String> {
        let request = &self.request;
        let job = JobId::new(request.job_id.clone())?;
        let gang = GangId { job, generation: Generation(request.generation) };
        let rank = Rank(request.rank);
        let name = match request.stream() {
            v1::LogStream::Stdout => "stdout.log",
            v1::LogStream::Stderr => "stderr.log",
            v1::LogStream::Unspecified => return Err("the stream is not known to this version".to_owned()),
        };
        let path = log_dir(&data_dir, &gang, request.local_rank).join(name);
        let failed = |error: io::Error| format!("failed to read {}: {error}", path.display());
        let mut file = loop {
            // Looked at before the file is opened: a rank that has ended meanwhile has made it by then.
            let running = live.may_write(&gang, rank);
            match File::open(&path).await {
                Ok(file) => break file,
                Err(error) if error.kind() == io::ErrorKind::NotFound && running && request.follow => {
                    tokio::time::sleep(FOLLOW_INTERVAL).await;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(format!("rank {} has written nothing to {}", request.rank, path.display()));
                }
                Err(error) => return Err(failed(error)),
            }
        };
        let mut offset = request.offset;
        file.seek(io::SeekFrom::Start(offset)).await.map_err(failed)?;
        let mut buffer = vec![0; CHUNK_BYTES_MAX];
        loop {
            // Looked at before the file is read: what comes after its end was written before the rank's.
            let ended = !live.may_write(&gang, rank);
            // At least one byte of credit, and as much more as there is.
            let Ok(first) = self.credit.acquire().await else { return Ok(()) };
            first.forget();
            let more = self.credit.forget_permits(CHUNK_BYTES_MAX - 1);
            let read = file.read(&mut buffer[..=more]).await.map_err(failed)?;
            self.credit.add_permits(more + 1 - read);
            if read > 0 {
                let data = buffer[..read].to_vec().into();
                if !self.send(Some((offset, data)), false, String::new()).await {
                    return Ok(());
                }
                offset += read as u64;
                self.sent.inc_by(read as u64);
            } else if ended || !request.follow {
                return Ok(());
            } else {
                tokio::time::sleep(FOLLOW_INTERVAL).await;
            }
        }
    }

    async fn send(&self, data: Option<(u64, bytes::Bytes)>, end: bool, error: String) -> bool {
        let request = &self.request;
        let chunk = data.map(|(offset, data)| v1::LogChunk {
            generation: request.generation,
            rank: Some(request.rank),
            stream: request.stream,
            offset,
            data,
            dropped_bytes: 0,
        });
        let log = v1::LogData { subscription: request.subscription, chunk, end, error };
        let message = v1::session_request::Message::Log(log);
        self.up.send(v1::SessionRequest { message: Some(message) }).await.is_ok()
    }
}
