//! Tells apart who answers at the place where nodes meet: another node, torch's store, or another
//! server.
//!
//! gRPC alone would not tell: a store of torch's takes the connection, and breaks it off at the
//! first call.

use std::fmt;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Time for one question and its answer. Whoever serves answers at once, or is held up and asked
/// again.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Time for a node to answer before a store is asked for as well. Nodes take milliseconds.
const HEAD_START: Duration = Duration::from_millis(200);
/// Start of an HTTP/2 connection, with empty settings. The server's own settings come back.
const HTTP2_START: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
/// Bytes that every frame of HTTP/2 begins with, and which of them names its kind: that of
/// settings.
const FRAME_BYTES: usize = 9;
const FRAME_KIND: (usize, u8) = (3, 4);
/// First bytes of a refusal in TLS: an alert, and the version.
const TLS_ALERT: [u8; 2] = [0x15, 0x03];
/// The number that torch's clients send first.
const STORE_MAGIC: u32 = 0x3C85_F7CE;
/// Longest value that is taken from a store: an address.
const VALUE_BYTES_MAX: usize = 1024;
/// Prefix of the key under which torchrun's nodes keep their run in a c10d store.
const TORCHRUN_KEY: &str = "torch.rendezvous.";

/// Kind of server that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing takes the connection, and why.
    Nothing(io::ErrorKind, String),
    /// Speaks HTTP/2, as a coordinator does.
    Http2,
    /// A store of torch's, in which nodes of torchrun meet as the same run.
    Torchrun,
    /// A store of torch's.
    Store,
    /// Speaks TLS.
    Tls,
    /// Speaks another protocol, or says nothing.
    Other,
}

impl Answer {
    /// Returns that a connection failed so.
    pub fn nothing(error: &io::Error) -> Self {
        Self::Nothing(error.kind(), error.to_string())
    }

    /// Returns whether nothing listens there any more.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Nothing(io::ErrorKind::ConnectionRefused, _))
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing(_, why) => why,
            Self::Http2 => "a coordinator answers there",
            Self::Torchrun => {
                "torchrun answers there, with the same run id; start every node with the same launcher"
            }
            Self::Store => {
                "a store of torch's answers there, such as torchrun's or that of a job whose MASTER_PORT this is; \
                 start every node with `muster run`, at a port that nothing else uses"
            }
            Self::Tls => "what answers there speaks TLS; nodes of a run meet without it",
            Self::Other => "what answers there is no `muster run`; name a port that nothing else uses",
        })
    }
}

/// Asks what listens at an address. A node is asked first: it need not hear what stores are asked.
pub(super) async fn ask(host: &str, port: u16, run_id: &str) -> Answer {
    let http2 = first_frame(host, port);
    tokio::pin!(http2);
    let early = tokio::time::timeout(HEAD_START, &mut http2).await;
    let store = async {
        let mut store = Store::connect(host, port).await?;
        store.has(&format!("{TORCHRUN_KEY}{run_id}")).await
    };
    let is_torchrun = match early {
        Ok(Err(error)) => return Answer::nothing(&error),
        Ok(Ok(first)) => match of_first_frame(&first) {
            Answer::Other => tokio::time::timeout(ANSWER_MAX, store).await.ok().and_then(Result::ok),
            known => return known,
        },
        // It is slow, or waits for the rest of what its own protocol would have.
        Err(_) => {
            let either = async {
                tokio::pin!(store);
                tokio::select! {
                    first = &mut http2 => match first {
                        Ok(first) if of_first_frame(&first) != Answer::Other => Err(of_first_frame(&first)),
                        _ => Ok(store.await.ok()),
                    },
                    Ok(is_torchrun) = &mut store => Ok(Some(is_torchrun)),
                }
            };
            match tokio::time::timeout(ANSWER_MAX, either).await {
                Ok(Err(known)) => return known,
                Ok(Ok(is_torchrun)) => is_torchrun,
                Err(_) => None,
            }
        }
    };
    match is_torchrun {
        Some(true) => Answer::Torchrun,
        Some(false) => Answer::Store,
        None => Answer::Other,
    }
}

/// Tells by the first bytes of an answer who speaks, if not a store.
fn of_first_frame(first: &[u8]) -> Answer {
    if first.len() == FRAME_BYTES && first[FRAME_KIND.0] == FRAME_KIND.1 {
        Answer::Http2
    } else if first.starts_with(&TLS_ALERT) {
        Answer::Tls
    } else {
        Answer::Other
    }
}

