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
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate that etcd is shown, in PEM.
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// User of etcd.
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// File with that user's password.
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
}

impl Store {
    /// With what was said of etcd.
    pub fn kind(self, etcd: &EtcdArgs) -> Result<StoreKind, Failure> {
        let said = etcd.etcd_ca.is_some() || etcd.etcd_cert.is_some() || etcd.etcd_user.is_some();
        match self.0 {
            StoreKind::Etcd(config) => Ok(StoreKind::Etcd(EtcdConfig {
                ca: etcd.etcd_ca.clone(),
                identity: etcd.etcd_cert.clone().zip(etcd.etcd_key.clone()),
                user: etcd.etcd_user.clone().zip(etcd.etcd_password_file.clone()),
                ..config
            })),
            StoreKind::Redb | StoreKind::Memory if said => {
                Err(Failure::Usage("--etcd-… is for --store etcd://HOST:PORT".to_owned()))
            }
            kind @ (StoreKind::Redb | StoreKind::Memory) => Ok(kind),
        }
    }
}
