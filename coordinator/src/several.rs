//! One of several coordinators on etcd: it follows until it is elected, leads until it is deposed, and follows again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use muster_proto::convert::NotLeader;
use muster_store::{
    Election, Error as StoreError, Etcd, EtcdConfig, EtcdStore, Standing as Elected, Term, View,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::agents::Runs;
use crate::clock::Clock;
use crate::driver::{self, Driver, End, Leads};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::office::{Following, Reign, Standing};
use crate::seen::Seen;
use crate::{Config, Error};

/// How often the last commit that was seen is noted.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);

/// What a time of leading needs.
pub(crate) struct Candidate {
    pub etcd: EtcdConfig,
    /// Where clients reach us.
    pub url: String,
    pub config: Config,
    pub metrics: Metrics,
    pub monitor: Monitor,
    pub clock: Clock,
    pub standing: watch::Sender<Standing>,
}

impl Candidate {
    /// Stands for election until `shutdown`, or until a person has to mend something.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let path: PathBuf = self.config.data_dir.join("etcd-seen.json");
        let mut seen = Seen::load(path, self.config.accept_restored_store);
        let etcd = Etcd::open(&self.etcd)?;
        let election = etcd.stand(&self.url, self.config.leader_lease, seen.floor());
        let mut elected = election.standing();
        info!(members = self.etcd.members.join(","), url = self.url, "standing for election");
        let ended = loop {
            let now = elected.borrow_and_update().clone();
            match now {
                Elected::Failed(why) => break Err(StoreError::Terminal(why).into()),
                Elected::Following(view) => {
                    if let Err(why) = seen.note(view.place.as_deref(), view.commits, view.fence) {
                        break Err(StoreError::Terminal(why).into());
                    }
                    self.follow(&view);
                }
                Elected::Leading(term) => {
                    let reign = self.reign(&etcd, &election, &term, &mut seen, &shutdown);
                    match reign.await {
                        Ok(()) => election.give_up(term.fence),
                        Err(error) => break Err(error),
                    }
                    // What it says of a term that is over is no news.
                    let over =
                        |now: &Elected| !matches!(now, Elected::Leading(now) if now.fence == term.fence);
                    tokio::select! {
                        _ = elected.wait_for(over) => {}
                        () = shutdown.cancelled() => {}
                    }
                    if shutdown.is_cancelled() {
                        break Ok(());
                    }
                    continue;
                }
            }
            tokio::select! {
                _ = elected.changed() => {}
                () = shutdown.cancelled() => break Ok(()),
            }
        };
        election.resign().await;
        seen.keep();
        ended
    }

    fn follow(&self, view: &View) {
        // Once for each spell, and not for each member that says it in other words.
        if let Standing::Following(before) = &*self.standing.borrow() {
            match (&before.trouble, &view.trouble) {
                (None, Some(why)) => warn!(%why, "nobody can be elected while etcd is like this"),
                (Some(_), None) => info!("etcd answers again"),
                (None, None) | (Some(_), Some(_)) => {}
            }
            if let Some(leader) = view.leader.as_ref().filter(|leader| before.leader.as_ref() != Some(leader))
            {
                info!(leader, "another coordinator leads");
            }
        }
        self.standing.send_modify(|standing| {
            let last = match std::mem::replace(standing, Standing::Following(Following::default())) {
                Standing::Following(before) => before.last,
                Standing::Leading(_) => None,
            };
            let coordinators = view.candidates as u32;
            let (leader, trouble) = (view.leader.clone(), view.trouble.clone());
            *standing = Standing::Following(Following { leader, coordinators, trouble, last });
        });
    }

    /// One time of leading. An error is one that no later time of leading would mend.
    async fn reign(
        &self,
        etcd: &Etcd,
        election: &Election,
        term: &Term,
        seen: &mut Seen,
        shutdown: &CancellationToken,
    ) -> Result<(), Error> {
        info!(term = term.fence.0, "elected");
        seen.begin(&term.place, term.commits(), term.fence.0).map_err(StoreError::Terminal)?;
        // The one that was shown, if any, is of the past.
        let driver = match self.load(etcd, term).await {
            Ok(driver) => driver,
            // Nobody else can lead either while etcd is like this; the lease is given up and the next try waits for it.
            Err(Error::Store(why @ (StoreError::Retryable(_) | StoreError::Fenced))) => {
                warn!(%why, "the cluster's state could not be loaded");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let (handle, mut driver) = driver;
        let over = shutdown.child_token();
        let reign = Reign {
            agents: Runs::new(handle.clock(), over.clone()),
            driver: handle,
            term: term.fence.0,
            coordinators: term.candidates as u32,
            cluster_id: driver.cluster_id().into(),
            over,
        };
        self.replace(Standing::Leading(reign.clone()));
        info!(term = term.fence.0, "leading");
        let deposed = CancellationToken::new();
        let mut elected = election.standing();
        let ended = {
            let over = |now: &Elected| !matches!(now, Elected::Leading(now) if now.fence == term.fence);
            let run = driver.run(shutdown, &deposed);
            tokio::pin!(run);
            let mut notes = tokio::time::interval(NOTE_INTERVAL);
            loop {
                tokio::select! {
                    ended = &mut run => break ended,
                    _ = elected.wait_for(over), if !deposed.is_cancelled() => deposed.cancel(),
                    _ = notes.tick() => {
                        // It cannot have gone back: each commit compares the one before it.
                        seen.note(Some(&term.place), term.commits(), term.fence.0).ok();
                    }
                }
            }
        };
        seen.note(Some(&term.place), term.commits(), term.fence.0).ok();
        seen.keep();
        reign.over.cancel();
        let says = NotLeader { coordinators: reign.coordinators, ..NotLeader::default() };
        reign.driver.links().close_all(&says.to_status(""));
        match ended {
            Ok(End::Deposed) => {
                error!(
                    term = term.fence.0,
                    "stepped down: this coordinator could not keep its lease in etcd, or has lost it"
                );
                self.show(reign, driver);
                Ok(())
            }
            Ok(End::Stopped) => {
                self.replace(Standing::Following(Following::default()));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// What was known is shown until somebody leads.
    fn show(&self, reign: Reign, driver: Driver) {
        let stop = CancellationToken::new();
        let coordinators = reign.coordinators;
        let last = Some((reign, self.clock.now()));
        self.replace(Standing::Following(Following { coordinators, last, ..Following::default() }));
        tokio::spawn(driver.show(stop.clone()));
        let mut standing = self.standing.subscribe();
        tokio::spawn(async move {
            let somebody = |now: &Standing| match now {
                Standing::Leading(_) => true,
                Standing::Following(following) => following.leader.is_some(),
            };
            standing.wait_for(somebody).await.ok();
            stop.cancel();
        });
    }

    fn replace(&self, standing: Standing) {
        self.standing.send_replace(standing);
    }

    /// Reads everything, off these threads.
    async fn load(&self, etcd: &Etcd, term: &Term) -> Result<(driver::Handle, Driver), Error> {
        let store = Box::new(EtcdStore::lead(etcd, term.clone()));
        let config = self.config.of_core();
        let (metrics, monitor) = (self.metrics.clone(), self.monitor.clone());
        let (clock, held) = (Clock::start(), term.clone());
        let leads: Leads = Arc::new(move || held.is_held());
        tokio::task::spawn_blocking(move || driver::start(store, config, metrics, monitor, clock, leads))
            .await?
    }
}
