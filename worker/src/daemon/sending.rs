//! What goes up, and in which order: reports before points, but the last points of a rank ahead of the report that
//! it has ended, so that the coordinator has the whole curve when it ends the job.

use muster_core::types::{GangId, Rank};
use muster_proto::convert;
use muster_proto::v1;
use muster_proto::v1::session_request::Message as Up;
use muster_worker_core::Core;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Daemon, POINTS_INTERVAL};

/// Bytes of standard error that all exits of one Hello may carry together; a message holds 4 MiB.
const HELLO_TAILS_BYTES_MAX: usize = 1 << 20;

/// What can be sent now.
enum Next {
    Leaving,
    Report(GangId),
    Health,
    PointsOf(GangId, Rank),
    Points,
}

impl Daemon {
    /// When something is to be sent, if anything is. Points wait for others; what goes before them goes at once.
    pub(super) fn send_at(&mut self) -> Option<Instant> {
        match self.next() {
            None => {
                self.points_at = None;
                None
            }
            Some(Next::Points) => {
                Some(*self.points_at.get_or_insert_with(|| Instant::now() + POINTS_INTERVAL))
            }
            Some(_) => Some(Instant::now()),
        }
    }

    fn next(&mut self) -> Option<Next> {
        if self.leaving.is_some() {
            return Some(Next::Leaving);
        }
        self.unsent.retain(|gang| self.core.report(gang).is_some());
        for gang in &self.unsent {
            let exits = self.core.report(gang).map(|report| report.exits).unwrap_or_default();
            let mut owed = exits.iter().filter(|exit| self.outbox.has_unsent_of(gang, exit.rank)).peekable();
            if owed.peek().is_none() {
                return Some(Next::Report(gang.clone()));
            }
            // Those that fill their window wait until the coordinator has taken some.
            if let Some(exit) = owed.find(|exit| self.outbox.can_send_of(gang, exit.rank)) {
                return Some(Next::PointsOf(gang.clone(), exit.rank));
            }
        }
        if self.watched.is_due() {
            return Some(Next::Health);
        }
        self.outbox.can_send().then_some(Next::Points)
    }

    fn points(&self, batch: Option<v1::PointBatch>) -> Option<Up> {
        let batch = batch?;
        self.monitor.points_sent(batch.points.len());
        Some(Up::Points(batch))
    }

    /// What is to be sent. None if it turned out that no points were there.
    pub(super) fn next_message(&mut self) -> Option<Up> {
        match self.next()? {
            Next::Leaving => self.leaving.take().map(|reason| Up::Leaving(v1::Leaving { reason })),
            Next::Report(gang) => {
                self.unsent.remove(&gang);
                let report = self.core.report(&gang)?;
                Some(Up::Gang(convert::gang_report_to_wire(&report)))
            }
            Next::Health => self.watched.message().map(Up::Health),
            Next::PointsOf(gang, rank) => self.points(self.outbox.next_batch_of(&gang, rank)),
            Next::Points => self.points(self.outbox.next_batch()),
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
