//! By which URLs coordinators are called, whom a client takes for one where connections are encrypted, and what it says when
//! that fails.

use std::error::Error;
use std::io;
use std::path::Path;

use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{CertificateError, Error as TlsError};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Uri};

/// The authority whose certificates are taken; none at all by default.
#[derive(Clone, Debug, Default)]
pub struct Trust(Option<ClientTlsConfig>);

impl Trust {
    /// Trusts the authorities of this file. The error is in words.
    pub fn from_file(ca: &Path) -> Result<Self, String> {
        let failed =
            |why: String| format!("failed to use the authority's certificate {}: {why}", ca.display());
        let pem = std::fs::read(ca).map_err(|error| failed(error.to_string()))?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        match found {
            Ok(found) if found.is_empty() => Err(failed("it holds no certificate in PEM".to_owned())),
            Ok(_) => Ok(Self(Some(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))))),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// The endpoint of a URL. The error says what is wrong with it.
    pub fn endpoint(&self, url: &str) -> Result<Endpoint, String> {
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| error.to_string())?;
        if url.starts_with("unix:") {
            return Ok(endpoint);
        }
        let tls = match (endpoint.uri().scheme_str(), &self.0) {
            (Some("http"), _) if endpoint.uri().host().is_some() => return Ok(endpoint),
            (Some("https"), Some(tls)) => tls.clone(),
            (Some("https"), None) => {
                return Err(
                    "https:// needs --ca or MUSTER_CA, the ca.crt that `muster pki init` made with its certificate"
                        .to_owned(),
                );
            }
            _ => {
                return Err(
                    "it needs http:// or https:// and a host, such as http://10.0.0.1:7070".to_owned()
                );
            }
        };
        let host = host(endpoint.uri()).to_owned();
        endpoint.tls_config(tls.domain_name(host)).map_err(|error| why(&error))
    }
}

/// The host of a URL, an IPv6 address without its brackets.
pub(crate) fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or_default().trim_matches(['[', ']'])
}

/// Its port.
pub(crate) fn port(uri: &Uri) -> u16 {
    let usual = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    uri.port_u16().unwrap_or(usual)
}

/// Whether connections to this URL are encrypted.
pub fn is_encrypted(url: &str) -> bool {
    url.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://"))
}

/// Whether one that is called by `from` may send its client to `to`. Not from an encrypted connection to one that is not.
pub fn may_send(from: &str, to: &str) -> bool {
    is_encrypted(to) || !is_encrypted(from)
}

/// Why a connection failed, in words: what the peer is not, and what to do; else the error at the bottom.
pub fn why(error: &(dyn Error + 'static)) -> String {
    said(error).or_else(|| causes(error).last().map(ToString::to_string)).unwrap_or_default()
}

/// The same where the two ends do not agree on encryption; none for other errors.
pub fn said(error: &(dyn Error + 'static)) -> Option<String> {
    causes(error).find_map(|error| {
        // It is no source of the error that it is in.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = inner.and_then(|inner| inner.downcast_ref()).or_else(|| error.downcast_ref());
        tls.and_then(tls_said)
    })
}

fn tls_said(error: &TlsError) -> Option<String> {
    let certificate = match error {
        TlsError::InvalidMessage(_) => {
            return Some("it does not speak TLS: call it by http://, or start it with --tls-dir".to_owned());
        }
        TlsError::InvalidCertificate(certificate) => certificate,
        _ => return None,
    };
    Some(match certificate {
        // Authorities that we make have the same name: that another has signed it shows in the signature.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is not of the authority given by --ca or MUSTER_CA: pass the ca.crt made with it".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "its certificate is not for the name {:?} but for {}: call it by one of them, or make one with `muster pki \
             init --host`",
            expected.to_str(),
            presented.join(", ")
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired, or this machine's clock is wrong: make a new one with `muster pki init`".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet, or this machine's clock is wrong".to_owned()
        }
        other => format!("its certificate cannot be used: {other}"),
    })
}

/// An error, and from cause to cause the one at the bottom.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encrypted_connection_leads_to_no_open_one() {
        let table = [
            ("https://a:1", "https://b:1", true),
            ("https://a:1", "http://b:1", false),
            ("HTTPS://a:1", "http://b:1", false),
            ("http://a:1", "https://b:1", true),
            ("http://a:1", "http://b:1", true),
            ("https://a:1", "unix:/b", false),
        ];
        for (from, to, may) in table {
            assert_eq!(may_send(from, to), may, "{from} {to}");
        }
    }

    #[test]
    fn an_authority_that_is_none_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.crt");
        assert!(Trust::from_file(&path).unwrap_err().contains("No such file"));
        std::fs::write(&path, "no certificate").unwrap();
        assert!(Trust::from_file(&path).unwrap_err().contains("holds no certificate"));
        let refused = Trust::default().endpoint("https://a:1").unwrap_err();
        assert!(refused.contains("--ca"), "{refused}");
    }
}
