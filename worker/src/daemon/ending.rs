//! What the daemon still does once nothing runs any more.

use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use tokio::sync::mpsc;

use super::Daemon;
use crate::session::{Event, request};

impl Daemon {
    /// Waits until the coordinator has the last reports and points. Whether it has.
    pub(super) async fn flush(&mut self, session: &mut mpsc::Receiver<Event>) -> bool {
        while self.link.is_some() && !(self.unsent.is_empty() && self.outbox.is_empty()) {
            self.turn(session).await;
        }
        self.link.is_some()
    }

    pub(super) async fn say_goodbye(&mut self, session: &mut mpsc::Receiver<Event>) {
        let Some(link) = self.link.take() else { return };
        let goodbye = v1::Goodbye { reason: "the daemon was stopped".to_owned() };
        link.queues.bulk.send(request(Up::Goodbye(goodbye))).await.ok();
        // The coordinator ends the stream once it has heard it.
        while !matches!(session.recv().await, Some(Event::Closed) | None) {}
    }
}
