//! `--store`, and what belongs to it.

use std::path::PathBuf;
use std::str::FromStr;

use muster_coordinator::{EtcdConfig, StoreKind};

use crate::exit::Failure;

/// Where jobs and nodes are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Store(StoreKind);

impl FromStr for Store {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "redb" => Ok(Self(StoreKind::Redb)),
            "memory" => Ok(Self(StoreKind::Memory)),
            url if url.starts_with("etcd://") => Ok(Self(StoreKind::Etcd(EtcdConfig::parse(url)?))),
            other => {
                Err(format!("{other:?} is neither redb, nor memory, nor etcd://HOST:PORT,HOST:PORT/NAME"))
            }
        }
    }
}

/// How etcd is reached.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct EtcdArgs {
    /// Certificate of the authority that has signed etcd's, in PEM; with it, etcd is reached by TLS.
    #[arg(long = "etcd-ca", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Certificate that etcd is shown, in PEM.
    #[arg(long = "etcd-cert", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Key of that certificate, in PEM.
    #[arg(long = "etcd-key", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// User of etcd.
    #[arg(long = "etcd-user", value_name = "NAME", requires = "password_file")]
    pub user: Option<String>,
    /// File with that user's password.
    #[arg(long = "etcd-password-file", value_name = "FILE", requires = "user")]
    pub password_file: Option<PathBuf>,
}

impl Store {
    /// With what was said of etcd.
    pub fn kind(self, etcd: &EtcdArgs) -> Result<StoreKind, Failure> {
        let said = etcd.ca.is_some() || etcd.cert.is_some() || etcd.user.is_some();
        match self.0 {
            StoreKind::Etcd(config) => Ok(StoreKind::Etcd(EtcdConfig {
                ca: etcd.ca.clone(),
                identity: etcd.cert.clone().zip(etcd.key.clone()),
                user: etcd.user.clone().zip(etcd.password_file.clone()),
                ..config
            })),
            StoreKind::Redb | StoreKind::Memory if said => {
                Err(Failure::Usage("--etcd-… is for --store etcd://HOST:PORT".to_owned()))
            }
            kind @ (StoreKind::Redb | StoreKind::Memory) => Ok(kind),
        }
    }
}
