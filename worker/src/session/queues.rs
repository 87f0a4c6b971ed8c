//! What goes up, by urgency.

use std::pin::Pin;
use std::task::{Context, Poll};

use muster_proto::v1;
use tokio::sync::mpsc;

/// Queues as one stream, the more urgent first: no log holds up a point, no point a report, and nothing a
/// heartbeat.
pub(super) struct Prioritised(pub [mpsc::Receiver<v1::SessionRequest>; 4]);

impl tokio_stream::Stream for Prioritised {
    type Item = v1::SessionRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut ended = true;
        for queue in &mut self.0 {
            match queue.poll_recv(context) {
                Poll::Ready(Some(request)) => return Poll::Ready(Some(request)),
                Poll::Ready(None) => {}
                Poll::Pending => ended = false,
            }
        }
        if ended { Poll::Ready(None) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Up, request};
    use super::*;
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn a_heartbeat_passes_reports_they_pass_points_and_those_pass_logs() {
        let queues = [(); 4].map(|()| mpsc::channel(4));
        let (senders, receivers): (Vec<_>, Vec<_>) = queues.into_iter().unzip();
        let mut stream = Prioritised(receivers.try_into().unwrap());
        let beat = |seq| request(Up::Heartbeat(v1::Heartbeat { seq }));
        for (queue, sender) in senders.iter().enumerate().rev() {
            let queue = queue as u64 + 1;
            sender.try_send(beat(10 * queue)).unwrap();
            sender.try_send(beat(10 * queue + 1)).unwrap();
        }
        drop(senders);
        let mut seqs = Vec::new();
        while let Some(Some(Up::Heartbeat(beat))) = stream.next().await.map(|request| request.message) {
            seqs.push(beat.seq);
        }
        assert_eq!(seqs, [10, 11, 20, 21, 30, 31, 40, 41]);
    }
}
