//! The coordinator's process: its driver, its store and its clock, around the real core.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use muster_core::bugs::{Bug, planted};
use muster_core::types::{Millis, NodeName, Session};
use muster_core::{
    Config, Core, Effects, Event, Heard, Input, Job, Meta, Node, Pulse, Refusal, Reply, Snapshot, ToNode,
    Write,
};

/// The lease and the heartbeats of the simulated cluster, in the proportion of the defaults.
pub const LEASE: u64 = 30_000;
pub const HEARTBEAT: u64 = 3_000;
/// As in the driver: the shortest pause that a process takes note of.
const STALL: u64 = LEASE / 16;

/// What is asked of the coordinator.
#[derive(Clone, Debug)]
pub enum Asked {
    /// On a connection of a node.
    Node {
        conn: u64,
        node: NodeName,
        message: crate::messages::Up,
    },
    /// By a user; the number says who waits for the answer.
    User {
        caller: u64,
        input: Input,
    },
    Tick,
}

/// What leaves once the writes before it are durable.
#[derive(Clone, Debug)]
pub enum Leaves {
    ToNode(Session, ToNode),
    ToConn(u64, crate::messages::Down),
    Answer(u64, Result<Reply, Refusal>),
    /// What whoever watches sees of a job.
    Changed(Box<Job>),
}

/// One durable record each, as the store keeps it.
#[derive(Clone, Debug, Default)]
pub struct Store {
    meta: Option<Meta>,
    jobs: BTreeMap<String, Job>,
    nodes: BTreeMap<String, Node>,
}

impl Store {
    fn write(&mut self, writes: Vec<Write>) {
        for write in writes {
            match write {
                Write::Meta(meta) => self.meta = Some(meta),
                Write::Job(job) => _ = self.jobs.insert(job.id.to_string(), *job),
                Write::DeleteJob(id) => _ = self.jobs.remove(id.as_str()),
                Write::Node(node) => _ = self.nodes.insert(node.name.to_string(), *node),
                Write::DeleteNode(name) => _ = self.nodes.remove(name.as_str()),
                // Nobody is asked here who may do what.
                Write::Token(_) | Write::DeleteToken(_) | Write::Barred(_) | Write::DeleteBarred(_) => {}
            }
        }
    }

    /// What a start reads: through JSON, as from the disk.
    fn snapshot(&self) -> Snapshot {
        fn reread<T: serde::Serialize + serde::de::DeserializeOwned>(record: &T) -> Option<T> {
            serde_json::from_str(&serde_json::to_string(record).ok()?).ok()
        }
        Snapshot {
            meta: self.meta,
            jobs: self.jobs.values().filter_map(reread).collect(),
            nodes: self.nodes.values().filter_map(reread).collect(),
            tokens: Vec::new(),
            barred: Vec::new(),
        }
    }
}

/// The process, while it lives.
#[derive(Debug)]
pub struct Process {
    pub core: Core,
    /// Unix time at its start, and true time then.
    base: u64,
    pub started: u64,
    /// For how long it did not run, of which it has not taken note yet.
    pub away: u64,
    /// The group being written, and what waits for it.
    pub writing: Option<(Vec<Write>, Vec<Leaves>)>,
    filling: (Vec<Write>, Vec<Leaves>),
    /// Sessions and the connections they run on.
    pub sessions: BTreeMap<Session, u64>,
    /// The heartbeats of all sessions that there were.
    pulses: BTreeMap<Session, Arc<Pulse>>,
    pub conns: BTreeMap<u64, (NodeName, Option<Session>)>,
}

/// The machine it runs on.
#[derive(Debug, Default)]
pub struct Coordinator {
    pub process: Option<Process>,
    pub store: Store,
    /// How many pauses hold it, and since when.
    pub paused: u32,
    pub paused_since: u64,
    pub inbox: VecDeque<Asked>,
    /// How far its wall clock is off.
    pub wall: i64,
    pub slow_disk: u32,
    pub starts: u64,
    /// When it last was in trouble, in true time.
    pub troubled: u64,
}

impl Coordinator {
    pub fn start(&mut self, now: u64) {
        let base = 1_700_000_000_000_u64.saturating_add_signed(self.wall) + now;
        let config = Config {
            lease: Millis(LEASE),
            ended_max: 10_000,
            grow_delay: Millis(1_000),
            ..Config::default()
        };
        self.starts += 1;
        let (core, effects) = Core::load(Millis(base), config, 42, self.store.snapshot());
        self.process = Some(Process {
            core,
            base,
            started: now,
            away: 0,
            writing: None,
            filling: (Vec::new(), Vec::new()),
            sessions: BTreeMap::new(),
            pulses: BTreeMap::new(),
            conns: BTreeMap::new(),
        });
        if let Some(process) = &mut self.process {
            process.take(effects, None);
        }
    }

    /// Dies. What was being written may have reached the disk, although nobody was told.
    pub fn kill(&mut self, reached: bool) {
        if let Some(process) = self.process.take()
            && let (true, Some((writes, _))) = (reached, process.writing)
        {
            self.store.write(writes);
        }
        self.inbox.clear();
    }

    /// The group that was being written is durable. Gives what may leave now.
    pub fn written(&mut self) -> Vec<Leaves> {
        let done = self.process.as_mut().and_then(|process| process.writing.take());
        let (writes, leaves) = done.unwrap_or_default();
        self.store.write(writes);
        leaves
    }
}

