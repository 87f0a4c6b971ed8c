//! The virtual clock, the queue of what is to come, and the coordinator at its place in it.

use std::collections::BTreeMap;

use muster_core::types::{GangId, Millis, Rank};
use muster_core::{Input, Reply, ToNode};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::coordinator::{Asked, Coordinator, Leaves};
use crate::machine::Machine;
use crate::messages::{Down, Up};
use crate::schedule::{Entry, Wanted};
use crate::truth::Truth;

/// Events of one history: a hundred times what an ordinary one has. A history with more goes round in circles.
const STEPS_MAX: u64 = 3_000_000;

/// Something that is to come.
#[derive(Clone, Debug)]
pub enum Event {
    /// An entry of the schedule.
    Inject(usize),
    /// The end of a fault.
    Ends(usize),
    /// A user tries once more to have an answer.
    Retry(usize),
    ToCoordinator {
        machine: usize,
        conn: u64,
        message: Up,
        tries: u32,
    },
    ToMachine {
        machine: usize,
        conn: u64,
        message: Down,
        tries: u32,
    },
    CoordinatorDue,
    Written {
        start: u64,
    },
    DaemonDue {
        machine: usize,
    },
    /// The session of a daemon does what is next.
    Session {
        machine: usize,
        daemon: u32,
        conn: u64,
        what: Turn,
    },
    StartDaemon {
        machine: usize,
    },
    Prepared {
        machine: usize,
        gang: GangId,
    },
    ShimDue {
        machine: usize,
        pid: i32,
    },
    RankEnds {
        machine: usize,
        gang: GangId,
        rank: Rank,
        code: Option<i32>,
        signal: Option<i32>,
    },
    /// Ten seconds after SIGKILL.
    StillHeld {
        machine: usize,
        gang: GangId,
    },
    /// The kernel lets go.
    LetsGo {
        machine: usize,
        gang: GangId,
    },
    Quiet {
        machine: usize,
        gang: GangId,
        quiet: bool,
    },
}

/// What a session does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Connect,
    /// No answer came within the patience.
    Unanswered,
    Beat,
}

/// A submission and what became of it.
#[derive(Clone, Debug)]
pub struct Submission {
    pub request: String,
    pub wanted: Wanted,
    pub job: Option<muster_core::types::JobId>,
}

/// The cluster.
#[derive(Debug)]
pub struct World {
    pub now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    pub rng: ChaCha8Rng,
    pub hash: u64,
    pub steps: u64,
    pub trace: bool,
    pub coordinator: Coordinator,
    pub machines: Vec<Machine>,
    pub truth: Truth,
    pub schedule: Vec<Entry>,
    pub submissions: Vec<Submission>,
    pub conns: u64,
    /// When the last message of a connection arrives, in each direction: they arrive in order.
    pub arrivals: BTreeMap<(u64, bool), u64>,
    /// How many messages of a connection are held up, each way.
    pub held: BTreeMap<(u64, bool), u32>,
    pub slow_network: u32,
    /// When the network last was slow.
    pub slowed: u64,
    coordinator_due: Option<u64>,
    /// Faults are over: programs end well.
    pub healing: bool,
    pub faults: u64,
}

impl World {
    pub fn new(seed: u64, schedule: Vec<Entry>, trace: bool) -> Self {
        Self {
            now: 0,
            queue: BTreeMap::new(),
            queued: 0,
            rng: ChaCha8Rng::seed_from_u64(seed),
            hash: 0xcbf2_9ce4_8422_2325,
            steps: 0,
            trace,
            coordinator: Coordinator::default(),
            machines: Vec::new(),
            truth: Truth::default(),
            schedule,
            submissions: Vec::new(),
            conns: 0,
            arrivals: BTreeMap::new(),
            held: BTreeMap::new(),
            slow_network: 0,
            slowed: 0,
            coordinator_due: None,
            healing: false,
            faults: 0,
        }
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((at.max(self.now), self.queued), event);
    }

