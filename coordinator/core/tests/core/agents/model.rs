//! Agents as a client of the API plays them, and a run that they meet at.

use std::collections::BTreeMap;

use muster_core::agents::{Hello, Link, Place, Run, Said, Spec, Tell, Tells};
use muster_core::types::{Incarnation, Millis, NodeName, RequestId};

/// What an agent knows, as a client of the API keeps it.
#[derive(Default)]
pub struct Client {
    /// Numbers the agents that have been at this place, one after the other.
    life: u32,
    pub link: Option<Link>,
    pub held: Option<Place>,
    pub entering: bool,
    pub recalled: bool,
    pub closed: Option<String>,
    pub reason: String,
}

/// A run, its agents and what is on its way to them.
pub struct World {
    pub run: Run,
    pub now: Millis,
    pub spec: Spec,
    links: Link,
    ports: u16,
    pub clients: Vec<Client>,
    /// Starts of the coordinator: nobody may be left who knows of the rounds before.
    starts: u64,
    /// Every round that began since each of them: who has which rank.
    rounds: BTreeMap<(u64, u64), BTreeMap<u32, String>>,
}

pub fn spec(min: u32, max: u32, last_call: u64) -> Spec {
    Spec { min, max, last_call: Millis(last_call) }
}

impl World {
    pub fn new(spec: Spec, clients: usize) -> Self {
        let now = Millis(1_000_000);
        let clients = (0..clients).map(|_| Client::default()).collect();
        Self {
            run: Run::new(spec, Millis(0)),
            now,
            spec,
            links: 0,
            ports: 1000,
            clients,
            starts: 1,
            rounds: BTreeMap::new(),
        }
    }

    pub fn id(&self, at: usize) -> Incarnation {
        Incarnation::new(format!("a{at}-{}", self.clients[at].life)).unwrap()
    }

    pub fn take(&mut self, tells: Tells) {
        for (link, tell) in tells {
            let Some(at) = self.clients.iter().position(|client| client.link == Some(link)) else { continue };
            let id = self.id(at).to_string();
            let client = &mut self.clients[at];
            match tell {
                Tell::Waiting(reason) => client.reason = reason,
                Tell::Place(place) => {
                    assert!(
                        place.rank < place.world_size && place.store_rank < place.world_size,
                        "{place:?}"
                    );
                    let taken = self
                        .rounds
                        .entry((self.starts, place.round))
                        .or_default()
                        .insert(place.rank, id.clone());
                    assert!(taken.is_none_or(|before| before == id), "rank {} of two", place.rank);
                    (client.held, client.entering, client.recalled) = (Some(place), false, false);
                }
                Tell::Recall(reason) => (client.recalled, client.reason) = (true, reason),
                Tell::Closed(failure) => {
                    (client.closed, client.held, client.link) = (Some(failure), None, None);
                }
            }
        }
    }

    pub fn connect(&mut self, at: usize) {
        if self.clients[at].closed.is_some() {
            return;
        }
        self.links += 1;
        let agent = self.id(at);
        let client = &mut self.clients[at];
        client.link = Some(self.links);
        let hello = Hello {
            run: RequestId::new("r").unwrap(),
            agent,
            node: NodeName::new(format!("n{at}")).unwrap(),
            spec: self.spec,
            held: client.held,
        };
        let tells = self.run.join(self.now, self.links, hello).unwrap();
        self.take(tells);
        if self.clients[at].entering {
            self.enter(at);
        }
    }

    pub fn say(&mut self, at: usize, said: Said) {
        let Some(link) = self.clients[at].link else { return };
        let tells = self.run.hear(self.now, &self.id(at), link, said);
        self.take(tells);
    }

    pub fn enter(&mut self, at: usize) {
        let client = &mut self.clients[at];
        (client.held, client.entering, client.recalled) = (None, true, false);
        // As the kernel does, so soon: no port is given twice.
        self.ports += 1;
        self.say(at, Said::Enter(format!("10.0.0.{}:{}", 100 - at, self.ports).parse().unwrap()));
    }

    pub fn come(&mut self, at: usize) {
        self.connect(at);
        self.enter(at);
    }

    pub fn cut(&mut self, at: usize) {
        self.say(at, Said::Gone);
        self.clients[at].link = None;
    }

    pub fn kill(&mut self, at: usize) {
        self.cut(at);
        let life = self.clients[at].life + 1;
        self.clients[at] = Client { life, ..Client::default() };
    }

    pub fn pass(&mut self, span: u64) {
        let until = self.now.plus(Millis(span));
        while let Some(at) = self.run.wake_at().filter(|at| *at <= until) {
            self.now = at.max(self.now.plus(Millis(1)));
            let mut tells = Tells::new();
            self.run.settle(self.now, &mut tells);
            self.take(tells);
        }
        self.now = self.now.max(until);
    }

    /// Everybody who was called back goes.
    pub fn obey(&mut self) {
        for at in 0..self.clients.len() {
            if self.clients[at].recalled {
                self.enter(at);
            }
        }
    }

    pub fn restart_coordinator(&mut self) {
        self.run = Run::new(self.spec, self.now);
        self.starts += 1;
        self.clients.iter_mut().for_each(|client| client.link = None);
    }

    /// `0 of 2` for each, or what else it is at.
    pub fn places(&self) -> Vec<String> {
        let place = |client: &Client| match client.held {
            Some(held) if !client.recalled => format!("{}/{}", held.rank, held.world_size),
            Some(_) => "recalled".to_owned(),
            None if client.entering => "waits".to_owned(),
            None => "-".to_owned(),
        };
        self.clients.iter().map(place).collect()
    }
}