impl Process {
    /// The clock of the driver: the wall's at the start, then monotonic.
    pub fn clock(&self, now: u64, wall: i64) -> Millis {
        if planted(Bug::LeaseByWallClock) {
            return Millis(1_700_000_000_000_u64.saturating_add_signed(wall) + now);
        }
        Millis(self.base + (now - self.started))
    }

    /// The true time of a deadline.
    pub fn when(&self, deadline: Millis, wall: i64) -> u64 {
        if planted(Bug::LeaseByWallClock) {
            return deadline.since(Millis(1_700_000_000_000_u64.saturating_add_signed(wall))).0;
        }
        self.started + deadline.since(Millis(self.base)).0
    }

    /// The driver runs; it may have been away.
    pub fn wake(&mut self, now: u64, wall: i64) {
        if std::mem::take(&mut self.away) > STALL {
            let effects = self.core.step(self.clock(now, wall), Input::Stalled);
            self.take(effects, None);
        }
    }

    /// One step of the core, which knows the heartbeats that bear on it. Gives its answer, where
    /// the driver itself needs it.
    pub fn step(&mut self, now: u64, wall: i64, input: Input, caller: Option<u64>) -> Stepped {
        let clock = self.clock(now, wall);
        let node = match &input {
            Input::Join(join) => Some(join.name.clone()),
            Input::Hello { node, .. } | Input::Disconnected { node, .. } => Some(node.clone()),
            _ => None,
        };
        let older = node.as_ref().and_then(|node| self.session_of(node));
        let is_over = matches!(&input, Input::Disconnected { session, .. } if older == Some(*session));
        let last = older.and_then(|session| {
            let pulse = self.pulses.get(&session)?;
            let at = if is_over { pulse.end() } else { pulse.last() };
            Some(Input::Heartbeats(vec![Heard { node: node.clone()?, session, at: at? }]))
        });
        let due = self.core.heard_since(clock, |_, session| self.pulses.get(&session).cloned());
        let mut acted = false;
        for heard in [due, last].into_iter().flatten() {
            acted |= self.advance(clock, heard, None).acted;
        }
        let stepped = self.advance(clock, input, caller);
        if let (Some(node), Some(older)) = (node, older)
            && self.session_of(&node) != Some(older)
            && let Some(pulse) = self.pulses.get(&older)
        {
            pulse.end();
        }
        Stepped { acted: acted | stepped.acted, ..stepped }
    }

    /// A heartbeat, which costs the core no step. Whether it is acknowledged.
    pub fn beats(&mut self, now: u64, wall: i64, session: Session) -> bool {
        let clock = self.clock(now, wall);
        self.pulses.entry(session).or_default().beat(clock)
    }

    fn session_of(&self, node: &NodeName) -> Option<Session> {
        self.core.node(node.as_str()).ok()?.session
    }

    fn advance(&mut self, clock: Millis, input: Input, caller: Option<u64>) -> Stepped {
        let mut effects = self.core.step(clock, input);
        let writes = !effects.writes.is_empty();
        let changed: Vec<Job> = effects
            .events
            .iter()
            .filter_map(|event| match event {
                Event::Job(id) => self.core.job(id.as_str()).ok().cloned(),
                Event::JobDetail(_) | Event::Node(_) | Event::JobDeleted(_) => None,
            })
            .collect();
        let acted = !effects.events.is_empty();
        let reply = if caller.is_none() { effects.reply.take() } else { None };
        self.take(effects, caller);
        self.filling.1.extend(changed.into_iter().map(|job| Leaves::Changed(Box::new(job))));
        Stepped { writes, acted, reply }
    }

    /// Something that the driver says itself, in order with the rest.
    pub fn say(&mut self, what: Leaves) {
        self.filling.1.push(what);
    }

    fn take(&mut self, effects: Effects, caller: Option<u64>) {
        self.filling.0.extend(effects.writes);
        self.filling
            .1
            .extend(effects.sends.into_iter().map(|(_, session, what)| Leaves::ToNode(session, what)));
        if let (Some(caller), Some(reply)) = (caller, effects.reply) {
            self.filling.1.push(Leaves::Answer(caller, reply));
        }
    }

    /// What may leave at once; and whether a group is to be written now.
    pub fn flush(&mut self) -> (Vec<Leaves>, bool) {
        if planted(Bug::AcknowledgeBeforeCommit) {
            let leaves = std::mem::take(&mut self.filling.1);
            let begins = self.writing.is_none() && !self.filling.0.is_empty();
            if begins {
                self.writing = Some((std::mem::take(&mut self.filling.0), Vec::new()));
            }
            return (leaves, begins);
        }
        if self.writing.is_some() {
            return (Vec::new(), false);
        }
        if self.filling.0.is_empty() {
            return (std::mem::take(&mut self.filling.1), false);
        }
        self.writing = Some(std::mem::take(&mut self.filling));
        (Vec::new(), true)
    }
}

/// What a step leaves for the driver and the record.
#[derive(Debug)]
pub struct Stepped {
    pub writes: bool,
    /// Something has changed that others see.
    pub acted: bool,
    pub reply: Option<Result<Reply, Refusal>>,
}
