//! The first connection of a node that has nothing but a join token: the token names the authority by the hash of its
//! certificate, and the coordinator must show a certificate that this very authority has signed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use muster_core::access::Digest;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::trust::{host, port, why};

/// Time to connect and to shake hands.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Begins what is said of a connection that fails.
const TLS_WORDS: &str = "failed to speak TLS with";

/// Whether this is the hash of the certificate.
pub(crate) fn is_of(pin: &Digest, certificate: &CertificateDer<'_>) -> bool {
    *pin == Digest::from(<[u8; 32]>::from(Sha256::digest(certificate)))
}

/// Connects to a coordinator whose certificate the pinned authority has signed, or to nobody.
pub(crate) async fn connect(url: &str, pin: Digest) -> Result<Channel, Status> {
    let failed = |why: String| Status::unavailable(format!("{TLS_WORDS} {url}: {why}"));
    let provider = Arc::new(ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin, provider }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsConnector::from(Arc::new(config));
    let uri: Uri = url.parse().map_err(|_| failed("it is no URL".to_owned()))?;
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    // The connection is encrypted below; tonic would want to do that by itself.
    let endpoint = Endpoint::from_shared(format!("http://{authority}"))
        .map_err(|error| failed(error.to_string()))?
        .connect_timeout(CONNECT_MAX);
    let connector = tower::service_fn(move |_: Uri| {
        let (tls, uri) = (tls.clone(), uri.clone());
        async move {
            let name = ServerName::try_from(host(&uri).to_owned()).map_err(std::io::Error::other)?;
            let stream = TcpStream::connect((host(&uri), port(&uri))).await?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(TokioIo::new(tls.connect(name, stream).await?))
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(|error| {
        let refused = crate::trust::causes(&error).any(|error| error.to_string().contains(WRONG));
        if refused {
            // No other attempt would find another authority there.
            return Status::permission_denied(format!(
                "{WRONG}: {url} is not the coordinator for which it was made, or its authority was made anew; make a new token \
                 with `muster token create --role node`"
            ));
        }
        failed(why(&error))
    })
}

/// What is said of an authority that is another one.
const WRONG: &str = "the join token names another authority";

struct Pinned {
    pin: Digest,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinned")
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The coordinator sends its authority along. Who sends ours without its key cannot have what it has signed.
        let authority = intermediates.iter().find(|certificate| is_of(&self.pin, certificate));
        let authority = authority.ok_or_else(|| Error::General(WRONG.to_owned()))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), self.provider.clone())
            .build()
            .map_err(|_| Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        verifier.verify_server_cert(end_entity, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
