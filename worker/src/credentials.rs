//! The node's certificate, where connections are encrypted: got for a join token, kept in the data directory, and renewed by
//! itself before it ends. Its key never leaves this machine.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderMap, header};
use muster_core::access::Digest;
use muster_core::types::{Millis, NodeName};
use muster_monitor::secret_file_warning;
use muster_proto::convert::span_from_wire;
use muster_proto::v1::{self, worker_service_client::WorkerServiceClient};
use rand::RngExt;
use rcgen::{CertificateParams, KeyPair};
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tracing::{info, warn};

use crate::clock::unix_now;
use crate::pinned;
use crate::trust::{Token, Trust, is_encrypted, read_token};

/// The directory in the data directory, and the file in it: one, so that a certificate and its key are never of two times.
const DIR: &str = "tls";
const FILE: &str = "node.json";
/// Time to be answered.
const ANSWER_MAX: Duration = Duration::from_secs(15);
/// Attempts to renew in the life of a certificate.
const RENEWALS_PER_LIFE: u64 = 24;

/// A certificate with its key, all in PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    certificate: String,
    key: String,
    authority: String,
    /// When it came, by this machine's clock.
    from: Millis,
    life: Millis,
}

impl Held {
    fn is_over(&self, now: Millis) -> bool {
        now >= self.from.plus(self.life)
    }

    /// When it is to be renewed: somewhere between a half and two thirds of its life, so that nodes which joined together
    /// do not come together.
    fn renewal(&self) -> Millis {
        let (half, two_thirds) = (self.life.0 / 2, self.life.0 / 8 * 5);
        self.from.plus(Millis(rand::rng().random_range(half..=two_thirds)))
    }
}

/// A join token, as it is printed.
struct JoinToken {
    token: Token,
    /// Of the authority's certificate.
    pin: Digest,
}

/// What is known of the node's certificate. Shared by its clones.
#[derive(Clone)]
pub(crate) struct Credentials {
    node: NodeName,
    dir: PathBuf,
    join_token_file: Option<PathBuf>,
    trust: Trust,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    /// The text of the token that was tried last: it is not tried again.
    tried: Option<String>,
}

