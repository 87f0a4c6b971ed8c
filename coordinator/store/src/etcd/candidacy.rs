//! A candidacy: etcd's own election, a key under a lease for each coordinator that would lead, of which the oldest leads.
//!
//! A leader's lease is renewed long before it ends. One that cannot be renewed is given up before etcd can let another
//! lead: by our own clock, counted from before the request was sent that renewed it last.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;

use super::Etcd;
use super::election::{Floor, Standing, Stop, Term, View};
use super::endpoints::{Patience, Trouble};
use super::store::Head;
use crate::Fence;
use crate::clock::boot_now;

/// Between looks at who leads. It bounds how long a cluster is without a leader after one has resigned.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Pause before standing again where that failed.
const STAND_PAUSE: Duration = Duration::from_millis(250);
/// Time to give a place up when the coordinator ends.
const RESIGN_MAX: Duration = Duration::from_secs(1);
/// A lease is renewed so many times in its length: several attempts may fail before it is in danger.
const RENEWALS: u32 = 5;
/// Part of a lease that is left when it is given up, for clocks that do not run alike.
const MARGIN_PART: u32 = 10;

/// What a candidate writes under its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Candidate {
    url: String,
}

/// The part of a lease for which it is relied on.
fn usable(span: Duration) -> Duration {
    span.saturating_sub(span / MARGIN_PART)
}

/// The task.
pub(super) struct Candidacy {
    pub etcd: Etcd,
    pub url: String,
    pub lease: Duration,
    pub floor: Option<Floor>,
    pub stopped: watch::Receiver<Stop>,
    pub standing: watch::Sender<Standing>,
}

/// A key under a lease.
struct Place {
    lease: i64,
    key: Arc<str>,
    create_revision: i64,
    /// The lease's length, as etcd grants it.
    span: Duration,
    /// Until when it lasts in any case.
    until: Duration,
    renew_at: Duration,
}

/// Who stands, the first the leader, and the head of the store.
struct Look {
    candidates: Vec<(i64, String)>,
    head: Head,
    place: Option<String>,
}

impl Look {
    /// Coordinators that stand. One that was started again may be there twice for a while.
    fn count(&self) -> usize {
        self.candidates.iter().map(|(_, url)| url).collect::<BTreeSet<_>>().len()
    }
}

impl Candidacy {
    pub async fn run(mut self) {
        self.end_predecessors().await;
        // A place that could not be given up, because etcd was away: nobody is to wait for it once etcd is back.
        let mut left = None;
        while *self.stopped.borrow() != Stop::Stand {
            match self.enter(left).await {
                Ok(mut place) => {
                    self.hold(&mut place).await;
                    left = self.leave(&place).await.is_err().then_some(place.lease);
                }
                Err(Trouble::Lasting(why)) => {
                    self.standing.send_replace(Standing::Failed(why));
                    return;
                }
                Err(trouble) => self.report(Err(&trouble)),
            }
            tokio::select! {
                () = sleep(STAND_PAUSE) => {}
                _ = self.stopped.wait_for(|stop| *stop == Stop::Stand) => {}
            }
        }
    }

    /// A process that stood under our URL and was killed has left its place, for which the others would wait until its lease
    /// ends: the URL is ours now, so it is gone. If it is not, because two were told the same URL, the fence holds, and this is done
    /// once: they do not end each other for ever.
    async fn end_predecessors(&self) {
        let patience = self.patience(self.lease);
        let election = self.etcd.key("election/");
        let standing = self.etcd.endpoints().call(patience, |mut client| {
            let (election, options) = (election.clone(), GetOptions::new().with_prefix());
            async move { client.get(election, Some(options)).await }
        });
        // What cannot be found out, or ended, ends with its lease.
        let Ok(standing) = standing.await else { return };
        let is_ours = |kv: &&etcd_client::KeyValue| {
            serde_json::from_slice(kv.value()).is_ok_and(|candidate: Candidate| candidate.url == self.url)
        };
        for left in standing.kvs().iter().filter(is_ours) {
            self.revoke(left.lease(), patience).await.ok();
        }
    }

