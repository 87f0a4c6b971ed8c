//! Which coordinator is tried next: the leader, where one that does not lead has named it; else each in turn.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt;
use tonic::transport::Endpoint;

use super::connection::is_socket;
use super::{BACKOFF, CONNECT_MAX};
use crate::Error;
use crate::trust::{Trust, may_send};

/// Coordinators named one after the other that are followed at once. Beyond it two of them send us back and forth.
const HOPS_MAX: u32 = 3;

/// A coordinator to be tried.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// Its place among those that were configured; none if it was named by another one.
    pub index: Option<usize>,
    pub url: String,
    pub endpoint: Endpoint,
}

/// The coordinators, and where we are among them.
#[derive(Debug)]
pub(super) struct Route {
    trust: Trust,
    all: Vec<Target>,
    next: usize,
    /// Tried since the last whole pause.
    tried: usize,
    named: Option<Target>,
    /// Tried since then because they were named. One that was killed goes on being named for a lease.
    visited: BTreeSet<String>,
    hops: u32,
    pause: Duration,
}

impl Route {
    /// These, in this order.
    pub fn new(urls: &[String], trust: &Trust) -> Result<Self, Error> {
        let target = |(index, url): (usize, &String)| {
            Ok(Target { index: Some(index), url: url.clone(), endpoint: endpoint(url, trust)? })
        };
        let all = urls.iter().enumerate().map(target).collect::<Result<Vec<_>, Error>>()?;
        if all.is_empty() {
            return Err(Error::Url {
                url: String::new(),
                why: "no coordinator was named; one looks like http://10.0.0.1:7070".to_owned(),
            });
        }
        Ok(Self {
            trust: trust.clone(),
            all,
            next: 0,
            tried: 0,
            named: None,
            visited: BTreeSet::new(),
            hops: 0,
            pause: BACKOFF.0,
        })
    }

    /// The one to try now.
    pub fn next(&mut self) -> Target {
        if let Some(named) = self.named.take() {
            return named;
        }
        let target = self.all[self.next % self.all.len()].clone();
        self.next = (self.next + 1) % self.all.len();
        self.tried += 1;
        target
    }

    /// Its endpoint, with what is shown there now.
    pub fn endpoint(&self, target: &Target) -> Option<Endpoint> {
        endpoint(&target.url, &self.trust).ok()
    }

    /// A coordinator that does not lead says that this one does.
    pub fn follow(&mut self, from: &Target, leader: &str) {
        if leader.is_empty()
            || !may_send(&from.url, leader)
            || self.hops >= HOPS_MAX
            || !self.visited.insert(leader.to_owned())
        {
            return;
        }
        let known =
            self.all.iter().find(|target| target.url.trim_end_matches('/') == leader.trim_end_matches('/'));
        let named = known.cloned().or_else(|| {
            let endpoint = endpoint(leader, &self.trust).ok()?;
            Some(Target { index: None, url: leader.to_owned(), endpoint })
        });
        self.named = named;
        self.hops += 1;
    }

    /// A session with it has broken. It may hang: the others are asked first, even if they name it.
    pub fn lost(&mut self, target: &Target) {
        self.visited.insert(target.url.clone());
        if let Some(index) = target.index.filter(|_| self.all.len() > 1) {
            self.next = (index + 1) % self.all.len();
            self.tried = 0;
        }
    }

    /// A session that lasted was a success: the next attempt is quick.
    pub fn succeeded(&mut self) {
        self.pause = BACKOFF.0;
        self.tried = 0;
        self.visited.clear();
    }

    /// How long to wait before the next attempt. `most` is the longest wait that the ranks can live with.
    pub fn wait(&mut self, most: Duration) -> Duration {
        if self.named.is_some() {
            return Duration::ZERO;
        }
        self.hops = 0;
        // All are tried before there is a whole pause: one of them may be there.
        if self.tried < self.all.len() {
            return rand::rng().random_range(BACKOFF.0 / 4..=BACKOFF.0 / 2);
        }
        self.tried = 0;
        self.visited.clear();
        let jittered = rand::rng().random_range(BACKOFF.0 / 2..=self.pause);
        self.pause = (self.pause * 2).min(BACKOFF.1).min(most.max(BACKOFF.0));
        jittered
    }
}

fn endpoint(url: &str, trust: &Trust) -> Result<Endpoint, Error> {
    let endpoint = trust.endpoint(url).map_err(|why| Error::Url { url: url.to_owned(), why })?;
    // No time counts for a socket.
    Ok(if is_socket(&endpoint) { endpoint } else { endpoint.connect_timeout(CONNECT_MAX) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(urls: &[&str]) -> Result<Route, Error> {
        Route::new(&urls.iter().copied().map(str::to_owned).collect::<Vec<_>>(), &Trust::default())
    }

    #[test]
    fn urls_that_cannot_work_are_refused_in_words() {
        for (url, ok) in [
            ("http://10.0.0.1:7070", true),
            ("http://[::1]:7070", true),
            ("10.0.0.1:7070", false),
            ("https://10.0.0.1:7070", false),
            ("", false),
        ] {
            assert_eq!(route(&[url]).is_ok(), ok, "{url}");
        }
        assert!(route(&[]).is_err());
    }

    #[test]
    fn the_others_are_asked_before_one_that_was_lost() {
        let mut route = route(&["http://a:1", "http://b:1", "http://c:1"]).unwrap();
        let lost = route.next();
        route.succeeded();
        route.lost(&lost);
        let asked: Vec<String> = (0..4)
            .map(|_| {
                let target = route.next();
                route.follow(&target, "http://a:1");
                target.url
            })
            .collect();
        assert_eq!(asked, ["http://b:1", "http://c:1", "http://a:1", "http://b:1"]);
    }

    #[test]
    fn each_in_turn_and_the_leader_at_once() {
        let mut route = route(&["http://a:1", "http://b:1", "http://c:1"]).unwrap();
        let most = Duration::from_secs(1);
        let mut tried = |leader: &str| {
            let target = route.next();
            route.follow(&target, leader);
            (target.url, route.wait(most).is_zero())
        };
        let url = |name: &str| format!("http://{name}:1");
        assert_eq!(tried(""), (url("a"), false));
        assert_eq!(tried("http://a:1/"), (url("b"), true));
        assert_eq!(tried(""), (url("a"), false), "as it was named");
        assert_eq!(tried("http://a:1/"), (url("c"), false), "each has its turn, and that one was tried");
        assert_eq!(tried("http://elsewhere:1"), (url("a"), true));
        assert_eq!(tried("no url"), (url("elsewhere"), false), "what is named may be nonsense");
        // Those that go on naming others are not followed for ever.
        let hops = (0..10).take_while(|port| tried(&format!("http://d:{port}")).1).count();
        assert_eq!(hops, HOPS_MAX as usize);
    }
}
