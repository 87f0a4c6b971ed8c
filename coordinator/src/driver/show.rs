//! What a coordinator knew when its time of leading ended, for as long as nobody knows better.

use std::sync::atomic::Ordering;

use tokio_util::sync::CancellationToken;

use super::handle::{Command, RequestError};
use super::{Driver, Group};

impl Driver {
    /// Goes on to show what was known when the time of leading ended, until it is told to stop.
    pub async fn show(mut self, stop: CancellationToken) {
        self.degraded.send_replace(Some("this coordinator no longer leads".to_owned()));
        self.showing.store(true, Ordering::Release);
        // What is not stored has not happened; whoever waits for it is told to ask again.
        (self.filling, self.writing) = (Group::default(), None);
        while let Some(command) = tokio::select! {
            command = self.inbox.recv() => command,
            () = stop.cancelled() => None,
        } {
            match command.1 {
                Command::Request { reply, .. } => {
                    let why = "this coordinator no longer leads, and no other one does; try again".to_owned();
                    reply.send(Err(RequestError::StoreUnavailable(why))).ok();
                }
                Command::Join { .. } | Command::FromNode(_) | Command::OpenSession { .. } => {}
                #[cfg(test)]
                Command::Busy(_) => {}
            }
        }
    }
}
