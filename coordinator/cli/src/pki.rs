//! `muster pki`: an authority of one's own and a certificate for the coordinators, where there is none already.
//!
//! The files have the names of the keys in a TLS secret of Kubernetes.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::exit::Failure;
use crate::output::lines;

/// The authority's certificate.
const CA: &str = "ca.crt";
/// The authority's key.
const CA_KEY: &str = "ca.key";
/// The coordinators' certificate.
const CERT: &str = "tls.crt";
/// The coordinators' key.
const KEY: &str = "tls.key";

const DAY: Duration = Duration::from_hours(24);
/// How long the authority is good for.
const CA_SPAN: Duration = Duration::from_hours(24 * 3652);
/// How long a certificate is good for.
const CERT_SPAN: Duration = Duration::from_hours(24 * 365);
/// Names in one certificate.
const HOSTS_MAX: usize = 256;

/// What is done with keys and certificates.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PkiCommand {
    /// Make an authority (10 years) and a certificate for the coordinators (1 year). Where ca.crt and ca.key are there
    /// already, from an earlier time, they sign the new certificate: move tls.crt and tls.key away to renew them.
    #[command(
        after_help = "Example:\n  muster pki init --dir /etc/muster/tls --host gpu-0.example --host 10.0.0.1"
    )]
    Init(InitArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct InitArgs {
    /// Directory for ca.crt, ca.key, tls.crt and tls.key; made if it is not there. No file is overwritten.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name or IP address by which workers and users call a coordinator; may be repeated. localhost, 127.0.0.1 and ::1 always
    /// go with it. Default: this machine's host name.
    #[arg(long = "host", value_name = "NAME_OR_IP")]
    hosts: Vec<String>,
}

/// `muster pki`.
pub(crate) fn run(command: PkiCommand) -> Result<(), Failure> {
    let PkiCommand::Init(InitArgs { dir, hosts }) = command;
    let hosts = names(hosts)?;
    let renewed = init(&dir, &hosts)?;
    let shown = dir.display();
    let made = if renewed {
        "tls.crt and tls.key, signed by its ca.crt"
    } else {
        "ca.crt, ca.key, tls.crt, tls.key"
    };
    let host = hosts.last().map_or("localhost", String::as_str);
    let host = if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() };
    let socket = "--coordinator unix:muster-coordinator/muster.sock";
    lines([
        format!("made in {shown}: {made}"),
        format!("for {}", hosts.join(", ")),
        String::new(),
        "Start the coordinator with it, and give nodes a join token and people ca.crt and a token:".into(),
        format!("  muster coordinator --listen 0.0.0.0:7070 --tls-dir {shown}"),
        format!("  muster token create {socket} --role node > join"),
        format!("  muster worker --coordinator https://{host}:7070 --join-token-file join"),
        format!("  muster token create {socket} --role submitter > token"),
        format!("  muster nodes --coordinator https://{host}:7070 --ca {shown}/{CA} --token-file token"),
        String::new(),
        "Who has ca.key can pass for a coordinator or a node. It is needed while nodes join and renew their \
         certificates."
            .into(),
    ])
}

/// Everything that the certificate is for.
fn names(mut given: Vec<String>) -> Result<Vec<String>, Failure> {
    if given.len() > HOSTS_MAX {
        return Err(Failure::Usage(format!(
            "--host names {} hosts; at most {HOSTS_MAX} go into one",
            given.len()
        )));
    }
    if given.is_empty() {
        given.extend(nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()));
    }
    for host in &given {
        let label = |label: &str| !label.is_empty() && label.len() <= 63;
        let letters = |c: char| c.is_ascii_alphanumeric() || "-_.*".contains(c);
        if host.parse::<IpAddr>().is_err() && !(host.chars().all(letters) && host.split('.').all(label)) {
            return Err(Failure::Usage(format!("--host {host:?} is neither a name nor an IP address")));
        }
    }
    let mut all = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    given.retain(|host| !all.contains(host));
    all.extend(given);
    Ok(all)
}

/// Makes the files, all of them or none. Whether the authority was there already.
fn init(dir: &Path, hosts: &[String]) -> Result<bool, Failure> {
    std::fs::create_dir_all(dir)
        .with_context(|| format!("failed to make the directory {}", dir.display()))?;
    let is_there = |name: &&str| dir.join(name).symlink_metadata().is_ok();
    let renewed = [CA, CA_KEY].iter().all(is_there);
    let wanted = if renewed { &[CERT, KEY][..] } else { &[CA, CA_KEY, CERT, KEY] };
    if let Some(name) = wanted.iter().find(|name| is_there(name)) {
        return Err(Failure::Other(anyhow!(
            "{} is there already and is not overwritten; move it away, or choose another --dir",
            dir.join(name).display()
        )));
    }
    let failed = "failed to make the certificates";
    let (mut files, authority) = if renewed {
        let path = dir.join(CA_KEY);
        let pem =
            std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let key = KeyPair::from_pem(&pem).with_context(|| format!("{} holds no key", path.display()))?;
        // The same as before, but for its dates: only its name and its key go into what it signs.
        (Vec::new(), Issuer::new(authority(), key))
    } else {
        let (params, key) = (authority(), KeyPair::generate().context(failed)?);
        let cert = params.self_signed(&key).context(failed)?;
        (vec![(CA_KEY, key.serialize_pem()), (CA, cert.pem())], Issuer::new(params, key))
    };
    let key = KeyPair::generate().context(failed)?;
    let cert = server(hosts).and_then(|params| params.signed_by(&key, &authority)).context(failed)?;
    files.extend([(KEY, key.serialize_pem()), (CERT, cert.pem())]);

    let mut written = Vec::new();
    for (name, text) in &files {
        let path = dir.join(name);
        let mode = if path.extension().is_some_and(|kind| kind == "key") { 0o600 } else { 0o644 };
        let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let wrote = made.and_then(|file| {
            written.push(path.clone());
            write(file, text)
        });
        if let Err(error) = wrote {
            for path in written {
                std::fs::remove_file(path).ok();
            }
            return Err(anyhow!(error).context(format!("failed to write {}", path.display())).into());
        }
    }
    Ok(renewed)
}

