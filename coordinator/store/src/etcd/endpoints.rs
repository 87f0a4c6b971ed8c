//! The members of etcd, called in turn until one answers.
//!
//! The library's own balancing goes on sending to a member that is dead; here each member has a client of its own, and
//! a call goes to the one that answered last, and to the next if it fails.

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error as EtcdError, Identity, TlsOptions};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::EtcdConfig;
use crate::Error;
use crate::clock::boot_now;

/// Time to connect to a member.
const CONNECT_MAX: Duration = Duration::from_millis(750);
/// Pause after every member was tried.
const ROUND_PAUSE: Duration = Duration::from_millis(50);

/// Why a call of etcd came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It may succeed later, and may even have succeeded now.
    Passing(String),
    /// There is no such lease.
    NoLease,
    /// The history that was asked for is compacted.
    Compacted,
    /// The answer is larger than what is taken.
    TooLarge,
    /// Only a person can mend it.
    Lasting(String),
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Passing(why) => Self::Retryable(why),
            Trouble::NoLease => Self::Fenced,
            Trouble::Compacted => Self::Retryable("etcd has compacted what was being read".to_owned()),
            Trouble::TooLarge => {
                Self::Terminal("etcd gives a value that is larger than any of ours".to_owned())
            }
            Trouble::Lasting(why) => Self::Terminal(why),
        }
    }
}

impl Trouble {
    /// In words.
    pub fn words(&self) -> String {
        Error::from(self.clone()).to_string()
    }
}

/// How long is tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// One member.
    pub attempt: Duration,
    /// All of them, over and over.
    pub all: Duration,
}

/// The members.
pub(super) struct Endpoints {
    members: Vec<Member>,
    options: ConnectOptions,
    /// The one that answered last.
    current: AtomicUsize,
}

impl Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.members.iter().map(|member| &member.url)).finish()
    }
}

struct Member {
    url: String,
    client: Mutex<Option<Client>>,
}

impl Endpoints {
    pub fn new(config: &EtcdConfig) -> Result<Self, Error> {
        let read = |path: &std::path::PathBuf| {
            std::fs::read(path)
                .map_err(|error| Error::Terminal(format!("failed to read {}: {error}", path.display())))
        };
        let mut options = ConnectOptions::new().with_connect_timeout(CONNECT_MAX);
        if let Some((user, file)) = &config.user {
            let password = String::from_utf8_lossy(&read(file)?).trim_end_matches(['\n', '\r']).to_owned();
            options = options.with_user(user, password).with_auto_token_refresh(true);
        }
        let tls = config.ca.is_some() || config.identity.is_some();
        if tls {
            let mut settings = TlsOptions::new();
            if let Some(ca) = &config.ca {
                settings = settings.ca_certificate(Certificate::from_pem(read(ca)?));
            }
            if let Some((certificate, key)) = &config.identity {
                settings = settings.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            options = options.with_tls(settings);
        }
        let scheme = if tls { "https" } else { "http" };
        let members = config
            .members
            .iter()
            .map(|member| Member { url: format!("{scheme}://{member}"), client: Mutex::new(None) });
        Ok(Self { members: members.collect(), options, current: AtomicUsize::new(0) })
    }

    /// Calls members in turn until one answers, or what is wrong is not the member's fault, or patience ends.
    ///
    /// A call whose answer is lost is made again: it must not matter if it is carried out twice.
    pub async fn call<T, F>(&self, patience: Patience, ask: impl Fn(Client) -> F) -> Result<T, Trouble>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let end = boot_now() + patience.all;
        let first = self.current.load(Ordering::Relaxed);
        let mut why = Vec::new();
        for turn in first.. {
            let index = turn % self.members.len();
            let member = &self.members[index];
            let left = end.saturating_sub(boot_now());
            if left.is_zero() {
                break;
            }
            let attempt = patience.attempt.min(left);
            let answer = timeout(attempt, async { ask(self.client(member).await?).await }).await;
            let trouble = match answer {
                Ok(Ok(answer)) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(error)) => trouble(&member.url, &error),
                Err(_) => Trouble::Passing(format!("{} did not answer within {attempt:?}", member.url)),
            };
            match trouble {
                Trouble::Passing(words) => {
                    if !why.contains(&words) {
                        why.push(words);
                    }
                }
                other @ (Trouble::NoLease | Trouble::Compacted | Trouble::TooLarge | Trouble::Lasting(_)) => {
                    return Err(other);
                }
            }
            why.truncate(self.members.len());
            if (turn + 1 - first).is_multiple_of(self.members.len()) {
                sleep(ROUND_PAUSE.min(end.saturating_sub(boot_now()))).await;
            }
        }
        Err(Trouble::Passing(format!("etcd does not do it: {}", why.join("; "))))
    }

    /// The member's client. Making one connects only where a password must be shown.
    async fn client(&self, member: &Member) -> Result<Client, EtcdError> {
        let mut held = member.client.lock().await;
        if let Some(client) = &*held {
            return Ok(client.clone());
        }
        let client = Client::connect([&member.url], Some(self.options.clone())).await?;
        Ok(held.insert(client).clone())
    }
}

/// What an error is for us. etcd has few codes and many words.
fn trouble(member: &str, error: &EtcdError) -> Trouble {
    let passing = |why: &str| Trouble::Passing(format!("{member}: {why}"));
    match error {
        EtcdError::GRpcStatus(status) => {
            let words = status.message();
            let has = |mark: &str| words.contains(mark);
            if has("database space exceeded") {
                return Trouble::Passing(
                    "etcd is full (alarm NOSPACE): compact and defragment it, or start it with a larger \
                     --quota-backend-bytes, then run `etcdctl alarm disarm`"
                        .to_owned(),
                );
            }
            if has("requested lease not found") {
                return Trouble::NoLease;
            }
            if has("required revision has been compacted") {
                return Trouble::Compacted;
            }
            if has("decoded message length too large") {
                return Trouble::TooLarge;
            }
            if has("authentication failed") || has("permission denied") || has("user name is empty") {
                return Trouble::Lasting(format!(
                    "etcd does not let us in: {words}; look at --etcd-user, --etcd-password-file and the user's roles \
                     in etcd"
                ));
            }
            if has("request is too large") || has("too many operations in txn request") {
                return Trouble::Lasting(format!(
                    "etcd refuses a request of the usual size: {words}; start it with its default --max-request-bytes \
                     and --max-txn-ops or larger ones"
                ));
            }
            passing(
                if words.is_empty() { root_cause(error_source(status)) } else { words.to_owned() }.as_str(),
            )
        }
        EtcdError::LeaseKeepAliveError(why) if why.contains("lease not found") => Trouble::NoLease,
        EtcdError::InvalidArgs(why) => Trouble::Lasting(format!("etcd cannot be asked: {why}")),
        EtcdError::TransportError(error) => passing(&root_cause(Some(error))),
        other => passing(&other.to_string()),
    }
}

fn error_source(error: &dyn std::error::Error) -> Option<&dyn std::error::Error> {
    error.source()
}

fn root_cause(error: Option<&dyn std::error::Error>) -> String {
    let Some(mut cause) = error else { return "the connection broke".to_owned() };
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