    pub fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now + ms, event);
    }

    /// A random span up to this.
    pub fn up_to(&mut self, ms: u64) -> u64 {
        self.rng.random_range(0..=ms)
    }

    /// Runs until then, or until something is violated.
    pub fn run_until(&mut self, end: u64) {
        while self.truth.violation.is_none() {
            let Some((&(at, _), _)) = self.queue.first_key_value() else { break };
            if at > end {
                break;
            }
            let Some((_, event)) = self.queue.pop_first() else { break };
            self.now = at;
            self.steps += 1;
            if self.steps > STEPS_MAX {
                self.truth.violate("it does not come to rest: more happens than the time has room for");
            }
            self.note(&event);
            self.happen(event);
        }
        if self.truth.violation.is_none() {
            self.now = self.now.max(end);
        }
    }

    fn note(&mut self, event: &Event) {
        let mut hash = self.hash;
        let mut add = |value: u64| {
            for byte in value.to_le_bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        add(self.now);
        add(match event {
            Event::Inject(index) | Event::Ends(index) | Event::Retry(index) => 1 + ((*index as u64) << 8),
            Event::ToCoordinator { conn, .. } => 2 + (conn << 8),
            Event::ToMachine { conn, .. } => 3 + (conn << 8),
            Event::CoordinatorDue => 4,
            Event::Written { start } => 5 + (start << 8),
            Event::DaemonDue { machine } | Event::StartDaemon { machine } => 6 + ((*machine as u64) << 8),
            Event::Session { conn, .. } => 7 + (conn << 8),
            Event::Prepared { gang, .. }
            | Event::StillHeld { gang, .. }
            | Event::LetsGo { gang, .. }
            | Event::Quiet { gang, .. } => 8 + (u64::from(gang.generation.0) << 8),
            Event::ShimDue { pid, .. } => 9 + ((*pid as u64) << 8),
            Event::RankEnds { rank, .. } => 10 + (u64::from(rank.0) << 8),
        });
        self.hash = hash;
        if self.trace
            && !matches!(event, Event::DaemonDue { .. } | Event::CoordinatorDue | Event::ShimDue { .. })
        {
            let shown = format!("{event:?}");
            if !shown.contains("Heartbeat") && !shown.contains("Ack(") && !shown.contains("Beat") {
                println!("{:>9.3} {}", self.now as f64 / 1000.0, shown.chars().take(600).collect::<String>());
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Inject(index) => self.inject(index),
            Event::Ends(index) => self.fault_ends(index),
            Event::Retry(index) => self.submit(index),
            Event::ToCoordinator { machine, conn, message, tries } => {
                self.arrive_at_coordinator(machine, conn, message, tries);
            }
            Event::ToMachine { machine, conn, message, tries } => {
                self.arrive_at_machine(machine, conn, message, tries);
            }
            Event::CoordinatorDue => {
                self.coordinator_due = None;
                self.ask(Asked::Tick);
            }
            Event::Written { start }
                if start == self.coordinator.starts && self.coordinator.process.is_some() =>
            {
                if self.coordinator.paused > 0 {
                    self.after(100, Event::Written { start });
                } else {
                    let leaves = self.coordinator.written();
                    self.leave(leaves);
                    self.flush_coordinator();
                }
            }
            Event::Written { .. } => {}
            Event::DaemonDue { machine } => self.daemon_input(machine, muster_worker_core::Input::Tick),
            Event::Session { machine, daemon, conn, what } => self.session_turn(machine, daemon, conn, what),
            Event::StartDaemon { machine } => self.start_daemon(machine),
            Event::Prepared { machine, gang } => self.shim_prepared(machine, &gang),
            Event::ShimDue { machine, pid } => self.shim_due(machine, pid),
            Event::RankEnds { machine, gang, rank, code, signal } => {
                self.rank_ends(machine, &gang, rank, code, signal);
            }
            Event::StillHeld { machine, gang } => self.still_held(machine, &gang),
            Event::LetsGo { machine, gang } => self.lets_go(machine, &gang),
            Event::Quiet { machine, gang, quiet } => self.quiet(machine, &gang, quiet),
        }
    }

    /// Hands the coordinator's process something, now or when it goes on.
    pub fn ask(&mut self, asked: Asked) {
        if self.coordinator.process.is_none() {
            return;
        }
        if self.coordinator.paused > 0 {
            if !matches!(asked, Asked::Tick) {
                self.coordinator.inbox.push_back(asked);
            }
            return;
        }
        self.coordinator_acts(asked);
        self.flush_coordinator();
    }

    fn coordinator_acts(&mut self, asked: Asked) {
        let (now, wall) = (self.now, self.coordinator.wall);
        let Some(process) = &mut self.coordinator.process else { return };
        process.wake(now, wall);
        let (input, caller, joins) = match asked {
            Asked::Tick => {
                let due = process.core.next_deadline().is_some_and(|at| at <= process.clock(now, wall));
                if !due {
                    return;
                }
                (Input::Tick, None, None)
            }
            Asked::User { caller, input } => (input, Some(caller), None),
            Asked::Node { conn, node, message } => {
                let session = process.conns.get(&conn).and_then(|(_, session)| *session);
                match (message, session) {
                    (Up::Join(join), _) => {
                        process.conns.insert(conn, (node, None));
                        (Input::Join(join), None, Some(conn))
                    }
                    // A connection to a process that has died is none to the next.
                    (Up::Hello { incarnation, gangs, leaving, number }, None)
                        if process.conns.contains_key(&conn) =>
                    {
                        (Input::Hello { node, incarnation, gangs, leaving, number }, None, Some(conn))
                    }
                    (Up::Heartbeat(seq), Some(session)) => {
                        if process.beats(now, wall, session) {
                            self.leave(vec![Leaves::ToConn(conn, Down::Ack(seq))]);
                        }
                        return;
                    }
                    (Up::Report(report), Some(session)) => {
                        let acted = process.hears(now, wall, (node, session), report, &mut self.truth);
                        return self.after_step(acted);
                    }
                    (Up::Leaving(reason), Some(session)) => {
                        (Input::Leaving { node, session, reason }, None, None)
                    }
                    (Up::Goodbye, Some(session)) => (Input::Goodbye { node, session }, None, None),
                    (Up::Closed, session) => {
                        process.conns.remove(&conn);
                        let Some(session) = session else { return };
                        process.sessions.remove(&session);
                        (Input::Disconnected { node, session }, None, None)
                    }
                    (_, _) => return,
                }
            }
        };
        let stepped = process.step(now, wall, input, caller);
        if let (Some(conn), Some(reply)) = (joins, stepped.reply) {
            match reply {
                Ok(Reply::Session(session)) => {
                    process.sessions.insert(session, conn);
                    if let Some(known) = process.conns.get_mut(&conn) {
                        known.1 = Some(session);
                    }
                    // The core's Welcome, before anything that the core sent on it, waits for the store.
                    self.leave(vec![Leaves::ToConn(conn, Down::Opened)]);
                }
                Ok(_) if !stepped.writes => self.leave(vec![Leaves::ToConn(conn, Down::Joined)]),
                Ok(_) => process.say(Leaves::ToConn(conn, Down::Joined)),
                Err(_) => process.say(Leaves::ToConn(conn, Down::Refused)),
            }
        }
        self.after_step(stepped.acted);
    }

    fn after_step(&mut self, acted: bool) {
        let Some(process) = self.coordinator.process.as_ref().filter(|_| acted) else { return };
        if let Err(what) = process.core.check_invariants() {
            self.truth.violate(what);
        }
    }

    pub fn flush_coordinator(&mut self) {
        loop {
            let Some(process) = &mut self.coordinator.process else { return };
            let (leaves, begins) = process.flush();
            if begins {
                let slow = self.coordinator.slow_disk > 0;
                let latency = 1 + self.up_to(if slow { 3_000 } else { 8 });
                self.after(latency, Event::Written { start: self.coordinator.starts });
            }
            if leaves.is_empty() {
                break;
            }
            self.leave(leaves);
        }
        let Some(process) = &self.coordinator.process else { return };
        let due = process.core.next_deadline().map(|at| process.when(at, self.coordinator.wall));
        if let Some(due) = due.filter(|due| self.coordinator_due.is_none_or(|set| *due < set)) {
            self.coordinator_due = Some(due.max(self.now));
            self.at(due, Event::CoordinatorDue);
        }
    }

    fn leave(&mut self, leaves: Vec<Leaves>) {
        for what in leaves {
            match what {
                Leaves::ToConn(conn, message) => self.down(conn, &message),
                Leaves::ToNode(session, what) => {
                    let Some(process) = &mut self.coordinator.process else { continue };
                    let Some(conn) = process.sessions.get(&session).copied() else { continue };
                    match what {
                        ToNode::Welcome(all) => self.down(conn, &Down::Welcome(all)),
                        ToNode::Assign(one) => self.down(conn, &Down::Assign(one)),
                        ToNode::Close(_) => {
                            process.sessions.remove(&session);
                            process.conns.remove(&conn);
                            self.down(conn, &Down::Closed);
                        }
                    }
                }
                Leaves::Answer(caller, reply) => self.answered(caller, reply),
                Leaves::Changed(job) => {
                    let excused = self.is_excused(&job);
                    if self.trace {
                        let at = self.now as f64 / 1000.0;
                        println!("{at:>9.3}   {} {:?}: {}", job.gang_id(), job.state, job.reason);
                    }
                    self.truth.observe(&job, excused);
                }
            }
        }
    }

    /// The machine's clock.
    pub fn local(&self, machine: usize) -> Millis {
        self.machines[machine].local(self.now)
    }
}
