//! Why a coordinator does not run, in words for whoever starts it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use muster_monitor::{AddressError, DataDirError};

/// Why a coordinator could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Anybody on the way could read along and run programs on every node.
    #[error(
        "{0} is not a loopback address, and connections to it would not be encrypted and nobody would say who he is; make \
         certificates with `muster pki init --dir DIR --host NAME`, pass --tls-dir DIR and make tokens with `muster token \
         create --role submitter`, or listen on 127.0.0.1 and use an SSH tunnel, or pass --insecure if the network is yours \
         alone"
    )]
    NotLoopback(SocketAddr),
    /// Nodes could not renew in time, or be shut out for long enough.
    #[error("a node's certificate cannot be good for {0:?}: give something between 10 s and 30 days")]
    CertificateLife(Duration),
    /// Heartbeats would not keep the lease.
    #[error("a lease of {lease:?} needs heartbeats at most a third as long, not {heartbeat:?}")]
    Lease {
        /// The lease asked for.
        lease: Duration,
        /// The heartbeat asked for.
        heartbeat: Duration,
    },
    /// The lease of the leader is none that etcd grants as it is.
    #[error("a leader's lease of {0:?} is not possible: give whole seconds, at least 2")]
    LeaderLease(Duration),
    /// Clients would be sent nowhere.
    #[error(
        "{0} is every address of this machine, and none at which others can be told to call it; pass --advertise with \
         the URL at which workers and users reach this coordinator"
    )]
    Advertise(SocketAddr),
    /// Clients would be sent to where nobody answers them.
    #[error(
        "{0:?} is advertised to others, and connections are encrypted here; --advertise needs https:// with --tls-dir"
    )]
    AdvertisedPlain(String),
    /// The certificates cannot be used.
    #[error(
        "failed to use the certificates in {dir}: {why}; `muster pki init --dir {dir}` makes ca.crt, tls.crt and tls.key"
    )]
    Tls {
        /// The directory.
        dir: PathBuf,
        /// Why.
        why: String,
    },
    /// The data directory is not this user's alone.
    #[error(transparent)]
    NotOwn(#[from] DataDirError),
    /// The data directory cannot be made.
    #[error("failed to make the data directory {path}: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The address cannot be bound.
    #[error(
        "failed to listen on {address}: {source}; another coordinator may run there: choose another --listen"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The metrics cannot be served.
    #[error(transparent)]
    Http(#[from] AddressError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] muster_store::Error),
    /// The store holds something that this version cannot read.
    #[error("failed to read the store: {0}")]
    Decode(String),
    /// A store cannot be moved.
    #[error("{0}")]
    Transfer(String),
    /// The server broke.
    #[error("failed to serve gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The descriptors cannot be served.
    #[error("failed to build the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A thread or task could not be run.
    #[error("failed to run a task of the coordinator: {0}")]
    Task(#[from] tokio::task::JoinError),
}
