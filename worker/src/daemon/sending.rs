//! What goes up: reports at once, and points beside them. The news that a rank has ended waits for the rank's last points for
//! a moment only, so that the curve of an ordinary job is whole when the coordinator ends the job.

use std::time::Duration;

use muster_core::types::GangId;
use muster_proto::convert;
use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use muster_worker_core::Core;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Daemon;
use crate::monitor::Monitor;
use crate::session::request;
use crate::telemetry::Outbox;

/// Bytes of standard error that all exits of one Hello may carry together; a message holds 4 MiB.
const HELLO_TAILS_BYTES_MAX: usize = 1 << 20;
/// Points are sent in batches: the first of them waits so long for others.
const POINTS_INTERVAL: Duration = Duration::from_millis(50);

/// What can be sent now.
enum Next {
    Leaving,
    Report(GangId),
    Health,
}

/// Sends points until the session ends. A task of its own: it waits for files and for the coordinator, and the daemon for
/// neither.
pub(super) async fn send_points(outbox: Outbox, queue: mpsc::Sender<v1::SessionRequest>, monitor: Monitor) {
    loop {
        outbox.ready().await;
        outbox.collect(POINTS_INTERVAL).await;
        while outbox.can_send() {
            // First the room, so that whatever is taken out is sent.
            let Ok(room) = queue.reserve().await else { return };
            if let Some(batch) = outbox.next_batch().await {
                monitor.points_sent(batch.points.len());
                room.send(request(Up::Points(batch)));
            }
        }
    }
}

impl Daemon {
    /// When something is to be sent, if anything is.
    pub(super) fn send_at(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if self.next(now).is_some() {
            return Some(now);
        }
        self.unsent.iter().filter_map(|gang| self.outbox.awaited_until(gang)).min()
    }

    fn next(&mut self, now: Instant) -> Option<Next> {
        if self.leaving.is_some() {
            return Some(Next::Leaving);
        }
        self.unsent.retain(|gang| self.core.report(gang).is_some());
        let is_due = |gang: &&GangId| self.outbox.awaited_until(gang).is_none_or(|until| until <= now);
        if let Some(gang) = self.unsent.iter().find(is_due) {
            return Some(Next::Report(gang.clone()));
        }
        self.watched.is_due().then_some(Next::Health)
    }

    /// What is to be sent, if it still is.
    pub(super) fn next_message(&mut self) -> Option<Up> {
        match self.next(Instant::now())? {
            Next::Leaving => self.leaving.take().map(|reason| Up::Leaving(v1::Leaving { reason })),
            Next::Report(gang) => {
                self.unsent.remove(&gang);
                let report = self.core.report(&gang)?;
                Some(Up::Gang(convert::gang_report_to_wire(&report)))
            }
            Next::Health => self.watched.message().map(Up::Health),
        }
    }
}

/// Every report, for a Hello. The first exit of a gang is the likeliest cause of its end; the others give up
/// their output first if all of it would not fit a message.
pub(super) fn observed(core: &Core) -> Vec<v1::GangReport> {
    let mut gangs: Vec<_> = core.reports().iter().map(convert::gang_report_to_wire).collect();
    let mut room = HELLO_TAILS_BYTES_MAX;
    let mut fit = |exit: &mut v1::RankExit| match room.checked_sub(exit.stderr_tail.len()) {
        Some(left) => room = left,
        None => exit.stderr_tail.clear(),
    };
    gangs.iter_mut().filter_map(|gang| gang.exits.first_mut()).for_each(&mut fit);
    gangs.iter_mut().flat_map(|gang| gang.exits.iter_mut().skip(1)).for_each(&mut fit);
    gangs
}

/// Room in the queue, from a time on; never without a time or a queue.
pub(super) async fn room_from(
    at: Option<Instant>,
    queue: Option<mpsc::Sender<v1::SessionRequest>>,
) -> mpsc::OwnedPermit<v1::SessionRequest> {
    if let (Some(at), Some(queue)) = (at, queue) {
        // Also for a time that has come a timer would take a millisecond or two.
        if at > Instant::now() {
            tokio::time::sleep_until(at).await;
        }
        if let Ok(room) = queue.reserve_owned().await {
            return room;
        }
        // The session has broken; news of that is on its way.
    }
    std::future::pending().await
}
