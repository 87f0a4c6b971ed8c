//! A run of agents that Muster did not start: who has come, and when a round begins with whom.
//!
//! Like the rest of this crate a pure function of state, input and now; unlike it, nothing is stored. What is lost with
//! the coordinator is said again by the agents when they come back, and until they have had time to, no round begins.

mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::types::{Incarnation, Millis, NodeName};

pub use words::{Hello, Link, Place, Said, Spec, Tell, Tells};

/// An agent whose stream ends without a word has this long to come back. The kernel ends the streams of a process that is
/// killed at once, and a client that lost its connection for any other reason opens another at once.
const LOST_AFTER: Millis = Millis(1_000);
/// Agents of a round that was there before the coordinator was have this long to come back.
const REJOIN_WITHIN: Millis = Millis::from_secs(15);
/// No round begins so soon after the coordinator's start: agents that have lost an earlier one come back first.
const OPENS_AFTER: Millis = Millis::from_secs(3);
/// An agent that waits is told why after the first span, and then at spans that double up to the second.
const TELL: (Millis, Millis) = (Millis(1_000), Millis::from_secs(32));
/// Agents that a reason names.
const NAMED_MAX: usize = 3;

#[derive(Clone, Debug)]
struct Agent {
    node: NodeName,
    /// None for one whose stream has ended.
    link: Option<Link>,
    /// Until when it may come back then.
    until: Millis,
    /// Rank in the round, if it is in it; kept when it enters, so that it keeps its order.
    rank: Option<u32>,
    /// Where it would serve the store, once it has entered, and after how many others it came.
    entered: Option<(SocketAddr, u64)>,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Run {
    spec: Spec,
    opens_at: Millis,
    /// The last round. Its rank is of no one.
    round: Option<Place>,
    /// Rounds so far: they rise over the ends of the run.
    rounds: u64,
    /// The round with which the run ended last, and why.
    closed: Option<(u64, String)>,
    agents: BTreeMap<Incarnation, Agent>,
    /// How many have entered.
    entered: u32,
    /// How many are in the round and have not: their workers run, or stop.
    working: u32,
    /// How many of the round have never come to this coordinator, and until when they may.
    unseen: Option<(u32, Millis)>,
    /// Those that have to come back, by the time until which they can.
    broken: BTreeSet<(Millis, Incarnation)>,
    /// Since when the fewest have entered.
    enough_since: Option<Millis>,
    /// Why the round is over.
    recall: Option<String>,
    /// When those that wait are told next, and after which span again.
    tell: Option<(Millis, Millis)>,
    arrivals: u64,
}

impl Run {
    /// A run that nobody has come to. `started` is when the coordinator did.
    pub fn new(spec: Spec, started: Millis) -> Self {
        Self {
            spec,
            opens_at: started.plus(OPENS_AFTER),
            round: None,
            rounds: 0,
            closed: None,
            agents: BTreeMap::new(),
            entered: 0,
            working: 0,
            unseen: None,
            broken: BTreeSet::new(),
            enough_since: None,
            recall: None,
            tell: None,
            arrivals: 0,
        }
    }

    /// The round that runs, or ran last; its rank is of no one.
    pub fn round(&self) -> Option<Place> {
        self.round
    }

    /// Whether nobody is there.
    pub fn is_empty(&self) -> bool {
        self.agents.is_empty()
    }

    /// An agent comes, or comes back. The error is for its user.
    pub fn join(&mut self, now: Millis, link: Link, hello: Hello) -> Result<Tells, String> {
        let mut tells = Tells::new();
        let Hello { agent: id, node, spec, held, .. } = hello;
        if let (Some((round, failure)), Some(held)) = (&self.closed, held)
            && held.round <= *round
        {
            return Ok(vec![(link, Tell::Closed(failure.clone()))]);
        }
        if self.agents.is_empty() {
            self.spec = spec;
        } else if spec != self.spec {
            let Spec { min, max, last_call } = self.spec;
            return Err(format!(
                "the agents that are here run {min} to {max} nodes with a last call of {} s, and this one wants {} to {} and {} s: \
                 start all with the same --nnodes and --rdzv-conf",
                last_call.0 / 1000,
                spec.min,
                spec.max,
                spec.last_call.0 / 1000
            ));
        }
        if self.agents.contains_key(&id) {
            self.come_back(id, link, held, &mut tells);
        } else {
            let rank = held.and_then(|held| self.adopt(now, held));
            let over = match (held, rank) {
                (Some(_), None) => Some("another round has begun without this agent".to_owned()),
                (_, Some(_)) => self.recall.clone(),
                (None, None) => None,
            };
            tells.extend(over.map(|reason| (link, Tell::Recall(reason))));
            self.working += u32::from(rank.is_some());
            self.agents.insert(id, Agent { node, link: Some(link), until: Millis(0), rank, entered: None });
        }
        self.settle(now, &mut tells);
        Ok(tells)
    }

