//! TLS on the port of the API: handshakes beside each other, and certificates that may change while it serves.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tracing::{debug, info, warn};

use crate::Error;
use crate::edge::Held;
use crate::late::Late;

/// The authority of clients' certificates, the coordinator's certificate, and its key.
const FILES: [&str; 3] = ["ca.crt", "tls.crt", "tls.key"];
/// The authority's key, by which nodes get certificates: of [`crate::authority`].
const CA_KEY: &str = "ca.key";
/// How often it is looked whether they have changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Time for a handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Handshakes at once: half of the nodes that there may be. One more ends the oldest. It must not wait: a connection on
/// which nothing comes is a sign to nodes that the coordinator hangs, one that breaks says nothing.
const HANDSHAKES_MAX: usize = 8192;
/// What a client may say after its handshake was refused.
const REFUSED_BYTES_MAX: u64 = 64 << 10;
/// Connections that wait to be served.
const READY_MAX: usize = 64;
/// The first byte of whoever speaks TLS.
const TLS_HANDSHAKE: u8 = 22;
/// Calls at once on a connection that does not.
const PLAIN_STREAMS_MAX: u32 = 8;
/// What they are answered.
const SPEAKS_TLS: &str = "this port speaks TLS: call it by https://, with its ca.crt (muster: --ca or MUSTER_CA; grpcurl: -cacert)";

/// A connection whose handshake is done.
pub type Encrypted = TlsStream<Held<TcpStream>>;

/// The files in their directory, and what was last made of them.
pub(crate) struct Certificates {
    dir: PathBuf,
    /// As they were then.
    seen: [Option<Stamp>; 3],
    config: Arc<ServerConfig>,
}

/// What tells a file from the one that was there before.
type Stamp = (u64, u64, i64, i64);

impl Certificates {
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let (dir, seen) = (dir.to_owned(), stamps(dir));
        let config = read(&dir).map_err(|why| Error::Tls { dir: dir.clone(), why })?;
        Ok(Self { dir, seen, config })
    }

    /// Reads them again if they have changed. What cannot be used changes nothing: it may be half of a change.
    fn look(&mut self) {
        let seen = stamps(&self.dir);
        if seen == self.seen {
            return;
        }
        self.seen = seen;
        let dir = self.dir.display();
        match read(&self.dir) {
            Ok(config) => {
                self.config = config;
                info!(%dir, "the certificates have changed; new connections get the new ones");
            }
            Err(why) => warn!(%dir, why, "the new certificates cannot be used; the old ones stay"),
        }
    }
}

fn stamps(dir: &Path) -> [Option<Stamp>; 3] {
    let stamp = |file: Metadata| (file.ino(), file.len(), file.mtime(), file.mtime_nsec());
    FILES.map(|name| std::fs::metadata(dir.join(name)).ok().map(stamp))
}

