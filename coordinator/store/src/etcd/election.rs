//! Where this coordinator stands among those that would lead, and a time of leading. The task behind it is in
//! `candidacy`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::{Compare, CompareOp};
use tokio::sync::watch;

use super::Etcd;
use super::candidacy::Candidacy;
use super::store::Head;
use crate::clock::boot_now;
use crate::{Error, Fence};

/// A term must be above this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Floor {
    /// At this place in etcd alone; none: at any.
    pub place: Option<String>,
    /// Its number.
    pub fence: Fence,
}

/// Where this coordinator stands.
#[derive(Clone, Debug)]
pub enum Standing {
    /// Another one leads, or none.
    Following(View),
    /// It leads.
    Leading(Term),
    /// It cannot stand until a person has mended something.
    Failed(String),
}

/// What one that does not lead sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Where the leader is reached, if there is one and etcd answers.
    pub leader: Option<String>,
    /// Coordinators that stand, as last seen.
    pub candidates: usize,
    /// What is wrong with etcd, if something is.
    pub trouble: Option<String>,
    /// Identity of the cluster's place in etcd, once there is one.
    pub place: Option<String>,
    /// Commits there so far, as last seen.
    pub commits: u64,
    /// Number of the last time of leading, as last seen.
    pub fence: u64,
}

/// A time of leading.
#[derive(Clone, Debug)]
pub struct Term {
    /// Its number.
    pub fence: Fence,
    /// Identity of the cluster's place in etcd, made once: another one is another history.
    pub place: Arc<str>,
    /// Coordinators that stand, as seen when it began.
    pub candidates: usize,
    pub(super) key: Arc<str>,
    pub(super) create_revision: i64,
    pub(super) head: Head,
    /// Commits there so far.
    pub(super) commits: Arc<AtomicU64>,
    /// When it must be over, on [`boot_now`], in milliseconds.
    until: Arc<AtomicU64>,
}

impl Term {
    /// Whether no other coordinator can lead yet. What is decided after it has become false counts for nothing.
    pub fn is_held(&self) -> bool {
        millis(boot_now()) < self.until.load(Ordering::Acquire)
    }

    /// Commits so far, over all terms.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    pub(super) fn condition(&self) -> Compare {
        Compare::create_revision(self.key.as_bytes(), CompareOp::Equal, self.create_revision)
    }

    pub(super) fn new(
        fence: Fence,
        place: &str,
        candidates: usize,
        key: (Arc<str>, i64),
        head: Head,
        until: Duration,
    ) -> Self {
        Self {
            fence,
            place: place.into(),
            candidates,
            key: key.0,
            create_revision: key.1,
            head,
            commits: Arc::new(AtomicU64::new(head.commits)),
            until: Arc::new(AtomicU64::new(millis(until))),
        }
    }

    pub(super) fn renewed(&self, until: Duration) {
        self.until.store(millis(until), Ordering::Release);
    }

    /// It is over, whatever its lease says.
    pub(super) fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// A candidacy that goes on until it is dropped, through any number of terms.
#[derive(Debug)]
pub struct Election {
    standing: watch::Receiver<Standing>,
    stop: watch::Sender<Stop>,
    etcd: Etcd,
    task: Option<tokio::task::JoinHandle<()>>,
}

/// What is asked of a candidacy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    No,
    /// Give up the present term, and stand again.
    Term(Fence),
    /// End.
    Stand,
}

impl Election {
    pub(super) fn stand(etcd: Etcd, url: String, lease: Duration, floor: Option<Floor>) -> Self {
        let (stop, stopped) = watch::channel(Stop::No);
        let (sender, standing) = watch::channel(Standing::Following(View::default()));
        let candidacy = Candidacy { etcd: etcd.clone(), url, lease, floor, stopped, standing: sender };
        let task = etcd.runtime().ok().map(|runtime| runtime.spawn(candidacy.run()));
        Self { standing, stop, etcd, task }
    }

    /// Where it stands, and each change.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Gives up a term that has turned out to be over, or that cannot be used.
    pub fn give_up(&self, fence: Fence) {
        self.stop.send_replace(Stop::Term(fence));
    }

    /// Ends the candidacy and lets the next one lead at once. Returns when etcd knows, or cannot be told.
    pub async fn resign(mut self) {
        self.stop.send_replace(Stop::Stand);
        if let Some(task) = self.task.take() {
            task.await.ok();
        }
    }

    /// Waits until it leads; not in a task.
    pub fn wait(&self, patience: Duration) -> Result<Term, Error> {
        let mut standing = self.standing.clone();
        self.etcd.runtime()?.block_on(async {
            let end = boot_now() + patience;
            loop {
                let view = match &*standing.borrow_and_update() {
                    Standing::Leading(term) => return Ok(term.clone()),
                    Standing::Failed(why) => return Err(Error::Terminal(why.clone())),
                    Standing::Following(view) => view.clone(),
                };
                let left = end.saturating_sub(boot_now());
                if left.is_zero() || tokio::time::timeout(left, standing.changed()).await.is_err() {
                    let why = match (view.leader, view.trouble) {
                        (Some(leader), _) => format!("the coordinator at {leader} leads"),
                        (None, Some(why)) => why,
                        (None, None) => "no election came to an end".to_owned(),
                    };
                    return Err(Error::Retryable(why));
                }
            }
        })
    }
}

impl Drop for Election {
    fn drop(&mut self) {
        self.stop.send_replace(Stop::Stand);
    }
}