    /// The rank of an agent that has lost an earlier coordinator, or has been taken for lost: none if the round it was
    /// in is not the last any more.
    fn adopt(&mut self, now: Millis, held: Place) -> Option<u32> {
        if self.round.is_none() && held.round >= self.rounds {
            self.round = Some(held);
            self.unseen = Some((held.world_size, now.plus(REJOIN_WITHIN)));
        }
        self.rounds = self.rounds.max(held.round);
        let current = self.round?;
        let (unseen, until) = self.unseen?;
        if (Place { rank: held.rank, ..current }) != held {
            return None;
        }
        self.unseen = (unseen > 1).then_some((unseen - 1, until));
        Some(held.rank)
    }

    /// A newer stream of an agent that is known.
    fn come_back(&mut self, id: Incarnation, link: Link, held: Option<Place>, tells: &mut Tells) {
        self.step_back(&id);
        let Some(agent) = self.agents.get_mut(&id) else { return };
        if agent.link.replace(link).is_none() {
            self.broken.remove(&(agent.until, id));
        }
        let (Some(rank), Some(round)) = (agent.rank, self.round) else { return };
        if let Some(reason) = &self.recall {
            tells.push((link, Tell::Recall(reason.clone())));
        } else if held.is_none_or(|held| held.round != round.round) {
            // It has not heard of its place.
            tells.push((link, Tell::Place(Place { rank, ..round })));
        }
    }

    /// An agent that had entered has not any more.
    fn step_back(&mut self, id: &Incarnation) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        if agent.entered.take().is_some() {
            self.entered -= 1;
            self.working += u32::from(agent.rank.is_some());
        }
    }

    /// An agent says something on its stream. What it says on an older one does not count.
    pub fn hear(&mut self, now: Millis, id: &Incarnation, link: Link, said: Said) -> Tells {
        let mut tells = Tells::new();
        let Some(agent) = self.agents.get_mut(id).filter(|agent| agent.link == Some(link)) else {
            return tells;
        };
        match said {
            Said::Enter(store) => {
                let (name, member, again) =
                    (agent.node.to_string(), agent.rank.is_some(), agent.entered.is_some());
                agent.entered = Some((store, self.arrivals));
                self.arrivals += 1;
                if !again {
                    self.entered += 1;
                    self.working -= u32::from(member);
                }
                if member {
                    self.recall(format!("{name} starts its workers again"), &mut tells);
                } else if self.has_room() {
                    self.recall(format!("{name} has come"), &mut tells);
                }
            }
            Said::Leave(failure) if agent.rank.is_some() => {
                let failure = if failure.is_empty() { failure } else { format!("{}: {failure}", agent.node) };
                self.remove(id);
                self.close(failure, &mut tells);
            }
            Said::Gone if agent.rank.is_some() => {
                (agent.link, agent.until) = (None, now.plus(LOST_AFTER));
                self.broken.insert((agent.until, id.clone()));
                self.step_back(id);
            }
            // An agent without a place is missed by nobody.
            Said::Leave(_) | Said::Gone => drop(self.remove(id)),
        }
        self.settle(now, &mut tells);
        tells
    }