impl Credentials {
    /// What an earlier daemon kept, if anything. `trust` shows it from now on.
    pub fn load(node: &NodeName, data_dir: &Path, join_token_file: Option<PathBuf>, trust: &Trust) -> Self {
        let dir = data_dir.join(DIR);
        let held: Option<Held> =
            std::fs::read(dir.join(FILE)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        if join_token_file.is_some() || held.is_some() {
            trust.expect_certificate();
        }
        if let Some(warning) = join_token_file.as_deref().and_then(secret_file_warning) {
            warn!("{warning}");
        }
        if let Some(held) = &held {
            trust.show(&held.authority, &held.certificate, &held.key);
        }
        let state = Arc::new(Mutex::new(State { held, tried: None }));
        Self { node: node.clone(), dir, join_token_file, trust: trust.clone(), state }
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        // Each change of the state is whole before anything can panic.
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sees to it that there is a certificate to show at this URL, if there can be one. An error of a code other than
    /// UNAVAILABLE is final.
    pub async fn ready(&self, url: &str) -> Result<(), Status> {
        if !is_encrypted(url) {
            return Ok(());
        }
        let over = self.with(|state| state.held.as_ref().map(|held| held.is_over(unix_now())));
        match (over, &self.join_token_file) {
            (Some(false), _) | (None, None) => Ok(()),
            (Some(true), None) => Err(Status::unauthenticated(
                "the certificate of this node has expired; give it a new join token with --join-token-file, which `muster token \
                 create --role node` makes",
            )),
            (Some(true) | None, Some(file)) => self.enroll(url, file).await,
        }
    }

    /// The coordinator has refused the certificate that the node has. Whether there is a token by which it may get another.
    pub fn can_join_anew(&self) -> bool {
        let Some(file) = &self.join_token_file else { return false };
        let Ok(text) = read_token(file) else { return false };
        self.with(|state| {
            let anew = state.held.is_some() && state.tried.as_ref() != Some(&text);
            if anew {
                state.held = None;
            }
            anew
        })
    }

    async fn enroll(&self, url: &str, file: &Path) -> Result<(), Status> {
        let text = read_token(file).map_err(Status::unauthenticated)?;
        let JoinToken { token, pin } = parse(&text).ok_or_else(|| {
            Status::unauthenticated(format!(
                "{} holds no join token; it looks like muster-join.NAME.SECRET.AUTHORITY, as `muster token create --role node` \
                 printed it",
                file.display()
            ))
        })?;
        let channel = pinned::connect(url, pin.clone()).await?;
        let (key, request) = self.request()?;
        let mut call = Request::new(request);
        let shown = HeaderMap::from_iter([(header::AUTHORIZATION, token.header())]);
        *call.metadata_mut() = MetadataMap::from_headers(shown);
        let mut client = WorkerServiceClient::new(channel);
        let answer = tokio::time::timeout(ANSWER_MAX, client.issue_certificate(call));
        let answer = answer
            .await
            .map_err(|_| Status::unavailable("the coordinator does not answer the join token"))?;
        // Who does not lead, or cannot answer now, has not looked at it.
        if !matches!(&answer, Err(status) if status.code() == Code::Unavailable) {
            self.with(|state| state.tried = Some(text));
        }
        let answer = answer?.into_inner();
        let authority = CertificateDer::from_pem_slice(answer.authority.as_bytes());
        if !authority.is_ok_and(|authority| pinned::is_of(&pin, &authority)) {
            return Err(Status::permission_denied(
                "the coordinator's authority is not the one of the join token",
            ));
        }
        self.take(answer, key);
        info!(node = %self.node, "the node has got its certificate for the join token");
        Ok(())
    }

    /// A new key, and the request to certify it.
    fn request(&self) -> Result<(String, v1::IssueCertificateRequest), Status> {
        let failed = |error: rcgen::Error| Status::internal(format!("failed to make a key: {error}"));
        let key = KeyPair::generate().map_err(failed)?;
        let request = CertificateParams::default().serialize_request(&key).map_err(failed)?;
        let (node_name, signing_request) = (self.node.to_string(), request.der().to_vec().into());
        Ok((key.serialize_pem(), v1::IssueCertificateRequest { node_name, signing_request }))
    }

    /// Keeps what was issued, and shows it from now on.
    fn take(&self, answer: v1::IssueCertificateResponse, key: String) {
        let v1::IssueCertificateResponse { certificate, authority, lifetime } = answer;
        let life = span_from_wire("lifetime", lifetime.as_ref(), Millis(0)).unwrap_or_default();
        let held = Held { certificate, key, authority, from: unix_now(), life };
        // A disk that is full costs the next daemon a join token, and this one nothing.
        if let Err(error) = self.keep(&held) {
            warn!(%error, dir = %self.dir.display(), "the certificate could not be kept for the next daemon");
        }
        self.trust.show(&held.authority, &held.certificate, &held.key);
        self.with(|state| state.held = Some(held));
    }

    fn keep(&self, held: &Held) -> std::io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let (path, partial) = (self.dir.join(FILE), self.dir.join("node.new"));
        // What a daemon that was killed has left may have other permissions.
        std::fs::remove_file(&partial).ok();
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        file.write_all(&serde_json::to_vec(held)?)?;
        file.sync_all()?;
        std::fs::rename(partial, path)
    }

    /// Returns once the certificate was renewed over this connection, which is to be made anew then. Never, where there is
    /// none.
    pub async fn renewed(&self, client: &WorkerServiceClient<Channel>) {
        let Some(held) = self.with(|state| state.held.clone()) else { return std::future::pending().await };
        let pause = Duration::from_millis(held.life.0 / RENEWALS_PER_LIFE);
        let due = held.renewal();
        loop {
            // In pieces: a machine that slept must not sleep for as long again.
            let left = Duration::from_millis(due.since(unix_now()).0);
            tokio::time::sleep(left.min(pause)).await;
            if unix_now() < due {
                continue;
            }
            match self.renew(client).await {
                Ok(()) => return info!(node = %self.node, "the certificate was renewed"),
                Err(status) => {
                    warn!(
                        error = status.message(),
                        "the certificate could not be renewed; it is tried again"
                    );
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn renew(&self, client: &WorkerServiceClient<Channel>) -> Result<(), Status> {
        let (key, request) = self.request()?;
        let mut client = client.clone();
        let answer = tokio::time::timeout(ANSWER_MAX, client.issue_certificate(request)).await;
        let answer = answer.map_err(|_| Status::unavailable("the coordinator does not answer"))??;
        self.take(answer.into_inner(), key);
        Ok(())
    }
}

fn parse(text: &str) -> Option<JoinToken> {
    let (shown, pin) = text.rsplit_once('.')?;
    let whole = shown.starts_with("muster-join.") && shown.split('.').count() == 3;
    let (token, pin) = (Token::new(shown)?, Digest::new(pin).ok()?);
    whole.then_some(JoinToken { token, pin })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_tokens_are_whole_or_none() {
        let pin = "ab".repeat(32);
        let table = [
            (format!("muster-join.a.b.{pin}"), true),
            (format!("muster-join.a.b.{}", pin.to_uppercase()), false),
            (format!("muster-join.a.{pin}"), false),
            (format!("muster.a.b.{pin}"), false),
            (format!("muster-join.a.b.c.{pin}"), false),
            ("muster-join.a.b.abcd".to_owned(), false),
            (format!("muster-join.a.b\n.{pin}"), false),
            (String::new(), false),
        ];
        for (text, ok) in table {
            assert_eq!(parse(&text).is_some(), ok, "{text}");
        }
    }

    #[test]
    fn a_certificate_is_renewed_in_time_and_kept_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let node = NodeName::new("n1").unwrap();
        let load = || Credentials::load(&node, dir.path(), None, &Trust::default());
        let [certificate, key, authority] = ["c", "k", "a"].map(str::to_owned);
        let held = Held { certificate, key, authority, from: Millis(1000), life: Millis(900) };
        for _ in 0..100 {
            let at = held.renewal();
            assert!((1450..1600).contains(&at.0), "{at:?}");
        }
        assert!(!held.is_over(Millis(1899)) && held.is_over(Millis(1900)));
        load().keep(&held).unwrap();
        load().keep(&held).unwrap();
        let path = dir.path().join(DIR).join(FILE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(load().with(|state| state.held == Some(held)));
        std::fs::write(&path, "half of a fi").unwrap();
        assert!(load().with(|state| state.held.is_none()));
    }
}
