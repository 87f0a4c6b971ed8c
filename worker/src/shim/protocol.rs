//! What a daemon and a shim say to one another: JSON lines over the shim's Unix socket.
//!
//! Level-triggered: each side says the whole of what it wants or sees, so that a daemon that was started anew knows
//! everything after the first line. A field or a line that one side does not know is passed over, so that a daemon
//! can be upgraded while shims of its former version run on.

use std::io;

use muster_core::types::{Assignment, Rank, RankExit, RankProgress, RendezvousReport, StopMode};
use muster_worker_core::Fence;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tracing::warn;

/// Version of the record and of what is said. A daemon adopts no shim of another.
pub(crate) const PROTOCOL: u32 = 1;
/// Longest line: the exits of a thousand ranks, each with 2 KiB of standard error in which every byte is escaped.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// What a daemon wants of a shim.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Command {
    /// Launch the ranks.
    Launch { assignment: Box<Assignment>, fence: Option<Fence> },
    /// Stop them: the job's signal, this grace, then SIGKILL.
    Stop(StopMode),
    /// Ranks may run until then, on CLOCK_BOOTTIME.
    Fence(Fence),
    /// The end is stored, and the shim may go.
    Release,
}

/// What a shim tells its daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum News {
    /// Everything, at first and after each change.
    State(State),
    /// These ranks reported points.
    Points { ranks: Vec<Rank> },
}

/// Where a gang's part is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    #[default]
    Preparing,
    Prepared,
    Running,
    /// Nothing of the gang is left.
    Stopped,
}

/// The whole observed state of a shim. Its last is kept in a file until a daemon has taken it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct State {
    pub pid: i32,
    pub phase: Phase,
    pub master_port: Option<u16>,
    /// In the order in which the ranks ended.
    pub exits: Vec<RankExit>,
    /// Ranks that were killed and of which the kernel still holds something.
    pub killed: Vec<Rank>,
    pub error: Option<String>,
    /// How far each rank is, while none shows progress.
    pub quiet: Vec<RankProgress>,
    /// Process ids of the ranks in their order, once they were launched.
    pub processes: Vec<u32>,
    /// What the ranks' store shows while some of them do not get on there.
    pub rendezvous: Option<Box<RendezvousReport>>,
    /// When the ranks are stopped unless the daemon says otherwise.
    pub fence: Option<Fence>,
    /// That time has come.
    pub fenced: bool,
    /// Points that ended ranks have left are still being read.
    pub draining: bool,
}

/// Lines as they come in.
#[derive(Debug)]
pub(crate) struct Lines {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    pub fn new(stream: OwnedReadHalf) -> Self {
        Self { reader: BufReader::new(stream), line: Vec::new() }
    }

    /// The next message; none once the other side is gone.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Option<T> {
        loop {
            self.line.clear();
            let read = (&mut self.reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut self.line).await;
            if !matches!(read, Ok(1..)) || !self.line.ends_with(b"\n") {
                return None;
            }
            match serde_json::from_slice(&self.line) {
                Ok(message) => return Some(message),
                Err(error) => warn!(%error, "a message is not understood and is passed over"),
            }
        }
    }
}

/// Sends one message.
pub(crate) async fn send(stream: &mut OwnedWriteHalf, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::Millis;

    #[tokio::test]
    async fn what_another_version_says_is_understood_as_far_as_it_is_known() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let (mut writer, mut lines) = (theirs.into_split().1, Lines::new(ours.into_split().0));
        let text = "{\"later\":{\"x\":1}}\nno json\n\n{\"fence\":{\"term\":1,\"kill\":2,\"lease\":9,\"x\":[]}}\n{\"stop\":";
        writer.write_all(text.as_bytes()).await.unwrap();
        drop(writer);
        let said: Option<Command> = lines.next().await;
        assert!(matches!(said, Some(Command::Fence(Fence { kill: Millis(2), .. }))), "{said:?}");
        assert!(lines.next::<Command>().await.is_none(), "half a line is none");
        let state: State = serde_json::from_str("{\"phase\":\"running\",\"pid\":7}").unwrap();
        assert_eq!((state.phase, state.pid, state.fenced), (Phase::Running, 7, false));
    }
}
