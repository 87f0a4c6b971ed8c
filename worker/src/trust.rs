//! By which URLs coordinators are called, whom a client takes for one where connections are encrypted, and what it says when
//! that fails.

use std::borrow::Cow;
use std::error::Error;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error as TlsError};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Uri};

/// The authority whose certificates are taken; none at all by default.
///
/// Shared by its clones: a node's certificate that is renewed is shown by all of them.
#[derive(Clone, Debug, Default)]
pub struct Trust(Arc<RwLock<Option<ClientTlsConfig>>>);

impl Trust {
    /// Trusts the authorities of this file. The error is in words.
    pub fn from_file(ca: &Path) -> Result<Self, String> {
        let failed =
            |why: String| format!("failed to use the authority's certificate {}: {why}", ca.display());
        let pem = std::fs::read(ca).map_err(|error| failed(error.to_string()))?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        match found {
            Ok(found) if found.is_empty() => Err(failed("it holds no certificate in PEM".to_owned())),
            Ok(_) => Ok(Self(Arc::new(RwLock::new(Some(
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            ))))),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// A certificate will come with its authority: until then encrypted connections are possible, and nobody is trusted.
    pub(crate) fn expect_certificate(&self) {
        let mut tls = self.0.write().unwrap_or_else(PoisonError::into_inner);
        tls.get_or_insert_with(ClientTlsConfig::new);
    }

    /// From now on trusts this authority, and shows this certificate; all in PEM.
    pub(crate) fn show(&self, authority: &str, certificate: &str, key: &str) {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authority))
            .identity(Identity::from_pem(certificate, key));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(tls);
    }

    /// The endpoint of a URL. The error says what is wrong with it.
    pub fn endpoint(&self, url: &str) -> Result<Endpoint, String> {
        if names_a_user(url) {
            return Err(NO_USER.to_owned());
        }
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| error.to_string())?;
        if url.starts_with("unix:") {
            return Ok(endpoint);
        }
        let tls = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        let tls = match (endpoint.uri().scheme_str(), tls) {
            (Some("http"), _) if endpoint.uri().host().is_some() => return Ok(endpoint),
            (Some("https"), Some(tls)) => tls,
            (Some("https"), None) => {
                return Err(
                    "https:// needs --ca or MUSTER_CA, the ca.crt that `muster pki init` made with its certificate; a node needs \
                     --join-token-file"
                        .to_owned(),
                );
            }
            _ => {
                return Err(
                    "it needs http:// or https:// and a host, such as http://10.0.0.1:7070 or http://[fd00::1]:7070".to_owned()
                );
            }
        };
        let host = host(endpoint.uri()).to_owned();
        endpoint.tls_config(tls.domain_name(host)).map_err(|error| why(&error))
    }
}

/// Why a URL with a user is refused.
const NO_USER: &str = "the URL of a coordinator names no user and no password, which every list of processes would show: make a \
                       token with `muster token create`, and pass --token-file or MUSTER_TOKEN_FILE";

fn names_a_user(url: &str) -> bool {
    url.contains('@') && !url.starts_with("unix:")
}

/// Returns a URL as it may be shown: without what may be a user and a password.
pub fn shown(url: &str) -> Cow<'_, str> {
    match url.rsplit_once('@').filter(|_| names_a_user(url)) {
        Some((before, host)) => {
            let scheme = before.split_once("://").map(|(scheme, _)| format!("{scheme}://"));
            Cow::Owned(format!("{}...@{host}", scheme.unwrap_or_default()))
        }
        None => Cow::Borrowed(url),
    }
}

/// Returns URLs of coordinators as they are called, without the spaces, slashes and commas that
/// people write around them. The error is in words, and shows nothing of a password: a comma in one
/// makes two texts of it.
pub fn urls(texts: &[String]) -> Result<Vec<String>, String> {
    let trimmed = |text: &String| match text.trim() {
        socket if socket.starts_with("unix:") => socket.to_owned(),
        url => url.trim_end_matches('/').to_owned(),
    };
    let urls: Vec<String> = texts.iter().map(trimmed).filter(|url| !url.is_empty()).collect();
    match urls.as_slice() {
        [] => Err("no coordinator is named; a URL looks like http://10.0.0.1:7070 or http://[fd00::1]:7070"
            .to_owned()),
        all if all.iter().any(|url| names_a_user(url)) => Err(NO_USER.to_owned()),
        _ => Ok(urls),
    }
}

/// Longest file with a token.
const TOKEN_FILE_BYTES_MAX: u64 = 4096;

/// A token, as it is shown to coordinators. Its text is in no log: nothing prints it.
#[derive(Clone)]
pub struct Token(http::HeaderValue);

impl Token {
    /// The token in a file. The error is in words, and says nothing of what is in the file.
    pub fn from_file(path: &Path) -> Result<Self, String> {
        Self::new(&read_token(path)?).ok_or_else(|| format!("{} holds no token", path.display()))
    }

    /// A token; none if it cannot be one.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let mut header = http::HeaderValue::from_str(&format!("Bearer {text}")).ok()?;
        header.set_sensitive(true);
        text.starts_with("muster").then_some(Self(header))
    }

    /// The header of a call.
    pub fn header(&self) -> http::HeaderValue {
        self.0.clone()
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// The text of a token's file.
pub(crate) fn read_token(path: &Path) -> Result<String, String> {
    let failed = |error: io::Error| format!("failed to read the token in {}: {error}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text.trim().to_owned())
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
        tls.and_then(tls_said).or_else(|| alert_said(&error.to_string()))
    })
}

/// The same of a connection that was there already: HTTP/2 keeps nothing of the error but its text.
fn alert_said(text: &str) -> Option<String> {
    let (_, alert) = text.split_once("received fatal alert: ")?;
    let alerts = ["CertificateExpired", "UnknownCA", "UnknownCa", "BadCertificate", "DecryptError"]
        .map(|name| alert.contains(name));
    match alerts {
        [true, ..] => tls_said(&TlsError::AlertReceived(AlertDescription::CertificateExpired)),
        [false, others @ ..] if others.contains(&true) => {
            tls_said(&TlsError::AlertReceived(AlertDescription::UnknownCA))
        }
        _ => None,
    }
}

fn tls_said(error: &TlsError) -> Option<String> {
    let certificate = match error {
        TlsError::InvalidMessage(_) => {
            return Some("it does not speak TLS: call it by http://, or start it with --tls-dir".to_owned());
        }
        TlsError::InvalidCertificate(certificate) => certificate,
        TlsError::AlertReceived(AlertDescription::CertificateExpired) => {
            return Some(
                "it refuses our certificate, which has expired: a node needs a new join token".to_owned(),
            );
        }
        TlsError::AlertReceived(
            AlertDescription::UnknownCA | AlertDescription::BadCertificate | AlertDescription::DecryptError,
        ) => {
            return Some("it refuses our certificate, which another authority has signed: a node needs a new join token".to_owned());
        }
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
