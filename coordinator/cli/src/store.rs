//! `--store` and what belongs to it, and `muster store`, which moves a cluster from one to another.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use muster_coordinator::{EtcdConfig, StoreKind, transfer};

use crate::daemons::private_files;
use crate::exit::Failure;
use crate::output::say;
use crate::units::Span;

/// Where jobs and nodes are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Store(StoreKind);

impl FromStr for Store {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "redb" => Ok(Self(StoreKind::Redb)),
            "memory" => Ok(Self(StoreKind::Memory)),
            url if url.starts_with("etcd://") => Ok(Self(StoreKind::Etcd(EtcdConfig::parse(url)?))),
            url if url.contains("://") => {
                Err("the URL of an etcd begins with etcd://, whether TLS is used or not: \
                                               etcd://HOST:PORT,HOST:PORT/NAME"
                    .to_owned())
            }
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

/// What only one of several coordinators needs.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SeveralArgs {
    /// With several coordinators: the URL at which workers and users reach this one. Default: the address it listens on.
    #[arg(long, value_name = "URL")]
    pub advertise: Option<String>,
    /// With several coordinators: time without a word from the leader after which another one leads.
    #[arg(long, default_value = "3s")]
    pub leader_lease: Span,
    /// With several coordinators: go on from an etcd that was restored from a backup, once.
    #[arg(long)]
    pub accept_restored_store: bool,
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

/// What is done with a store.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum StoreCommand {
    /// Write everything that a store holds into a file. etcd may be in use meanwhile; a redb file must not be.
    #[command(
        after_help = "Example:\n  muster store export --store redb --data-dir /var/lib/muster cluster.jsonl"
    )]
    Export(TransferArgs),
    /// Put such a file into a store that is empty, while no coordinator uses it.
    #[command(after_help = "Example:\n  muster store import --store etcd://10.0.0.1:2379 cluster.jsonl")]
    Import(TransferArgs),
}

/// From where to where.
#[derive(Debug, clap::Args)]
pub(crate) struct TransferArgs {
    /// The store: `redb`, or `etcd://HOST:PORT,HOST:PORT/NAME`.
    #[arg(long, default_value = "redb", value_name = "STORE")]
    store: Store,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// The directory of a redb file.
    #[arg(long, default_value = "muster-coordinator", value_name = "DIR")]
    data_dir: PathBuf,
    /// The file.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// `muster store`.
pub(crate) async fn run(command: StoreCommand) -> Result<(), Failure> {
    private_files();
    let moved = tokio::task::spawn_blocking(move || transfer(command)).await;
    let (moved, how) = moved.context("failed to move the store")??;
    say!("{how} {} records: {} jobs and {} nodes", moved.records, moved.jobs, moved.nodes);
    Ok(())
}

fn transfer(command: StoreCommand) -> Result<(transfer::Moved, &'static str), Failure> {
    let worded = |error: muster_coordinator::Error| anyhow::anyhow!("{error}");
    match command {
        StoreCommand::Export(args) => {
            let kind = args.store.kind(&args.etcd)?;
            // Not over an older one: that may be the only copy.
            let file = File::create_new(&args.file)
                .with_context(|| format!("failed to make the file {}", args.file.display()))?;
            let mut writer = BufWriter::new(&file);
            let exported = transfer::export(&kind, &args.data_dir, &mut writer);
            drop(writer);
            let moved = exported
                .map_err(worded)
                .and_then(|moved| Ok(file.sync_all().map(|()| moved)?))
                .inspect_err(|_| drop(std::fs::remove_file(&args.file)))?;
            Ok((moved, "exported"))
        }
        StoreCommand::Import(args) => {
            let kind = args.store.kind(&args.etcd)?;
            let file = File::open(&args.file)
                .with_context(|| format!("failed to open the file {}", args.file.display()))?;
            let moved = transfer::import(&kind, &args.data_dir, &mut BufReader::new(file)).map_err(worded)?;
            Ok((moved, "imported and verified"))
        }
    }
}
