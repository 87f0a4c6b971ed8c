//! Certificates of nodes, signed with the authority's key where the coordinator has it.

use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use muster_core::access::Digest;
use muster_core::types::{Millis, NodeName};
use muster_proto::convert;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use sha2::{Digest as _, Sha256};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use tonic::{Code, Status};

use crate::access::NODE_PREFIX;

/// Clocks of nodes may be behind by so much: certificates are good from before they were issued.
pub(crate) const CLOCKS_APART_MAX: Millis = Millis::from_secs(3600);
/// Longest request that is looked at.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// The directory with ca.crt and, unless it is kept elsewhere, ca.key.
#[derive(Clone, Debug)]
pub(crate) struct Authority {
    dir: PathBuf,
    /// How long its certificates are good.
    pub life: Duration,
}

/// A key that is to be certified, and who does it.
pub(crate) struct Signing {
    request: CertificateSigningRequestParams,
    issuer: Issuer<'static, KeyPair>,
    authority: String,
}

/// What a node gets.
#[derive(Debug)]
pub(crate) struct Issued {
    pub certificate: String,
    pub authority: String,
}

fn unable(message: String) -> Status {
    convert::refusal(Code::FailedPrecondition, "NO_AUTHORITY", message)
}

/// A key that asks to be certified, and has signed for it.
pub(crate) fn checked_request(der: &[u8]) -> Result<CertificateSigningRequestParams, Status> {
    let invalid = |why| convert::invalid_argument(&[convert::field_error("signing_request", why)]);
    if der.len() > REQUEST_BYTES_MAX {
        return Err(invalid(format!("has {} bytes; at most {REQUEST_BYTES_MAX} fit", der.len())));
    }
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
        .map_err(|error| invalid(format!("is no certificate signing request: {error}")))
}

impl Authority {
    pub fn new(dir: &Path, life: Duration) -> Self {
        Self { dir: dir.to_owned(), life }
    }

    /// Checks everything that there is to check, before a token is spent.
    pub fn prepare(&self, request: &[u8]) -> Result<Signing, Status> {
        let request = checked_request(request)?;
        let read = |name: &str| {
            let path = self.dir.join(name);
            std::fs::read_to_string(&path).map_err(|error| {
                unable(format!(
                    "this coordinator gives no certificates to nodes, for it cannot read {}: {error}; put the key of the \
                     authority there for as long as nodes join, as `muster pki init` made it",
                    path.display()
                ))
            })
        };
        let (key, authority) = (read("ca.key")?, read("ca.crt")?);
        let key = KeyPair::from_pem(&key).map_err(|error| {
            unable(format!("the authority's key in {} is none: {error}", self.dir.display()))
        })?;
        let issuer = Issuer::from_ca_cert_pem(&authority, key)
            .map_err(|error| unable(format!("ca.crt in {} cannot be used: {error}", self.dir.display())))?;
        Ok(Signing { request, issuer, authority })
    }

    /// SHA-256 of the authority's certificate, by which a node knows that it is the right one.
    pub fn pin(&self) -> Result<Digest, Status> {
        let path = self.dir.join("ca.crt");
        let found = CertificateDer::from_pem_file(&path)
            .map_err(|error| unable(format!("failed to read {}: {error}", path.display())))?;
        Ok(Digest::from(<[u8; 32]>::from(Sha256::digest(&found))))
    }
}

impl Signing {
    /// Certifies the key as this node's. Nothing else of the request counts.
    pub fn sign(mut self, node: &NodeName, now: Millis, life: Duration) -> Result<Issued, Status> {
        let failed =
            |error: rcgen::Error| Status::internal(format!("failed to sign the certificate: {error}"));
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("{NODE_PREFIX}{node}"));
        let name = format!("{NODE_PREFIX}{node}").try_into().map_err(failed)?;
        params.subject_alt_names = vec![SanType::URI(name)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let now = UNIX_EPOCH + Duration::from_secs(now.0 / 1000);
        params.not_before = (now - Duration::from_millis(CLOCKS_APART_MAX.0)).into();
        params.not_after = (now + life).into();
        self.request.params = params;
        let certificate = self.request.signed_by(&self.issuer).map_err(failed)?.pem();
        Ok(Issued { certificate, authority: self.authority })
    }
}
