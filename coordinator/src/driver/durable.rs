//! Groups of writes are made durable, and only then does anything leave.

use std::time::Duration;

use muster_store::{Batch, Error as StoreError, Store};
use tracing::{error, info, warn};

use super::handle::RequestError;
use super::{Commit, Deferred, Driver, Group};
use crate::Error;

/// Time between attempts to write a group that did not fit on the disk.
const STORE_RETRY: Duration = Duration::from_secs(1);

impl Driver {
    /// Starts to write the group that has filled, or carries it out if there is nothing to write.
    pub(super) fn flush(&mut self) {
        if self.writing.is_some() || self.store.is_none() {
            return;
        }
        if self.filling.batch.is_empty() {
            let deferred = std::mem::take(&mut self.filling.deferred);
            self.carry_out(deferred);
        } else if let Some(mut store) = self.store.take() {
            let Group { batch, deferred } = std::mem::take(&mut self.filling);
            let (fence, wait) = (self.fence, self.degraded.borrow().is_some());
            let seconds = self.monitor.commit_seconds.clone();
            let commit = tokio::task::spawn_blocking(move || {
                if wait {
                    std::thread::sleep(STORE_RETRY);
                }
                let timer = seconds.start_timer();
                let result = store.commit(fence, &batch);
                timer.observe_duration();
                (store, batch, result)
            });
            self.writing = Some((commit, deferred));
        }
    }

    pub(super) fn written(
        &mut self,
        done: (Box<dyn Store>, Batch, Result<(), StoreError>),
    ) -> Result<(), Error> {
        let (store, batch, result) = done;
        self.store = Some(store);
        result.as_ref().inspect_err(|error| self.monitor.store_failed(error)).ok();
        let deferred = self.writing.take().map(|(_, deferred)| deferred).unwrap_or_default();
        match result {
            Ok(()) => {
                if self.degraded.send_replace(None).is_some() {
                    info!("the store can be written again");
                }
                // Between the commit and this the time of leading may have ended: whoever leads now says what holds.
                if !(self.leads)() {
                    return Err(StoreError::Fenced.into());
                }
                self.carry_out(deferred);
                Ok(())
            }
            Err(StoreError::Retryable(why)) => {
                if self.degraded.borrow().is_none() {
                    error!(%why, "the store cannot be written; submissions are refused until it can");
                }
                self.degraded.send_replace(Some(why.clone()));
                self.wait_for_store(batch, deferred, &why);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a group that could not be written in front of what came after it. Its callers are not left
    /// waiting: they may repeat the call, which is harmless by its request id.
    fn wait_for_store(&mut self, mut batch: Batch, deferred: Vec<Deferred>, why: &str) {
        let later = std::mem::take(&mut self.filling);
        batch.append(later.batch);
        let all = deferred.into_iter().chain(later.deferred);
        let mut kept = Vec::new();
        for effect in all {
            match effect {
                Deferred::Reply(reply, _) => {
                    reply.send(Err(RequestError::StoreUnavailable(why.to_owned()))).ok();
                }
                effect => kept.push(effect),
            }
        }
        self.filling = Group { batch, deferred: kept };
    }

    /// Writes what is left. A store that still cannot be written keeps what was durable: nothing that was
    /// acknowledged is lost.
    pub(super) async fn drain(&mut self) -> Result<(), Error> {
        while self.writing.is_some() || !self.filling.batch.is_empty() || !self.filling.deferred.is_empty() {
            self.flush();
            if self.writing.is_some() {
                let done = finished(&mut self.writing).await?;
                self.written(done)?;
                if let Some(why) = &*self.degraded.borrow() {
                    warn!(%why, "stopped before the last decisions could be stored");
                    break;
                }
            }
        }
        Ok(())
    }
}

/// The result of the commit under way; pending for ever if there is none.
pub(super) async fn finished(
    writing: &mut Option<(Commit, Vec<Deferred>)>,
) -> Result<(Box<dyn Store>, Batch, Result<(), StoreError>), Error> {
    match writing {
        Some((commit, _)) => Ok(commit.await?),
        None => std::future::pending().await,
    }
}
