//! What goes up, by urgency.

use std::pin::Pin;
use std::task::{Context, Poll};

use muster_proto::v1;
use tokio::sync::mpsc;

/// Queues as one stream, the more urgent first: no log holds up a report, and nothing a heartbeat.
pub(super) struct Prioritised(pub [mpsc::Receiver<v1::SessionRequest>; 3]);

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
    async fn a_heartbeat_passes_reports_and_a_report_passes_logs() {
        let [urgent, bulk, logs] = [(); 3].map(|()| mpsc::channel(4));
        let mut stream = Prioritised([urgent.1, bulk.1, logs.1]);
        let beat = |seq| request(Up::Heartbeat(v1::Heartbeat { seq }));
        for seq in [30, 31] {
            logs.0.try_send(beat(seq)).unwrap();
        }
        bulk.0.try_send(beat(20)).unwrap();
        urgent.0.try_send(beat(10)).unwrap();
        drop((urgent.0, bulk.0, logs.0));
        let mut seqs = Vec::new();
        while let Some(Some(Up::Heartbeat(beat))) = stream.next().await.map(|request| request.message) {
            seqs.push(beat.seq);
        }
        assert_eq!(seqs, [10, 20, 30, 31]);
    }
}