    /// When [`Self::settle`] has something to do if nothing is heard until then.
    pub fn wake_at(&self) -> Option<Millis> {
        let broken = self.broken.first().map(|(at, _)| *at);
        let unseen = self.unseen.map(|(_, until)| until);
        let opens = (!self.is_held_up() && self.entered >= self.spec.min)
            .then(|| self.opens_at.max(self.last_call_ends()));
        let tell = self.tell.map(|(at, _)| at);
        [broken, unseen, opens, tell].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn settle(&mut self, now: Millis, tells: &mut Tells) {
        while self.broken.first().is_some_and(|(until, _)| *until <= now)
            && let Some((_, id)) = self.broken.pop_first()
        {
            if let Some(agent) = self.remove(&id) {
                self.recall(format!("{} is lost", agent.node), tells);
            }
        }
        if let Some((unseen, _)) = self.unseen.take_if(|(_, until)| *until <= now) {
            self.recall(format!("{unseen} agents have not come back"), tells);
        }
        if self.entered > 0 && self.has_room() {
            self.recall("others have come".to_owned(), tells);
        }
        if self.agents.is_empty() {
            (self.round, self.recall, self.unseen) = (None, None, None);
        }
        let enough = self.entered >= self.spec.min;
        self.enough_since = enough.then(|| self.enough_since.unwrap_or(now));
        if enough && !self.is_held_up() && now >= self.opens_at.max(self.last_call_ends()) {
            self.begin(tells);
        }
        self.tell_why(now, tells);
    }

    /// Whether agents of the last round are still to come: they are let come to an end, however long that takes.
    fn is_held_up(&self) -> bool {
        self.working > 0 || self.unseen.is_some()
    }

    /// Whether those that come find a round that could have more agents.
    fn has_room(&self) -> bool {
        self.round.is_some_and(|round| round.world_size < self.spec.max)
    }

    /// Until when a round that could begin waits for more: it does not once all are there who are known.
    fn last_call_ends(&self) -> Millis {
        if self.round.is_some() || self.entered >= self.spec.max {
            return Millis(0);
        }
        self.enough_since.unwrap_or_default().plus(self.spec.last_call)
    }

    /// Begins a round with those that have entered: first those that were in the last, in their order, then the others
    /// in the order of their addresses; of too many the last to come are left out.
    fn begin(&mut self, tells: &mut Tells) {
        let mut all: Vec<(bool, u32, u64, SocketAddr, Incarnation)> = (self.agents.iter())
            .filter_map(|(id, agent)| {
                let (store, arrival) = agent.entered?;
                Some((agent.rank.is_none(), agent.rank.unwrap_or(0), arrival, store, id.clone()))
            })
            .collect();
        all.sort_unstable();
        all.truncate(self.spec.max as usize);
        all.sort_by_key(|(new, rank, arrival, store, _)| {
            (*new, *rank, new.then_some((store.ip(), *arrival)))
        });
        // Where nobody else could reach it only serves if all are on one machine.
        let store_rank = all.iter().position(|(.., store, _)| !store.ip().is_loopback()).unwrap_or(0);
        self.rounds += 1;
        let round = Place {
            round: self.rounds,
            rank: 0,
            world_size: all.len() as u32,
            store_rank: store_rank as u32,
            store: all[store_rank].3,
        };
        for agent in self.agents.values_mut() {
            agent.rank = None;
        }
        for (rank, (.., id)) in all.into_iter().enumerate() {
            let Some(agent) = self.agents.get_mut(&id) else { continue };
            (agent.rank, agent.entered) = (Some(rank as u32), None);
            tells.extend(agent.link.map(|link| (link, Tell::Place(Place { rank: rank as u32, ..round }))));
        }
        self.entered -= round.world_size;
        self.working = round.world_size;
        (self.round, self.recall, self.enough_since) = (Some(round), None, None);
    }

    /// The round is over: those that work are told so, once.
    fn recall(&mut self, reason: String, tells: &mut Tells) {
        if self.round.is_none() || self.recall.is_some() {
            return;
        }
        let working = self.agents.values().filter(|agent| agent.rank.is_some() && agent.entered.is_none());
        tells.extend(working.filter_map(|agent| Some((agent.link?, Tell::Recall(reason.clone())))));
        self.recall = Some(reason);
    }

    /// The run is over: everybody is told, and whoever comes from now on begins another.
    fn close(&mut self, failure: String, tells: &mut Tells) {
        let told =
            self.agents.values().filter_map(|agent| Some((agent.link?, Tell::Closed(failure.clone()))));
        tells.extend(told);
        self.agents.clear();
        self.broken.clear();
        (self.entered, self.working) = (0, 0);
        self.closed = Some((self.rounds, failure));
    }

    fn remove(&mut self, id: &Incarnation) -> Option<Agent> {
        self.step_back(id);
        let agent = self.agents.remove(id)?;
        self.working -= u32::from(agent.rank.is_some());
        Some(agent)
    }

    fn tell_why(&mut self, now: Millis, tells: &mut Tells) {
        if self.entered == 0 {
            self.tell = None;
            return;
        }
        let (at, span) = *self.tell.get_or_insert((now.plus(TELL.0), TELL.0));
        if now < at {
            return;
        }
        let span = Millis(span.0 * 2).min(TELL.1);
        self.tell = Some((now.plus(span), span));
        let reason = self.why(now);
        let waiting = self.agents.values().filter(|agent| agent.entered.is_some());
        tells.extend(waiting.filter_map(|agent| Some((agent.link?, Tell::Waiting(reason.clone())))));
    }

    /// Why no round begins.
    fn why(&self, now: Millis) -> String {
        let Spec { min, max, .. } = self.spec;
        if self.working > 0 && self.recall.is_none() {
            return format!("a round of {} agents runs, which is as many as it takes", self.working);
        }
        if self.working > 0 {
            let working =
                self.agents.values().filter(|agent| agent.rank.is_some() && agent.entered.is_none());
            let named: Vec<&str> = working.take(NAMED_MAX).map(|agent| agent.node.as_str()).collect();
            let more = self.working as usize - named.len();
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            return format!("{}{more} still stop their workers", named.join(", "));
        }
        if let Some((unseen, _)) = self.unseen {
            return format!("{unseen} agents have not come back since the coordinator was started");
        }
        if self.entered < min {
            return format!("{} of {min} agents have come", self.entered);
        }
        let left = self.last_call_ends().max(self.opens_at).since(now).0.div_ceil(1000);
        format!("{} agents have come, and up to {max} may within {left} s", self.entered)
    }
}
