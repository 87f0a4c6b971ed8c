//! A shim's socket: one daemon at a time is spoken to, the newest.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::protocol::{Command, Lines, News, State, send};
use crate::telemetry::Changes;

/// Points are announced at most this often.
const POINTS_INTERVAL: Duration = Duration::from_millis(50);

/// What happens on the socket. The number is that of the connection.
#[derive(Debug)]
pub(super) enum Event {
    Connected(u64),
    Said(Command),
    Closed(u64),
}

/// What every daemon is told.
#[derive(Clone, Debug)]
pub(super) struct Shown {
    pub state: watch::Receiver<State>,
    pub changes: Changes,
}

/// Accepts daemons, until it is dropped.
pub(super) async fn listen(listener: UnixListener, shown: Shown, events: mpsc::Sender<Event>) {
    let shown = Arc::new(shown);
    let mut serving: Option<AbortOnDropHandle<()>> = None;
    for number in 1.. {
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                Err(error) => {
                    warn!(%error, "a daemon could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        // The one before is dead: only one holds the data directory.
        drop(serving.take());
        if events.send(Event::Connected(number)).await.is_err() {
            return;
        }
        let served = serve(stream, number, (*shown).clone(), events.clone());
        serving = Some(AbortOnDropHandle::new(tokio::spawn(served)));
    }
}

async fn serve(stream: UnixStream, number: u64, shown: Shown, events: mpsc::Sender<Event>) {
    let (reader, writer) = stream.into_split();
    let hear = async {
        let mut lines = Lines::new(reader);
        while let Some(command) = lines.next().await {
            events.send(Event::Said(command)).await.ok();
        }
    };
    tokio::select! {
        () = hear => {}
        // A daemon that hears nothing more may still have said something: that is read to its end.
        () = async { tell(writer, shown).await.ok(); std::future::pending().await } => {}
    }
    events.send(Event::Closed(number)).await.ok();
}

/// Tells everything, and each change of it. States that follow one another faster than they are taken are passed
/// over but for the last.
async fn tell(mut writer: tokio::net::unix::OwnedWriteHalf, mut shown: Shown) -> std::io::Result<()> {
    shown.state.mark_changed();
    let mut points_at = tokio::time::Instant::now();
    loop {
        tokio::select! {
            biased;
            changed = shown.state.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let state = shown.state.borrow_and_update().clone();
                send(&mut writer, &News::State(state)).await?;
            }
            () = async { tokio::time::sleep_until(points_at).await; shown.changes.added().await } => {
                let ranks = shown.changes.take();
                if !ranks.is_empty() {
                    send(&mut writer, &News::Points { ranks }).await?;
                    points_at = tokio::time::Instant::now() + POINTS_INTERVAL;
                }
            }
        }
    }
}
