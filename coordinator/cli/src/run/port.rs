//! One port for the nodes of a run and for its ranks, as torchrun has it: whoever comes to the master's port and speaks
//! gRPC is a node and goes to the coordinator; whoever speaks the store's protocol is a rank and is passed on to the store.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

/// Connections that are sorted out or passed on at once: a few of each rank, of as many as anybody starts so.
const CONNECTIONS_MAX: usize = 16_384;
/// Connections of nodes that wait to be taken.
const NODES_WAITING_MAX: usize = 64;
/// Time to say the first word. Nodes and ranks say it at once.
const FIRST_WORD_MAX: Duration = Duration::from_secs(10);
/// Time until the store of the ranks is known, for one that comes before that.
const STORE_MAX: Duration = Duration::from_mins(1);
/// Pause after a connection could not be taken, such as for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);
/// What HTTP/2 begins with. No request of the store's does.
const HTTP: u8 = b'P';

/// Sorts the connections out. What is given are those of nodes; where ranks go, `store` says.
pub(super) fn shared(
    listener: TcpListener,
    store: watch::Receiver<Option<SocketAddr>>,
) -> ReceiverStream<io::Result<TcpStream>> {
    let (nodes, connections) = mpsc::channel(NODES_WAITING_MAX);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut open = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = open.join_next() => continue,
                () = nodes.closed() => return,
            };
            let (Ok((stream, _)), Ok(place)) = (accepted, places.clone().try_acquire_owned()) else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let (nodes, store) = (nodes.clone(), store.clone());
            open.spawn(async move {
                sort(stream, &nodes, store).await.ok();
                drop(place);
            });
        }
    });
    ReceiverStream::new(connections)
}

async fn sort(
    mut stream: TcpStream,
    nodes: &mpsc::Sender<io::Result<TcpStream>>,
    mut store: watch::Receiver<Option<SocketAddr>>,
) -> io::Result<()> {
    // Otherwise each message waits for the acknowledgement of the one before, which the other side delays.
    stream.set_nodelay(true)?;
    let mut first = [0];
    if tokio::time::timeout(FIRST_WORD_MAX, stream.peek(&mut first)).await?? == 0 {
        return Ok(());
    }
    if first[0] == HTTP {
        nodes.send(Ok(stream)).await.ok();
        return Ok(());
    }
    let mut passed = tokio::time::timeout(STORE_MAX, reach(&mut store)).await??;
    passed.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut stream, &mut passed).await.map(drop)
}

/// The store of a generation that ends may still be named here: then there is another one soon.
async fn reach(store: &mut watch::Receiver<Option<SocketAddr>>) -> io::Result<TcpStream> {
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        let address = *store.wait_for(Option::is_some).await.map_err(gone)?;
        if let Some(address) = address
            && let Ok(stream) = TcpStream::connect(address).await
        {
            return Ok(stream);
        }
        store.changed().await.map_err(gone)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn nodes_and_ranks_come_to_one_port() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (known, store) = watch::channel(None);
        let mut nodes = shared(listener, store);
        let mut node = TcpStream::connect(address).await.unwrap();
        node.write_all(b"PRI * HTTP/2.0").await.unwrap();
        let mut taken = nodes.next().await.unwrap().unwrap();
        let mut said = [0; 14];
        taken.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"PRI * HTTP/2.0", "nothing of it is lost");

        // A rank comes before its store is known, and one store has gone already.
        let mut rank = TcpStream::connect(address).await.unwrap();
        rank.write_all(&[0, 1, 2]).await.unwrap();
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        known.send(Some(gone)).unwrap();
        let of_ranks = TcpListener::bind("127.0.0.1:0").await.unwrap();
        tokio::task::yield_now().await;
        known.send(Some(of_ranks.local_addr().unwrap())).unwrap();
        let (mut passed, _) = of_ranks.accept().await.unwrap();
        let mut said = [0; 3];
        passed.read_exact(&mut said).await.unwrap();
        assert_eq!(said, [0, 1, 2]);
        passed.write_all(b"answer").await.unwrap();
        drop(passed);
        let mut answer = Vec::new();
        rank.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
    }
}