/// The error says what is wrong with which file.
fn read(dir: &Path) -> Result<Arc<ServerConfig>, String> {
    let [ca, cert, key] = FILES;
    let warnings = [key, CA_KEY].map(|name| muster_monitor::secret_file_warning(&dir.join(name)));
    for warning in warnings.into_iter().flatten() {
        warn!("{warning}");
    }
    let certificates = |name: &str| {
        let found =
            CertificateDer::pem_file_iter(dir.join(name)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match found {
            Ok(found) if found.is_empty() => Err(format!("{name} holds no certificate")),
            found => found.map_err(|error| format!("{name}: {error}")),
        }
    };
    let mut authorities = RootCertStore::empty();
    let trusted = certificates(ca)?;
    for authority in &trusted {
        authorities.add(authority.clone()).map_err(|error| format!("{ca}: {error}"))?;
    }
    let mut chain = certificates(cert)?;
    // Nodes that have nothing but a join token know the authority by its hash, and must see it.
    chain.extend(trusted.into_iter().filter(|authority| !chain.contains(authority)).collect::<Vec<_>>());
    let secret = PrivateKeyDer::from_pem_file(dir.join(key)).map_err(|error| format!("{key}: {error}"))?;
    let provider = Arc::new(default_provider());
    // Who shows a certificate must have one of ours; who shows none is let in, and what he may do is decided by call.
    let clients = WebPkiClientVerifier::builder_with_provider(authorities.into(), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| format!("{ca}: {error}"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(Arc::new(Late(clients)))
        .with_single_cert(chain, secret)
        .map_err(|error| format!("{cert} and {key}: {error}"))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// The connections of a listener once their handshakes are done, in the order in which that is.
pub(crate) fn encrypted<I>(
    incoming: I,
    certificates: Certificates,
) -> impl Stream<Item = io::Result<Encrypted>>
where
    I: Stream<Item = io::Result<Held<TcpStream>>> + Send + 'static,
{
    let (ready, connections) = mpsc::channel(READY_MAX);
    // It ends, and its handshakes with it, when nobody takes its connections any more.
    tokio::spawn(accept(incoming, certificates, ready));
    ReceiverStream::new(connections)
}

async fn accept<I>(incoming: I, mut certificates: Certificates, ready: mpsc::Sender<io::Result<Encrypted>>)
where
    I: Stream<Item = io::Result<Held<TcpStream>>>,
{
    let (mut incoming, mut handshakes) = (pin!(incoming), JoinSet::new());
    // The last that were begun; most of them are over.
    let mut begun: VecDeque<AbortHandle> = VecDeque::new();
    let mut look = interval(LOOK_INTERVAL);
    loop {
        let next = tokio::select! {
            () = ready.closed() => return,
            _ = look.tick() => {
                certificates.look();
                continue;
            }
            Some(_) = handshakes.join_next() => continue,
            next = incoming.next() => next,
        };
        match next {
            None => return,
            // The server knows which of them are worth a word.
            Some(Err(error)) => drop(ready.send(Err(error)).await),
            Some(Ok(connection)) => {
                if begun.len() == HANDSHAKES_MAX
                    && let Some(oldest) = begun.pop_front()
                {
                    oldest.abort();
                }
                let handshake = serve_when_done(connection, certificates.config.clone(), ready.clone());
                begun.push_back(handshakes.spawn(handshake));
            }
        }
    }
}

async fn serve_when_done(
    connection: Held<TcpStream>,
    config: Arc<ServerConfig>,
    ready: mpsc::Sender<io::Result<Encrypted>>,
) {
    let peer = connection.get_ref().peer_addr().ok();
    match timeout(HANDSHAKE_MAX, handshake(connection, config)).await {
        Ok(Ok(encrypted)) => drop(ready.send(Ok(encrypted)).await),
        // Whoever reaches the port can cause it as often as he likes.
        Ok(Err(error)) => debug!(?peer, %error, "no TLS handshake"),
        Err(_) => debug!(?peer, "no TLS handshake in time"),
    }
}

async fn handshake(connection: Held<TcpStream>, config: Arc<ServerConfig>) -> io::Result<Encrypted> {
    let mut first = [0];
    if connection.get_ref().peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
        refuse_calls(connection).await;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak TLS"));
    }
    match TlsAcceptor::from(config).accept(connection).into_fallible().await {
        Ok(encrypted) => Ok(encrypted),
        Err((error, mut connection)) => {
            // What is refused was said, and is lost if the connection is torn down while the client still speaks.
            connection.shutdown().await.ok();
            tokio::io::copy(&mut connection.take(REFUSED_BYTES_MAX), &mut tokio::io::sink()).await.ok();
            Err(error)
        }
    }
}

/// Tells whoever calls without TLS what is wrong, in his own protocol: he would see a connection that breaks.
async fn refuse_calls(connection: Held<TcpStream>) {
    let refuse = service_fn(|_: http::Request<Incoming>| async {
        Ok::<_, Infallible>(Status::failed_precondition(SPEAKS_TLS).into_http::<tonic::body::Body>())
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(PLAIN_STREAMS_MAX)
        .serve_connection(TokioIo::new(connection), refuse);
    // It ends when he goes, or when the time for handshakes does.
    served.await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let refused = || read(dir.path()).err().unwrap();
        assert!(refused().starts_with("ca.crt: "), "{}", refused());
        std::fs::write(path("ca.crt"), "no certificate").unwrap();
        assert_eq!(refused(), "ca.crt holds no certificate");
        let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        std::fs::write(path("ca.crt"), junk).unwrap();
        assert!(refused().starts_with("ca.crt: "), "{}", refused());
        let before = stamps(dir.path());
        std::fs::write(path("tls.key"), "x").unwrap();
        assert_ne!(stamps(dir.path()), before);
    }
}
