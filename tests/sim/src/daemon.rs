//! The node daemon: its session with the coordinator, around the real core.

use std::collections::VecDeque;

use muster_core::types::{GangId, Incarnation, Millis, NodeName, Resources};
use muster_core::{Device, Inventory, Join};
use muster_worker_core::{Adopted, Adoption, Core, Effect, Input, adopt};
use rand::RngExt;

use crate::coordinator::{HEARTBEAT, LEASE};
use crate::machine::{Daemon, Inbox, Phase, Told};
use crate::messages::{Down, Up};
use crate::schedule::GPUS;
use crate::world::{Event, Turn, World};

/// As in the daemon's session: how long a coordinator may be silent, in a session and before it answers a Join.
const SILENCE: u64 = LEASE / 4;
const PATIENCE: u64 = LEASE / 12;
const ANSWER_MAX: u64 = LEASE / 2;
/// When a probe has not been answered.
const PROBED_MAX: u64 = LEASE / 4;
/// The first pause between attempts to connect.
const PAUSE_MIN: u64 = 100;

impl World {
    /// A daemon begins, and finds what an earlier one has left.
    pub fn start_daemon(&mut self, machine: usize) {
        if self.machines[machine].frozen > 0 {
            return self.after(500, Event::StartDaemon { machine });
        }
        let this = &mut self.machines[machine];
        if !this.up || this.daemon.is_some() {
            return;
        }
        this.daemons += 1;
        this.away = false;
        let Ok(incarnation) = Incarnation::new(format!("{}-{}", this.data_id, this.daemons)) else { return };
        this.daemon = Some(Daemon {
            core: Core::default(),
            incarnation,
            frozen: false,
            inbox: VecDeque::new(),
            conn: 0,
            pause: PAUSE_MIN,
            phase: Phase::Idle,
            heard: Millis(0),
            beats: 0,
            sent: VecDeque::new(),
            leaves_for: None,
        });
        let boot_id = this.boot_id();
        let found: Vec<GangId> = this.disk.keys().cloned().collect();
        for gang in found {
            self.take_over(machine, &gang, &boot_id);
        }
        self.session_later(machine, Turn::Connect, 10);
    }

    fn take_over(&mut self, machine: usize, gang: &GangId, boot_id: &str) {
        let this = &mut self.machines[machine];
        let Some(record) = this.disk.get(gang).cloned() else { return };
        let decision = adopt(&record.shim, boot_id, this.start_time(record.shim.pid));
        let shim = this.shims.get(&record.shim.pid).filter(|shim| shim.assignment.gang == *gang);
        let adopted = |exits, fence| {
            let (assignment, launched) = (record.assignment.clone(), record.launched);
            let master_port = (assignment.placement.group_rank == 0).then_some(29500);
            Input::Adopted(Box::new(Adopted {
                assignment,
                master_port,
                launched,
                exits,
                fence,
                surroundings: None,
            }))
        };
        match decision {
            Adoption::Adopt => {
                let Some(shim) = shim else {
                    return self.truth.violate(format!(
                        "machine {machine} takes a foreign process for the shim of {gang}"
                    ));
                };
                let exits = shim.ranks.iter().filter_map(|rank| rank.exit.clone()).collect();
                let (fence, fenced, holds) = (shim.fence, shim.fenced, shim.holds());
                self.daemon_input(machine, adopted(exits, fence));
                if fenced {
                    self.daemon_input(machine, Input::Fenced(gang.clone()));
                }
                if holds {
                    self.daemon_input(machine, Input::Killed(gang.clone()));
                }
            }
            Adoption::Sweep => {
                let last = record.last.clone();
                let (over, exits) = (last.is_some(), last.unwrap_or_default());
                self.daemon_input(machine, adopted(exits, None));
                let end = if over {
                    Input::Gone(gang.clone())
                } else {
                    Input::Failed(gang.clone(), "its shim was killed".to_owned())
                };
                self.daemon_input(machine, end);
            }
            Adoption::Discard => _ = this.disk.remove(gang),
        }
    }

    /// Something for the daemon's core, now or when it goes on.
    pub fn daemon_input(&mut self, machine: usize, input: Input) {
        let now = self.local(machine);
        let Some(daemon) = &mut self.machines[machine].daemon else { return };
        if daemon.frozen {
            if !matches!(input, Input::Tick) {
                daemon.inbox.push_back(Inbox::Observed(input));
            }
            return;
        }
        if matches!(input, Input::Tick) && daemon.core.next_deadline().is_none_or(|at| at > now) {
            return;
        }
        let effects = daemon.core.step(now, input);
        for effect in effects {
            self.carry_out(machine, effect);
        }
        self.daemon_is_done(machine);
        let this = &self.machines[machine];
        if let Some(at) = this.daemon.as_ref().and_then(|daemon| daemon.core.next_deadline()) {
            let at = this.when(self.now, at);
            self.at(at, Event::DaemonDue { machine });
        }
    }

