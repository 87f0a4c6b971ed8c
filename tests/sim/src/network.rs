//! Messages on their way: late, doubled, overtaken, held up while a direction is cut.

use muster_core::types::NodeName;
use rand::RngExt;

use crate::coordinator::Asked;
use crate::messages::{Down, Up};
use crate::world::{Event, World};

/// Time after which what was lost is sent again.
const SENT_AGAIN: u64 = 600;

impl World {
    /// Sends down a connection; it knows its machine by its number.
    pub fn down(&mut self, conn: u64, message: &Down) {
        let machine = (conn % 64) as usize;
        let level = message.is_level();
        let copies = if level && self.rng.random_bool(0.01) { 2 } else { 1 };
        for _ in 0..copies {
            let at = self.arrival(conn, true, level);
            self.at(at, Event::ToMachine { machine, conn, message: message.clone(), tries: 0 });
        }
    }

    /// Sends up.
    pub fn up(&mut self, machine: usize, conn: u64, message: &Up) {
        let copies = if message.is_level() && self.rng.random_bool(0.01) { 2 } else { 1 };
        for _ in 0..copies {
            // A connection that stalls as it begins: what it said is heard when the daemon has long had another.
            if matches!(message, Up::Hello { .. }) && self.rng.random_bool(0.04) {
                let stalls = self.up_to(25_000);
                self.trouble(machine);
                self.arrivals.insert((conn, false), self.now + stalls);
            }
            let late = matches!(message, Up::Heartbeat(_));
            let at = self.arrival(conn, false, late);
            self.at(at, Event::ToCoordinator { machine, conn, message: message.clone(), tries: 0 });
        }
    }

    /// When a message arrives. Those that may be overtaken sometimes are.
    fn arrival(&mut self, conn: u64, down: bool, any_order: bool) -> u64 {
        let slow = self.slow_network > 0;
        let delay = 1 + self.up_to(if slow { 2_500 } else { 20 });
        let late = if any_order && self.rng.random_bool(0.03) { self.up_to(3_000) } else { 0 };
        let last = self.arrivals.entry((conn, down)).or_default();
        *last = (*last).max(self.now + delay);
        *last + late
    }

    pub fn arrive_at_coordinator(&mut self, machine: usize, conn: u64, message: Up, tries: u32) {
        let waits = self.waits(conn, false, tries);
        let from = &self.machines[machine];
        if waits || from.cut_up > 0 {
            return self.again(
                conn,
                false,
                tries,
                Event::ToCoordinator { machine, conn, message, tries: tries + 1 },
            );
        }
        let Ok(node) = NodeName::new(from.name.clone()) else { return };
        if self.coordinator.process.is_none() {
            // Its machine says that nobody is there.
            return self.down(conn, &Down::Closed);
        }
        self.ask(Asked::Node { conn, node, message });
    }

    pub fn arrive_at_machine(&mut self, machine: usize, conn: u64, message: Down, tries: u32) {
        let waits = self.waits(conn, true, tries);
        let to = &self.machines[machine];
        if waits || to.cut_down > 0 {
            return self.again(
                conn,
                true,
                tries,
                Event::ToMachine { machine, conn, message, tries: tries + 1 },
            );
        }
        if to.up {
            self.daemon_hears(machine, conn, message);
        }
    }

    /// A message that is held up is sent again for a while, as TCP does, together with all that come after it, and in
    /// order. By the end of the while its connection is over.
    fn again(&mut self, conn: u64, down: bool, tries: u32, event: Event) {
        if tries < 60 {
            let at = (self.now / SENT_AGAIN + 1) * SENT_AGAIN + conn % 64;
            let last = self.arrivals.entry((conn, down)).or_default();
            *last = (*last).max(at);
            *self.held.entry((conn, down)).or_default() += 1;
            self.at(at, event);
        }
    }

    /// Whether a message must wait for earlier ones of its connection. One that has waited no longer does.
    fn waits(&mut self, conn: u64, down: bool, tries: u32) -> bool {
        let Some(held) = self.held.get_mut(&(conn, down)) else { return false };
        if tries == 0 {
            return true;
        }
        *held -= 1;
        if *held == 0 {
            self.held.remove(&(conn, down));
        }
        false
    }

    /// Whether a connection to the coordinator's machine can be made.
    pub fn reaches(&self, machine: usize) -> bool {
        self.machines[machine].cut_up == 0 && self.machines[machine].cut_down == 0
    }
}
