//! What the daemon does until nothing runs any more, and what it still does then.

use std::time::Duration;

use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use tokio::sync::mpsc;

use super::Daemon;
use crate::session::{Event, request};

impl Daemon {
    /// Why the node leaves, if its daemon is being stopped.
    pub(super) fn leaving_since_shutdown(&self) -> Option<String> {
        self.core.is_stopping().then(|| "its daemon is being stopped".to_owned())
    }

    /// Goes on until nothing runs. False if something still does after `limit`.
    pub(super) async fn is_idle_within(
        &mut self,
        limit: Duration,
        session: &mut mpsc::Receiver<Event>,
    ) -> bool {
        let turns = async {
            while !self.core.is_idle() {
                self.turn(session).await;
            }
        };
        tokio::time::timeout(limit, turns).await.is_ok()
    }

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
        link.queues.control.send(request(Up::Goodbye(goodbye))).await.ok();
        // The coordinator ends the stream once it has heard it.
        while !matches!(session.recv().await, Some(Event::Closed) | None) {}
    }
}