    fn carry_out(&mut self, machine: usize, effect: Effect) {
        match effect {
            Effect::Start(assignment) => self.start_shim(machine, *assignment),
            Effect::Launch(assignment, fence) => {
                let gang = assignment.gang.clone();
                self.tell_shim(machine, &gang, Told::Launch(assignment, fence));
            }
            Effect::Stop(gang, stop) => self.tell_shim(machine, &gang, Told::Stop(stop.grace)),
            Effect::Fence(gang, fence) => self.tell_shim(machine, &gang, Told::Fence(fence)),
            Effect::Kill(gang) => {
                if let Some(pid) = self.machines[machine].pid_of(&gang) {
                    self.kill_shim(machine, pid);
                }
            }
            Effect::Release(gang) => _ = self.machines[machine].disk.remove(&gang),
            Effect::Report(gang) => {
                let Some(daemon) = &self.machines[machine].daemon else { return };
                if let (Phase::Open, Some(report)) = (daemon.phase, daemon.core.report(&gang)) {
                    let conn = daemon.conn;
                    self.up(machine, conn, &Up::Report(Box::new(report)));
                }
            }
            Effect::Leaving(reason) => {
                let Some(daemon) = &self.machines[machine].daemon else { return };
                if daemon.phase == Phase::Open {
                    let conn = daemon.conn;
                    self.up(machine, conn, &Up::Leaving(reason));
                }
            }
        }
    }

    /// A daemon that was told to end does so once nothing of it runs.
    fn daemon_is_done(&mut self, machine: usize) {
        let Some(daemon) = &self.machines[machine].daemon else { return };
        let Some(ms) = daemon.leaves_for.filter(|_| daemon.core.is_idle()) else { return };
        let (conn, open) = (daemon.conn, daemon.phase == Phase::Open);
        if open {
            self.up(machine, conn, &Up::Goodbye);
        }
        self.up(machine, conn, &Up::Closed);
        self.machines[machine].daemon = None;
        self.machines[machine].away = true;
        self.after(ms, Event::StartDaemon { machine });
    }

    fn session_later(&mut self, machine: usize, what: Turn, ms: u64) {
        let this = &self.machines[machine];
        let Some(daemon) = &this.daemon else { return };
        let event = Event::Session { machine, daemon: this.daemons, conn: daemon.conn, what };
        self.after(ms, event);
    }

    fn close_session(&mut self, machine: usize) {
        let Some(daemon) = &mut self.machines[machine].daemon else { return };
        let conn = std::mem::take(&mut daemon.conn);
        if daemon.phase == Phase::Open {
            daemon.pause = PAUSE_MIN;
        }
        daemon.phase = Phase::Idle;
        if conn > 0 {
            self.up(machine, conn, &Up::Closed);
        }
        self.pause(machine);
    }

    /// Connects again after a while, which doubles with each attempt in vain.
    fn pause(&mut self, machine: usize) {
        let Some(daemon) = &mut self.machines[machine].daemon else { return };
        let pause = daemon.pause;
        daemon.pause = (pause * 2).min(LEASE / 4);
        let pause = PAUSE_MIN / 2 + self.up_to(pause);
        self.session_later(machine, Turn::Connect, pause);
    }

    pub fn session_turn(&mut self, machine: usize, of: u32, conn: u64, what: Turn) {
        let now = self.local(machine);
        let this = &mut self.machines[machine];
        let same_daemon = this.daemons == of;
        let Some(daemon) = this.daemon.as_mut().filter(|daemon| same_daemon && daemon.conn == conn) else {
            return;
        };
        if daemon.frozen {
            return self.session_later(machine, what, 500);
        }
        match (what, daemon.phase) {
            (Turn::Connect, Phase::Idle) => self.connect(machine, now),
            (Turn::Unanswered, Phase::Joining { asked, since } | Phase::Opening { asked, since }) => {
                if let Phase::Joining { asked, .. } | Phase::Opening { asked, .. } = &mut daemon.phase {
                    *asked = now;
                }
                // The second time, it has not answered on another connection either, which takes as long to find out.
                // Otherwise it is slow.
                let asked_anew = asked > since && self.reaches(machine);
                let hangs =
                    self.coordinator.paused > 0 && self.coordinator.paused_since + PATIENCE <= self.now;
                if asked_anew && hangs && self.coordinator.process.is_some() {
                    let at = Millis(now.0 - PATIENCE);
                    self.daemon_input(machine, Input::CoordinatorGone { at });
                }
                // A connection that stalls on its way does not answer probes either.
                let stalls = self.arrivals.get(&(conn, false)).is_some_and(|until| *until > self.now);
                let waits_max = if stalls { PROBED_MAX } else { ANSWER_MAX };
                if now.since(since).0 >= waits_max {
                    self.close_session(machine);
                } else {
                    // Probes become rarer.
                    let wait = if asked > since { LEASE / 8 + PATIENCE } else { PATIENCE };
                    self.session_later(machine, Turn::Unanswered, wait);
                }
            }
            (Turn::Beat, Phase::Open) => {
                if now.since(daemon.heard).0 > SILENCE {
                    return self.close_session(machine);
                }
                daemon.beats += 1;
                daemon.sent.push_back((daemon.beats, now));
                daemon.sent.truncate(64);
                let beat = Up::Heartbeat(daemon.beats);
                self.up(machine, conn, &beat);
                self.session_later(machine, Turn::Beat, HEARTBEAT);
            }
            _ => {}
        }
    }