/// Returns the first bytes of the answer to the start of HTTP/2: fewer than those of a frame if it
/// ends before.
async fn first_frame(host: &str, port: u16) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((host, port)).await?;
    let mut first = Vec::new();
    // Whoever breaks it off has been reached.
    if stream.write_all(HTTP2_START).await.is_ok() {
        stream.take(FRAME_BYTES as u64).read_to_end(&mut first).await.ok();
    }
    Ok(first)
}

/// A connection to a store of torch's.
#[derive(Debug)]
pub(super) struct Store(TcpStream);

impl Store {
    /// Connects, and hears that it is one.
    pub async fn connect(host: &str, port: u16) -> io::Result<Self> {
        let mut stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let own = std::process::id().to_le_bytes();
        let hello = [&[VALIDATE][..], &STORE_MAGIC.to_le_bytes(), &[PING], &own].concat();
        stream.write_all(&hello).await?;
        let mut said = [0; 4];
        stream.read_exact(&mut said).await?;
        if said == own { Ok(Self(stream)) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Address at which this machine reaches it.
    pub fn local_address(&self) -> io::Result<std::net::IpAddr> {
        self.0.local_addr().map(|address| address.ip())
    }

    /// Returns whether it holds a key.
    pub async fn has(&mut self, key: &str) -> io::Result<bool> {
        let request = [&[CHECK][..], &1_u64.to_le_bytes(), &text(&user_key(key))].concat();
        self.0.write_all(&request).await?;
        Ok(self.0.read_u8().await? == READY)
    }

    /// Sets a key if it has this value, or none and this is empty. Returns the value that it has
    /// then.
    pub async fn compare_set(&mut self, key: &str, expected: &str, value: &str) -> io::Result<String> {
        let fields = [user_key(key).as_str(), expected, value].map(text);
        self.0.write_all(&[&[COMPARE_SET][..], &fields.concat()].concat()).await?;
        let length = usize::try_from(self.0.read_u64_le().await?).unwrap_or(usize::MAX);
        if length > VALUE_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut value = vec![0; length];
        self.0.read_exact(&mut value).await?;
        String::from_utf8(value).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

/// Queries of the store's protocol, and the answer to a check.
const VALIDATE: u8 = 0;
const COMPARE_SET: u8 = 2;
const CHECK: u8 = 5;
const PING: u8 = 13;
const READY: u8 = 0;

/// Returns a key as a store's clients write those of their users.
fn user_key(key: &str) -> String {
    format!("/{key}")
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Asks what answers each connection with these bytes, and then ends it.
    async fn answered_with(bytes: &'static [u8]) -> Answer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(bytes).await.ok();
            }
        });
        let answer = ask("127.0.0.1", port, "none").await;
        serving.abort();
        answer
    }

    #[tokio::test]
    async fn answers_are_told_apart() {
        for (bytes, expected) in [
            (&b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"[..], Answer::Http2),
            (b"\x15\x03\x03\x00\x02\x02\x46", Answer::Tls),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", Answer::Other),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Answer::Other),
            (b"", Answer::Other),
        ] {
            assert_eq!(answered_with(bytes).await, expected, "{bytes:?}");
        }
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let nothing = ask("127.0.0.1", gone, "none").await;
        assert!(nothing.is_refused(), "{nothing:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_says_nothing_is_something_else() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(ask("127.0.0.1", port, "none").await, Answer::Other);
    }

    #[tokio::test]
    async fn a_store_is_known_and_gives_a_key_to_the_first() {
        let limits = muster_tcpstore::Limits::default();
        let server = muster_tcpstore::Server::bind("127.0.0.1:0".parse().unwrap(), limits).unwrap();
        let port = server.address().port();
        let _running = server.start().unwrap();
        assert_eq!(ask("127.0.0.1", port, "none").await, Answer::Store);
        let mut store = Store::connect("127.0.0.1", port).await.unwrap();
        assert_eq!(store.compare_set("k", "", "first").await.unwrap(), "first");
        assert_eq!(store.compare_set("k", "", "second").await.unwrap(), "first");
        assert_eq!(store.compare_set("k", "first", "second").await.unwrap(), "second");
        store.compare_set("torch.rendezvous.none", "", "x").await.unwrap();
        assert_eq!(ask("127.0.0.1", port, "none").await, Answer::Torchrun);
        assert_eq!(ask("127.0.0.1", port, "other").await, Answer::Store);
    }
}