fn write(mut file: File, text: &str) -> std::io::Result<()> {
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn authority() -> CertificateParams {
    let mut params = named("Muster CA", CA_SPAN);
    // It signs no further authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn server(hosts: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = named("Muster coordinator", CERT_SPAN);
    params.subject_alt_names = CertificateParams::new(hosts)?.subject_alt_names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Members of an etcd show each other the certificate that they serve with.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.distinguished_name.push(DnType::OrganizationName, "Muster");
    Ok(params)
}

#[expect(clippy::disallowed_methods, reason = "a certificate is good from now on")]
fn named(name: &str, span: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    // Clocks of nodes may be behind.
    params.not_before = (now - DAY).into();
    params.not_after = (now + span).into();
    params
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use tokio_rustls::rustls::client::WebPkiServerVerifier;
    use tokio_rustls::rustls::client::danger::ServerCertVerifier;
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use tokio_rustls::rustls::sign::CertifiedKey;
    use tokio_rustls::rustls::{Error, RootCertStore};

    use super::*;

    /// Whether a client that trusts the first directory's authority takes the second one's certificate for this name, in so
    /// many days.
    fn accepts(authority: &Path, server: &Path, name: &str, days: u32) -> Result<(), Error> {
        let certificate = |path: PathBuf| CertificateDer::from_pem_file(path).unwrap();
        let key = PrivateKeyDer::from_pem_file(server.join(KEY)).unwrap();
        let chain = vec![certificate(server.join(CERT))];
        CertifiedKey::from_der(chain.clone(), key, &default_provider()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate(authority.join(CA))).unwrap();
        let provider = Arc::new(default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
        let now = Duration::from_secs(UnixTime::now().as_secs());
        let at = UnixTime::since_unix_epoch(now + DAY * days);
        let name = ServerName::try_from(name).unwrap();
        verifier.verify_server_cert(&chain[0], &[], &name, &[], at).map(|_| ())
    }

    #[test]
    fn clients_accept_what_was_made_for_its_names_and_time() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [dir, other] = [dirs[0].path(), dirs[1].path()];
        let hosts = names(vec!["gpu-0.example".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        for dir in [dir, other] {
            assert!(!init(dir, &hosts).unwrap());
        }
        let table = [
            ("gpu-0.example", 0, true),
            ("10.0.0.1", 0, true),
            ("localhost", 0, true),
            ("127.0.0.1", 0, true),
            ("::1", 364, true),
            ("gpu-1.example", 0, false),
            ("10.0.0.2", 0, false),
            ("localhost", 366, false),
        ];
        for (name, days, accepted) in table {
            assert_eq!(accepts(dir, dir, name, days).is_ok(), accepted, "{name} in {days} days");
        }
        assert!(accepts(other, dir, "localhost", 0).is_err(), "another authority has signed it");
        for (name, expected) in [(CA, 0o644), (CA_KEY, 0o600), (CERT, 0o644), (KEY, 0o600)] {
            let mode = std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
            // The umask may take some of it away.
            assert_eq!(mode & !expected, 0, "{name}: {mode:o}");
        }
    }

    #[test]
    fn nothing_is_overwritten_and_the_same_authority_signs_again() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let hosts = names(vec!["a".to_owned()]).unwrap();
        init(dir, &hosts).unwrap();
        let ca = std::fs::read(dir.join(CA)).unwrap();
        let refused = init(dir, &hosts).unwrap_err().why();
        assert!(refused.contains("tls.crt is there already"), "{refused}");
        for name in [CERT, KEY] {
            std::fs::rename(dir.join(name), dir.join(format!("{name}.old"))).unwrap();
        }
        assert!(init(dir, &hosts).unwrap());
        assert_eq!(std::fs::read(dir.join(CA)).unwrap(), ca);
        accepts(dir, dir, "a", 0).unwrap();
        std::fs::remove_file(dir.join(CA_KEY)).unwrap();
        let refused = init(dir, &hosts).unwrap_err().why();
        assert!(refused.contains("ca.crt is there already"), "{refused}");
        assert!(!dir.join(CA_KEY).exists());
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        let table = [
            ("gpu-0", true),
            ("*.example.org", true),
            ("fe80::1", true),
            ("", false),
            ("a b", false),
            ("a..b", false),
            ("https://a", false),
            ("a:7070", false),
            ("ä", false),
        ];
        for (host, ok) in table {
            assert_eq!(names(vec![host.to_owned()]).is_ok(), ok, "{host:?}");
        }
        assert_eq!(names(vec!["localhost".to_owned()]).unwrap(), ["localhost", "127.0.0.1", "::1"]);
    }
}