    fn connect(&mut self, machine: usize, now: Millis) {
        if !self.reaches(machine) {
            // Nobody answers, not even that nobody is there.
            self.session_later(machine, Turn::Connect, PATIENCE);
            return;
        }
        if self.coordinator.process.is_none() {
            self.daemon_input(machine, Input::CoordinatorGone { at: now });
            return self.pause(machine);
        }
        self.conns += 1;
        let conn = self.conns * 64 + machine as u64;
        let this = &mut self.machines[machine];
        let Ok(name) = NodeName::new(this.name.clone()) else { return };
        let Some(daemon) = &mut this.daemon else { return };
        daemon.conn = conn;
        daemon.phase = Phase::Joining { asked: now, since: now };
        let device = |index| Device {
            index,
            uuid: format!("GPU-{index}"),
            model: "model".to_owned(),
            memory_bytes: 80 << 30,
            ..Device::default()
        };
        let inventory = Inventory {
            total: Resources { gpus: GPUS, cpu_millis: 64_000, memory_bytes: 1 << 40 },
            gpus: (0..GPUS).map(device).collect(),
            ..Inventory::default()
        };
        let join = Join {
            name,
            address: [10, 0, 0, this.last_octet].into(),
            incarnation: daemon.incarnation.clone(),
            boot_id: format!("boot{}", this.boots),
            inventory,
            data_id: this.data_id.clone(),
        };
        self.up(machine, conn, &Up::Join(Box::new(join)));
        self.session_later(machine, Turn::Unanswered, PATIENCE);
    }

    /// A message of the coordinator.
    pub fn daemon_hears(&mut self, machine: usize, conn: u64, message: Down) {
        let now = self.local(machine);
        let Some(daemon) = &mut self.machines[machine].daemon else { return };
        if daemon.frozen {
            return daemon.inbox.push_back(Inbox::Heard(conn, message));
        }
        if daemon.conn != conn {
            return;
        }
        daemon.heard = now;
        let lease = Millis(LEASE);
        match (message, daemon.phase) {
            (Down::Joined, Phase::Joining { .. }) => {
                daemon.phase = Phase::Opening { asked: now, since: now };
                let leaving = daemon.leaves_for.map(|_| "its daemon is being stopped".to_owned());
                let (incarnation, gangs) = (daemon.incarnation.clone(), daemon.core.reports());
                // Connections count up as the daemon's hellos do.
                self.up(machine, conn, &Up::Hello { incarnation, gangs, leaving, number: conn });
            }
            (Down::Opened, Phase::Opening { since, .. }) => {
                daemon.phase = Phase::Open;
                daemon.sent.clear();
                self.daemon_input(machine, Input::Renewed { sent: since, lease });
                self.session_turn_now(machine);
            }
            (Down::Welcome(all), Phase::Open) => {
                // What changed since the Hello was made has not been said.
                let known: Vec<GangId> =
                    daemon.core.reports().into_iter().map(|report| report.gang).collect();
                self.daemon_input(machine, Input::Welcome(all));
                for gang in known {
                    self.carry_out(machine, Effect::Report(gang));
                }
            }
            (Down::Assign(one), Phase::Open) => self.daemon_input(machine, Input::Assign(one)),
            (Down::Ack(seq), Phase::Open) => {
                let known = daemon.sent.partition_point(|(beat, _)| *beat <= seq);
                let newest = daemon.sent.drain(..known).next_back();
                if let Some((_, sent)) = newest {
                    self.daemon_input(machine, Input::Renewed { sent, lease });
                }
            }
            (Down::Refused | Down::Closed, _) => self.close_session(machine),
            _ => {}
        }
    }

    fn session_turn_now(&mut self, machine: usize) {
        self.session_later(machine, Turn::Beat, 0);
    }

    /// A frozen daemon goes on with what has come meanwhile, in its order.
    pub fn daemon_thaws(&mut self, machine: usize) {
        let Some(daemon) = &mut self.machines[machine].daemon else { return };
        daemon.frozen = false;
        let inbox = std::mem::take(&mut daemon.inbox);
        // Which of its sources a process reads first is nobody's to say.
        if self.rng.random_bool(0.5) {
            self.daemon_input(machine, Input::Tick);
        }
        for waiting in inbox {
            match waiting {
                Inbox::Observed(input) => self.daemon_input(machine, input),
                Inbox::Heard(conn, message) => self.daemon_hears(machine, conn, message),
            }
        }
        self.daemon_input(machine, Input::Tick);
    }
}
