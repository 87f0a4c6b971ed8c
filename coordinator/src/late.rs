//! Lets connections in whose certificate is ours but too old, so that their calls can be refused in words: a handshake that
//! fails tells most clients nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
};

/// Verifies as the one within does, but for the end of the client's own certificate: each call is judged by that again, in
/// `access.rs`, since connections last.
#[derive(Debug)]
pub(crate) struct Late(pub Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Late {
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let refused = match self.0.verify_client_cert(certificate, intermediates, now) {
            Err(Error::InvalidCertificate(
                why @ (CertificateError::Expired | CertificateError::ExpiredContext { .. }),
            )) => Error::InvalidCertificate(why),
            verified => return verified,
        };
        // Time may be looked at before signatures are: whose it is must be found out all the same.
        let Ok((_, read)) = x509_parser::parse_x509_certificate(certificate) else { return Err(refused) };
        let Ok(last) = u64::try_from(read.validity().not_after.timestamp()) else { return Err(refused) };
        if last > now.as_secs() {
            return Err(refused);
        }
        let last = UnixTime::since_unix_epoch(Duration::from_secs(last));
        self.0.verify_client_cert(certificate, intermediates, last)
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }

    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    use tokio_rustls::rustls::RootCertStore;
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use tokio_rustls::rustls::server::WebPkiClientVerifier;

    use super::*;

    const YEAR: Duration = Duration::from_hours(24 * 365);

    fn authority() -> (CertificateDer<'static>, Issuer<'static, KeyPair>) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap().der().clone(), Issuer::new(params, key))
    }

    #[test]
    fn an_old_certificate_is_let_in_only_if_it_was_ours() {
        let now = UnixTime::since_unix_epoch(YEAR * 56);
        let ((root, ours), (_, others)) = (authority(), authority());
        let mut roots = RootCertStore::empty();
        roots.add(root).unwrap();
        let provider = Arc::new(default_provider());
        let within = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
        let late = Late(within.clone());
        let signed = |issuer: &Issuer<'_, KeyPair>, usage, years: u32| {
            let mut params = CertificateParams::default();
            params.extended_key_usages = vec![usage];
            params.not_before = (std::time::UNIX_EPOCH + YEAR).into();
            params.not_after = (std::time::UNIX_EPOCH + YEAR * years).into();
            params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().der().clone()
        };
        let (client, server) = (ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth);
        let table = [
            ("ours", &ours, client.clone(), 60, true, true),
            ("ours, too old", &ours, client.clone(), 55, false, true),
            ("another's", &others, client.clone(), 60, false, false),
            ("another's, too old", &others, client, 55, false, false),
            ("a server's, too old", &ours, server, 55, false, false),
        ];
        for (what, issuer, usage, years, before, expected) in table {
            let certificate = signed(issuer, usage, years);
            assert_eq!(within.verify_client_cert(&certificate, &[], now).is_ok(), before, "{what}");
            assert_eq!(late.verify_client_cert(&certificate, &[], now).is_ok(), expected, "{what}");
        }
    }
}
