//! The client of Muster's telemetry socket. Training never waits for it: what cannot be sent is counted.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lines that may wait for the worker: some ten seconds of a loop that reports every few milliseconds.
const QUEUE_LINES_MAX: usize = 4096;
/// A worker that takes no bytes for this long is being restarted; the connection is made anew.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two attempts to connect.
const RECONNECT_DELAY: Duration = Duration::from_millis(200);
/// Attempts per line before it is dropped: the second covers a worker that was restarted in between.
const ATTEMPTS_MAX: u32 = 10;
/// How long a program's end may wait for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// Sends metrics to the worker as JSON lines: `{"step":1,"time":1760000000.5,"values":{"loss":2.3}}`.
///
/// `time` is in seconds since 1970. JSON has no numbers for NaN and the infinities: they are sent as the strings `"NaN"`,
/// `"Infinity"` and `"-Infinity"`.
#[derive(Debug)]
pub struct Telemetry {
    sender: Option<Sender>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Sender {
    lines: Option<SyncSender<String>>,
    /// Hangs up when the thread ends, which is how a drop waits for it with a limit.
    done: Receiver<()>,
}

impl Telemetry {
    /// A client of the Unix socket that MUSTER_TELEMETRY names; without the variable it does nothing.
    pub fn from_env() -> Self {
        match std::env::var_os("MUSTER_TELEMETRY").filter(|path| !path.is_empty()) {
            Some(path) => Self::to(Path::new(&path)),
            None => Self { sender: None, dropped: Arc::default() },
        }
    }

    /// A client of the Unix stream socket at `path`, which need not exist yet.
    pub fn to(path: &Path) -> Self {
        let dropped = Arc::new(AtomicU64::new(0));
        let (lines, queue) = sync_channel(QUEUE_LINES_MAX);
        let (hangs_up, done) = sync_channel(1);
        let writer = Writer { path: path.to_owned(), stream: None, dropped: Arc::clone(&dropped) };
        let started = thread::Builder::new().name("telemetry".to_owned()).spawn(move || {
            writer.run(&queue);
            drop(hangs_up);
        });
        match started {
            Ok(_) => Self { sender: Some(Sender { lines: Some(lines), done }), dropped },
            // No thread to be had: training matters more than its metrics.
            Err(_) => Self { sender: None, dropped },
        }
    }

    /// Whether anybody listens, in other words whether metrics are worth computing.
    pub fn is_enabled(&self) -> bool {
        self.sender.is_some()
    }

    /// Reports the values of a step. Never blocks: with a full queue the line is dropped and counted.
    pub fn record(&self, step: u64, values: &[(&str, f64)]) {
        let Some(lines) = self.sender.as_ref().and_then(|sender| sender.lines.as_ref()) else { return };
        if lines.try_send(line(step, unix_seconds(), values)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that were dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Telemetry {
    /// Sends what is queued, for at most three seconds.
    fn drop(&mut self) {
        if let Some(sender) = &mut self.sender {
            sender.lines = None;
            let _hung_up_or_late = sender.done.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

fn line(step: u64, time: f64, values: &[(&str, f64)]) -> String {
    let values: BTreeMap<&str, serde_json::Value> =
        values.iter().map(|(name, value)| (*name, number(*value))).collect();
    let mut line = serde_json::json!({ "step": step, "time": time, "values": values }).to_string();
    line.push('\n');
    line
}

fn number(value: f64) -> serde_json::Value {
    if value.is_nan() {
        "NaN".into()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity" } else { "-Infinity" }.into()
    } else {
        value.into()
    }
}

#[expect(clippy::disallowed_methods, reason = "a rank is its own driver: its points carry its clock")]
fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

struct Writer {
    path: PathBuf,
    stream: Option<UnixStream>,
    dropped: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<String>) {
        for line in queue {
            if !self.send(&line) {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn send(&mut self, line: &str) -> bool {
        for attempt in 0..ATTEMPTS_MAX {
            if attempt > 0 {
                thread::sleep(RECONNECT_DELAY);
            }
            let Some(stream) = self.connected() else { continue };
            if stream.write_all(line.as_bytes()).is_ok() {
                return true;
            }
            // Part of the line may be out: only a new connection starts with a whole one.
            self.stream = None;
        }
        false
    }

    fn connected(&mut self) -> Option<&mut UnixStream> {
        if self.stream.is_none() {
            let stream = UnixStream::connect(&self.path).ok()?;
            stream.set_write_timeout(Some(WRITE_TIMEOUT)).ok()?;
            self.stream = Some(stream);
        }
        self.stream.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_line_is_the_documented_json() {
        let json = line(3, 1.5, &[("loss", 2.25), ("accuracy", 0.5)]);
        assert_eq!(json, "{\"step\":3,\"time\":1.5,\"values\":{\"accuracy\":0.5,\"loss\":2.25}}\n");
        let table = [(f64::NAN, "NaN"), (f64::INFINITY, "Infinity"), (f64::NEG_INFINITY, "-Infinity")];
        for (value, text) in table {
            assert!(line(0, 0.0, &[("loss", value)]).contains(&format!("\"loss\":\"{text}\"")));
        }
    }

    #[test]
    fn lines_arrive_in_order_and_drop_flushes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("telemetry.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let telemetry = Telemetry::to(&path);
        for step in 0..500 {
            telemetry.record(step, &[("loss", 1.0)]);
        }
        let reader = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(stream).lines().map(Result::unwrap).collect::<Vec<String>>()
        });
        drop(telemetry);
        let lines = reader.join().unwrap();
        assert_eq!(lines.len(), 500);
        assert!(lines.iter().enumerate().all(|(i, line)| line.starts_with(&format!("{{\"step\":{i},"))));
    }

    #[test]
    fn a_socket_that_nobody_reads_never_blocks_and_drops_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("telemetry.sock");
        let _never_accepted = UnixListener::bind(&path).unwrap();
        let telemetry = Telemetry::to(&path);
        for step in 0..100_000 {
            telemetry.record(step, &[("loss", 1.0)]);
        }
        assert!(telemetry.dropped() > 0);
        assert!(telemetry.is_enabled());
    }
}
