//! The audit: who asked for what change of which object, and who was refused. A line of JSON each in
//! `audit.jsonl` in the data directory, beside the log lines of target `audit`.
//!
//! A call never waits for the file: records go through a bounded queue to one thread, and what finds
//! no room is counted in the file itself. It is written, not fsynced: a machine that loses power may
//! lose the last second.

mod file;
mod refusals;
pub(crate) mod subject;

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use tonic::Code;
use tracing::{info, warn};

use crate::clock::Clock;
use file::File;
use refusals::{Admitted, Refusals};

/// Where audit lines go in the log, to be kept apart by RUST_LOG.
const AUDIT: &str = "audit";
/// Name of the file in the data directory.
pub(crate) const NAME: &str = "audit.jsonl";
/// Records that wait for the disk: a burst of some seconds, in a few MiB.
const QUEUE_MAX: usize = 4096;
/// Time between checks for refusals that were only counted.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// One line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Record {
    /// When it was answered, in RFC 3339.
    pub time: String,
    /// Who asked: `token:NAME`, `node:NAME`, `user:NAME` of this machine, `local` where that is not known, or `nobody`.
    pub who: String,
    pub role: &'static str,
    /// Address of the peer, or `local` for the Unix socket.
    pub from: String,
    pub method: String,
    /// `job:ID`, `node:NAME`, `token:NAME` or `run:ID`; nothing where the call named none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    pub outcome: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Number of refusals of the same peer that have no line of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more: Option<u64>,
}

/// Takes records. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Audit {
    shared: Arc<Shared>,
    /// None: nothing is kept in a file.
    queue: Option<SyncSender<Message>>,
}

struct Shared {
    clock: Clock,
    refusals: Mutex<Refusals>,
    /// Records that found no room in the queue.
    lost: AtomicU64,
    writer: Mutex<Option<JoinHandle<()>>>,
}

enum Message {
    Record(Box<Record>),
    Stop,
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audit").finish_non_exhaustive()
    }
}

impl Audit {
    /// Begins to keep records: in the log, and in this directory if there is one.
    pub fn start(dir: Option<&Path>) -> Self {
        let (queue, records) = match dir {
            Some(_) => Some(sync_channel(QUEUE_MAX)).unzip(),
            None => (None, None),
        };
        let shared = Arc::new(Shared {
            clock: Clock::start(),
            refusals: Mutex::default(),
            lost: AtomicU64::new(0),
            writer: Mutex::default(),
        });
        if let (Some(dir), Some(records)) = (dir, records) {
            let (file, of) = (File::new(dir.join(NAME)), shared.clone());
            let thread = std::thread::Builder::new().name("audit".to_owned());
            match thread.spawn(move || of.write_all(&records, file)) {
                Ok(writer) => *locked(&shared.writer) = Some(writer),
                Err(error) => warn!(%error, "no thread for the audit's file; the log has its lines"),
            }
        }
        Self { shared, queue }
    }

    /// Keeps a change that was asked for, whatever became of it.
    pub fn changed(&self, mut record: Record, outcome: Code) {
        record.outcome = format!("{outcome:?}");
        let Record { who, role, from, method, object, reason, .. } = &record;
        let object = object.as_deref().unwrap_or("");
        info!(target: AUDIT, %who, role, %from, %method, %object, ?outcome, %reason, "asked for");
        self.keep(record);
    }

    /// Keeps a refusal, or counts it where its peer has caused many.
    pub fn refused(&self, mut record: Record, outcome: Code, peer: Option<IpAddr>) {
        record.outcome = format!("{outcome:?}");
        match locked(&self.shared.refusals).admit(peer, self.shared.clock.now()) {
            Admitted::Counted => return,
            Admitted::Line { more } => record.more = (more > 0).then_some(more),
        }
        let Record { who, role, from, method, object, reason, .. } = &record;
        let object = object.as_deref().unwrap_or("");
        warn!(target: AUDIT, %who, role, %from, ?method, %object, ?outcome, %reason, "denied");
        self.keep(record);
    }

    /// Writes what waits, and ends the file. Later records are in the log alone.
    pub async fn close(&self) {
        if let Some(queue) = &self.queue {
            // A full queue is written first; the writer sees that it is alone by then.
            queue.try_send(Message::Stop).ok();
        }
        let writer = locked(&self.shared.writer).take();
        if let Some(writer) = writer {
            let ended = tokio::task::spawn_blocking(move || writer.join());
            if tokio::time::timeout(CHECK_INTERVAL * 2, ended).await.is_err() {
                warn!("the last lines of the audit could not be written in time");
            }
        }
    }

    fn keep(&self, mut record: Record) {
        let Some(queue) = &self.queue else { return };
        record.time = self.shared.time();
        if queue.try_send(Message::Record(Box::new(record))).is_err() {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Shared {
    fn time(&self) -> String {
        let millis = self.clock.now().0;
        let nanos = (millis % 1000) as i32 * 1_000_000;
        prost_types::Timestamp { seconds: (millis / 1000) as i64, nanos }.to_string()
    }

    /// Writes records until it is told to stop, with what was counted meanwhile.
    fn write_all(&self, records: &Receiver<Message>, mut file: File) {
        let mut stops = false;
        while !stops {
            match records.recv_timeout(CHECK_INTERVAL) {
                Ok(Message::Record(record)) => self.write(&mut file, &record),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => stops = true,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = self.clock.now();
            let counted = locked(&self.refusals).counted(now, stops);
            for (from, more) in counted {
                warn!(target: AUDIT, %from, more, "denied more often than has lines");
                let record = Record {
                    who: "unknown".to_owned(),
                    role: "none",
                    from,
                    outcome: "Refused".to_owned(),
                    reason: "refused more often than has lines".to_owned(),
                    more: Some(more),
                    time: self.time(),
                    ..Record::default()
                };
                self.write(&mut file, &record);
            }
            self.write_lost(&mut file);
        }
    }

    fn write(&self, file: &mut File, record: &Record) {
        if let Err(error) = file.write(record) {
            // Said once for each time that it goes wrong.
            if self.lost.fetch_add(1, Ordering::Relaxed) == 0 {
                warn!(%error, "the audit's file cannot be written; the log has its lines");
            }
        }
    }

    /// Says in the file how many lines it lacks.
    fn write_lost(&self, file: &mut File) {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost == 0 {
            return;
        }
        let record = Record {
            time: self.time(),
            outcome: "Lost".to_owned(),
            reason: "lines that found no room in the queue or on the disk".to_owned(),
            more: Some(lost),
            ..Record::default()
        };
        if file.write(&record).is_ok() {
            self.lost.fetch_sub(lost, Ordering::Relaxed);
        }
    }
}

fn locked<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
