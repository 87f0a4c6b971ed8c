//! The store of several coordinators: etcd. One of them leads, by etcd's own election, and only what it writes counts.
//!
//! - `endpoints` calls the members of etcd in turn, and says in words what is wrong with them.
//! - `election` is this coordinator's place among those that would lead, `candidacy` the task that holds it.
//! - `store` is the [`Store`](crate::Store) of the one that does, `read` what any may read; `batch` cuts what is too large for
//!   etcd.
//!
//! Everything lies under the cluster's name:
//!
//! | key | value |
//! |---|---|
//! | `NAME/election/LEASE` | a coordinator that would lead; the oldest key leads |
//! | `NAME/fence` | the number of the last one that did |
//! | `NAME/head` | fence, number and attempt of the last commit: each compares it, so that none is applied twice or late |
//! | `NAME/v/KEY` | a value, or where its pieces are |
//! | `NAME/c/ID/N` | a piece of a value that is too large for one request |
//! | `NAME/journal` | set while a batch that is too large for one transaction is being applied |
//! | `NAME/j/ID/N` | a piece of that batch |

mod batch;
mod candidacy;
mod election;
mod endpoints;
mod read;
mod store;

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::Error;
pub use election::{Election, Floor, Standing, Term, View};
use endpoints::Endpoints;
pub use store::{EtcdStore, went_back};

/// Name of a cluster that is given none.
const NAME: &str = "muster";
/// Members that are tried.
const MEMBERS_MAX: usize = 16;
/// Longest name of a cluster.
const NAME_BYTES_MAX: usize = 128;

/// Where etcd is, and who we are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Its members, as `host:port`.
    pub members: Vec<String>,
    /// The cluster's name: what all of its keys begin with.
    pub name: String,
    /// Certificate of the authority that has signed etcd's. Set, TLS is used.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Our name and the file of our password.
    pub user: Option<(String, PathBuf)>,
}

impl EtcdConfig {
    /// Reads `etcd://host:2379,[fd00::2]:2379/name`, the name being optional, and spaces around
    /// members passed over.
    pub fn parse(url: &str) -> Result<Self, String> {
        // Not shown, not even to say what is wrong with it.
        if url.contains('@') {
            return Err("a URL of etcd names no user and no password, which every list of processes would show: pass \
                        --etcd-user NAME and --etcd-password-file FILE"
                .to_owned());
        }
        let bad =
            |why: &str| format!("{url:?} {why}; it looks like etcd://10.0.0.1:2379,[fd00::2]:2379/muster");
        let rest = url.trim().strip_prefix("etcd://").ok_or_else(|| bad("does not begin with etcd://"))?;
        if rest.contains("://") {
            return Err(bad("has http:// or https:// before a member, which --etcd-ca decides"));
        }
        let (members, name) = rest.split_once('/').unwrap_or((rest, ""));
        let name = Some(name.trim().trim_end_matches('/')).filter(|name| !name.is_empty()).unwrap_or(NAME);
        let members: Vec<&str> = members.split(',').map(str::trim).collect();
        if let Some(why) = members.iter().find_map(|member| wrong_member(member)) {
            return Err(bad(why));
        }
        if members.len() > MEMBERS_MAX {
            return Err(bad(&format!("names more than {MEMBERS_MAX} members")));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            return Err(bad("has a name that is not of letters, digits, '-', '_' and '.'"));
        }
        let members = members.into_iter().map(str::to_owned).collect();
        Ok(Self { members, name: name.to_owned(), ..Self::default() })
    }
}

/// Returns what is wrong with a member that is not `host:port`, `address:port` or `[address]:port`.
fn wrong_member(member: &str) -> Option<&'static str> {
    let (host, port) = member.rsplit_once(':').unwrap_or((member, ""));
    if let Some(bracketed) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        if bracketed.parse::<Ipv6Addr>().is_err() {
            return Some("has something in brackets that is not an address of IPv6");
        }
    } else if member.parse::<Ipv6Addr>().is_ok() || host.contains(':') {
        return Some("names an address of IPv6 without brackets, or without a port: write [::1]:2379");
    } else if host.chars().any(|c| c.is_whitespace() || "[]?#\\".contains(c)) {
        return Some("names a member that is no host");
    }
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Some("names a member without a host or a port");
    }
    None
}

/// A cluster's place in etcd. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Etcd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    endpoints: Endpoints,
    runtime: Own,
}

/// A thread of its own, so that a lease is renewed, and given up in time, whatever the rest of the process does.
#[derive(Debug)]
struct Own(Option<Runtime>);

impl Drop for Own {
    fn drop(&mut self) {
        // Dropped as it is, it would wait, which is forbidden in a task.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Etcd {
    /// Reads certificates and password; connects to nobody yet.
    pub fn open(config: &EtcdConfig) -> Result<Self, Error> {
        let endpoints = Endpoints::new(config)?;
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("etcd").enable_all().build();
        let runtime = runtime
            .map_err(|error| Error::Terminal(format!("failed to start a thread for etcd: {error}")))?;
        Ok(Self(Arc::new(Inner { name: config.name.clone(), endpoints, runtime: Own(Some(runtime)) })))
    }

    /// Stands for election, with this lease; `url` is where clients reach us. Its terms get
    /// numbers above `floor`.
    pub fn stand(&self, url: &str, lease: Duration, floor: Option<Floor>) -> Election {
        Election::stand(self.clone(), url.to_owned(), lease, floor)
    }

    fn key(&self, key: &str) -> String {
        format!("{}/{key}", self.0.name)
    }

    fn endpoints(&self) -> &Endpoints {
        &self.0.endpoints
    }

    fn runtime(&self) -> Result<&Runtime, Error> {
        self.0.runtime.0.as_ref().ok_or_else(|| Error::Terminal("etcd's thread has ended".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused_in_words() {
        let parsed = |url: &str| EtcdConfig::parse(url).map(|config| (config.members.len(), config.name));
        assert_eq!(parsed("etcd://a:2379"), Ok((1, "muster".to_owned())));
        assert_eq!(parsed("etcd://a:2379,[::1]:2379,c:1/blue/"), Ok((3, "blue".to_owned())));
        assert_eq!(
            EtcdConfig::parse(" etcd://a:1, [fd00::2]:2379 ,c:3/ blue// ").map(|config| config.members),
            Ok(["a:1", "[fd00::2]:2379", "c:3"].map(str::to_owned).to_vec())
        );
        assert_eq!(parsed("etcd://a:1//"), Ok((1, "muster".to_owned())));
        for secret in [
            "etcd://root:geheim@a:1",
            "etcd://root:ge/heim@a:1",
            "etcd://a:1,r:geheim@b:1/x",
            "etcd://geheim@",
        ] {
            let why = parsed(secret).unwrap_err();
            assert!(why.contains("--etcd-password-file") && !why.contains("heim"), "{why}");
        }
        for bad in [
            "redb",
            "etcd://::1:2379",
            "etcd://::1",
            "etcd://[::1]",
            "etcd://[::g]:1",
            "etcd://[fe80::1%eth0]:1",
            "etcd://http://a:1",
            "etcd://a b:1",
            "etcd://",
            "etcd://a",
            "etcd://:1",
            "etcd://a:x",
            "etcd://a:1,",
            "etcd://a:1/b c",
            "etcd://a:1/b/c",
        ] {
            let why = parsed(bad).unwrap_err();
            assert!(why.contains("it looks like etcd://"), "{why}");
        }
    }
}