    /// Time for one request of which a lease of this length depends, and for all attempts at it.
    fn patience(&self, left: Duration) -> Patience {
        let all = (self.lease / 2).min(left);
        Patience { attempt: (self.lease / 6).min(all), all }
    }

    /// Takes a lease, and puts a key under it; what is left of an earlier one goes first.
    async fn enter(&self, left: Option<i64>) -> Result<Place, Trouble> {
        let patience = self.patience(self.lease);
        if let Some(lease) = left {
            match self.revoke(lease, patience).await {
                Ok(()) | Err(Trouble::NoLease) => {}
                Err(trouble) => return Err(trouble),
            }
        }
        let seconds = self.lease.as_secs().max(1).cast_signed();
        let began = boot_now();
        let grant = |mut client: etcd_client::Client| async move { client.lease_grant(seconds, None).await };
        let granted = self.etcd.endpoints().call(patience, grant).await?;
        let span = Duration::from_secs(granted.ttl().max(1).cast_unsigned());
        let lease = granted.id();
        let key: Arc<str> = self.etcd.key(&format!("election/{lease:016x}")).into();
        let value = serde_json::to_vec(&Candidate { url: self.url.clone() }).unwrap_or_default();
        let put = || TxnOp::put(key.as_bytes(), value.clone(), Some(PutOptions::new().with_lease(lease)));
        let get = || TxnOp::get(key.as_bytes(), None);
        let absent = || Compare::create_revision(key.as_bytes(), CompareOp::Equal, 0);
        // Made again where its answer was lost, it finds the key.
        let txn = || Txn::new().when([absent()]).and_then([put(), get()]).or_else([get()]);
        let entered = self
            .etcd
            .endpoints()
            .call(patience, |mut client| {
                let txn = txn();
                async move { client.txn(txn).await }
            })
            .await?;
        let found = entered.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(get) => get.kvs().first().map(etcd_client::KeyValue::create_revision),
            TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
        });
        let create_revision =
            found.ok_or_else(|| Trouble::Passing("etcd does not show our key".to_owned()))?;
        let until = began + usable(span);
        Ok(Place { lease, key, create_revision, span, until, renew_at: began + span / RENEWALS })
    }

    /// Keeps the place: waits until it is the first, then leads until the term ends. Returns when the place is lost or
    /// to be given up.
    async fn hold(&mut self, place: &mut Place) {
        let mut term: Option<Term> = None;
        loop {
            let asked = *self.stopped.borrow_and_update();
            let over = asked == Stop::Stand
                || term.as_ref().is_some_and(|term| asked == Stop::Term(term.fence))
                || boot_now() >= place.until;
            if over || !self.turn(place, &mut term).await {
                break;
            }
            let interval = if term.is_some() { place.span / RENEWALS } else { LOOK_INTERVAL };
            let left = place.until.saturating_sub(boot_now());
            tokio::select! {
                () = sleep(interval.min(left)) => {}
                _ = self.stopped.changed() => {}
            }
        }
        if let Some(term) = term {
            term.end();
            self.report(Err(&Trouble::Passing("this coordinator has just stopped leading".to_owned())));
        }
    }

    /// Renews the lease if it is time, and looks who leads. False once the place is lost.
    async fn turn(&mut self, place: &mut Place, term: &mut Option<Term>) -> bool {
        let now = boot_now();
        if now >= place.renew_at {
            let left = place.until.saturating_sub(now);
            match self.renew(place, left).await {
                Ok(()) => {
                    if let Some(term) = term {
                        term.renewed(place.until);
                    }
                }
                Err(Trouble::NoLease) => return false,
                Err(trouble) => {
                    // A leader leads on until its time is up.
                    if term.is_none() {
                        self.report(Err(&trouble));
                    }
                    return true;
                }
            }
        }
        let left = place.until.saturating_sub(boot_now());
        let look = match self.look(left).await {
            Ok(look) => look,
            Err(trouble) => {
                if term.is_none() {
                    self.report(Err(&trouble));
                }
                return true;
            }
        };
        let first = look.candidates.first().is_some_and(|(revision, _)| *revision == place.create_revision);
        let stands = look.candidates.iter().any(|(revision, _)| *revision == place.create_revision);
        match (stands, first, &term) {
            (false, _, _) | (true, false, Some(_)) => return false,
            (true, true, Some(_)) => {}
            (true, false, None) => self.report(Ok(&look)),
            (true, true, None) => match self.begin(place, &look).await {
                Ok(begun) => {
                    self.standing.send_replace(Standing::Leading(begun.clone()));
                    *term = Some(begun);
                }
                Err(Trouble::Lasting(why)) => {
                    self.standing.send_replace(Standing::Failed(why));
                    return false;
                }
                Err(trouble) => self.report(Err(&trouble)),
            },
        }
        true
    }

    async fn renew(&self, place: &mut Place, left: Duration) -> Result<(), Trouble> {
        let lease = place.lease;
        let keep = |mut client: etcd_client::Client| async move {
            let asked = boot_now();
            client.lease_keep_alive(lease).await?;
            Ok(asked)
        };
        let asked = self.etcd.endpoints().call(self.patience(left), keep).await?;
        place.until = asked + usable(place.span);
        place.renew_at = asked + place.span / RENEWALS;
        Ok(())
    }

    async fn look(&self, left: Duration) -> Result<Look, Trouble> {
        let [election, head, place] = ["election/", "head", "place"].map(|key| self.etcd.key(key));
        // In one transaction, and answered by a quorum.
        let answer = self
            .etcd
            .endpoints()
            .call(self.patience(left), |mut client| {
                let all = TxnOp::get(election.clone(), Some(GetOptions::new().with_prefix()));
                let one = |key: &String| TxnOp::get(key.clone(), None);
                let txn = Txn::new().and_then([all, one(&head), one(&place)]);
                async move { client.txn(txn).await }
            })
            .await?;
        let [standing, head, place] = gets(&answer);
        let mut candidates: Vec<(i64, String)> = standing
            .iter()
            .map(|kv| {
                let candidate: Option<Candidate> = serde_json::from_slice(kv.value()).ok();
                (kv.create_revision(), candidate.map(|candidate| candidate.url).unwrap_or_default())
            })
            .collect();
        candidates.sort_unstable();
        let head = head.first().map(|kv| Head::read(kv.value())).transpose()?;
        let place = place.first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned());
        Ok(Look { candidates, head: head.unwrap_or_default(), place })
    }

    /// Begins a term: numbers it, in a transaction that only the leader's can be.
    async fn begin(&self, place: &Place, look: &Look) -> Result<Term, Trouble> {
        let [fence_key, head_key, place_key] = ["fence", "head", "place"].map(|key| self.etcd.key(key));
        let patience = self.patience(place.until.saturating_sub(boot_now()));
        let read = self
            .etcd
            .endpoints()
            .call(patience, |mut client| {
                let ops = [&fence_key, &head_key, &place_key].map(|key| TxnOp::get(key.clone(), None));
                async move { client.txn(Txn::new().and_then(ops)).await }
            })
            .await?;
        let [fence, head_seen, made] = gets(&read);
        let number = |kv: &etcd_client::KeyValue| {
            let text = kv.value_str().ok().and_then(|text| text.parse::<u64>().ok());
            text.ok_or_else(|| {
                Trouble::Lasting(format!("the key {fence_key} in etcd is damaged; it holds no number"))
            })
        };
        let fence_before = fence.first().map(number).transpose()?.unwrap_or(0);
        let head_before = head_seen.first().map(|kv| Head::read(kv.value())).transpose()?;
        let identity = match made.first() {
            Some(kv) => String::from_utf8_lossy(kv.value()).into_owned(),
            None => format!("{:x}-{:x}", place.lease, place.create_revision),
        };
        let here = |floor: &&Floor| floor.place.as_ref().is_none_or(|place| *place == identity);
        let floor = self.floor.as_ref().filter(here).map_or(0, |floor| floor.fence.0);
        let fence = fence_before.max(floor) + 1;
        let head = Head { fence, commits: head_before.map_or(0, |head| head.commits), attempt: 0 };
        let at = (place.key.clone(), place.create_revision);
        let term = Term::new(Fence(fence), &identity, look.count(), at, head, place.until);
        // Made again where its answer was lost, it finds what it wrote; and it is never carried out later than a commit.
        let head_revision = head_seen.first().map_or(0, etcd_client::KeyValue::mod_revision);
        let begun = self
            .etcd
            .endpoints()
            .call(patience, |mut client| {
                let puts = [
                    TxnOp::put(fence_key.clone(), fence.to_string(), None),
                    TxnOp::put(head_key.clone(), head.to_string(), None),
                    TxnOp::put(place_key.clone(), identity.clone(), None),
                ];
                let follows = Compare::mod_revision(head_key.as_bytes(), CompareOp::Equal, head_revision);
                let look = TxnOp::get(head_key.clone(), None);
                let txn = Txn::new().when([term.condition(), follows]).and_then(puts).or_else([look]);
                async move { client.txn(txn).await }
            })
            .await?;
        let [found] = gets(&begun);
        let ours = found.first().is_some_and(|kv| kv.value() == head.to_string().as_bytes());
        if begun.succeeded() || ours { Ok(term) } else { Err(Trouble::NoLease) }
    }

    /// Gives the place up, so that nobody waits for its lease.
    async fn leave(&self, place: &Place) -> Result<(), Trouble> {
        self.revoke(place.lease, Patience { attempt: RESIGN_MAX / 2, all: RESIGN_MAX }).await
    }

    async fn revoke(&self, lease: i64, patience: Patience) -> Result<(), Trouble> {
        let revoke = |mut client: etcd_client::Client| async move { client.lease_revoke(lease).await };
        self.etcd.endpoints().call(patience, revoke).await.map(|_| ())
    }

    fn report(&self, seen: Result<&Look, &Trouble>) {
        self.standing.send_if_modified(|standing| {
            let before = match standing {
                Standing::Following(view) => Some(view.clone()),
                Standing::Leading(_) | Standing::Failed(_) => None,
            };
            let view = match seen {
                Ok(look) => View {
                    leader: look.candidates.first().map(|(_, url)| url.clone()),
                    candidates: look.count(),
                    trouble: None,
                    place: look.place.clone(),
                    commits: look.head.commits,
                    fence: look.head.fence,
                },
                // Who leads is not known any more; how many stand is remembered.
                Err(trouble) => {
                    let candidates = match standing {
                        Standing::Leading(term) => term.candidates,
                        Standing::Following(_) | Standing::Failed(_) => 0,
                    };
                    let before = before.clone().unwrap_or(View { candidates, ..View::default() });
                    View { leader: None, trouble: Some(trouble.words()), ..before }
                }
            };
            let changed = before.as_ref() != Some(&view);
            *standing = Standing::Following(view);
            changed
        });
    }
}

/// What the gets of a transaction have found, in their order.
pub(super) fn gets<const COUNT: usize>(answer: &TxnResponse) -> [Vec<etcd_client::KeyValue>; COUNT] {
    let mut found = answer.op_responses().into_iter().map(|response| match response {
        TxnOpResponse::Get(mut get) => get.take_kvs(),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => Vec::new(),
    });
    std::array::from_fn(|_| found.next().unwrap_or_default())
}
