//! Which waiting jobs are looked at, and when.
//!
//! Every job may fit when room appears. But ten thousand nodes come back within seconds while a thousand jobs wait, and
//! a look at all jobs for each node would take hours. So what a look at all nodes has shown for one kind of job holds
//! for all that ask for the same, until room appears; and after a pass over the queue the next one waits for ten times
//! as long as that one took. How long it took is counted and not measured: the core reads no clock.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::{Core, QueueKey, Timer};
use crate::effects::Effects;
use crate::gang::counted;
use crate::job::{Gang, JobState};
use crate::schedule::{Need, Shortage, count_fitting, place};
use crate::types::{Generation, JobId, Millis};

/// What it costs to look at one node.
const VISIT_NS: u64 = 50;
/// What a step of the search for the fewest uplinks costs.
const STEP_NS: u64 = 2;
/// What it costs to show one job's new reason to whoever watches.
const SHOW_NS: u64 = 10_000;
/// Passes over the queue are apart by so many times what they cost.
const APART: u64 = 10;

/// What is known of the room for waiting jobs.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// Room has appeared: every waiting job may fit now.
    appeared: bool,
    /// What the last look at all nodes has shown of what jobs ask for that did not fit. No more nodes fit since:
    /// whatever makes room clears it.
    short: BTreeMap<Need, Shortage>,
    /// When the next pass may be made.
    next_pass: Millis,
    /// What everything so far has cost.
    spent_ns: u64,
}

impl Room {
    /// A node has come back, or something on it is free.
    pub fn appear(&mut self) {
        self.appeared = true;
        self.short.clear();
    }

    /// Returns whether a pass over the jobs is due because of it.
    pub fn has_appeared(&self) -> bool {
        self.appeared
    }
}

impl Core {
    /// Places waiting jobs, in order of priority and submission. A job that does not fit does not hold up those
    /// behind it.
    pub(crate) fn schedule(&mut self, now: Millis, fx: &mut Effects) {
        if self.room.appeared && now < self.room.next_pass {
            // New jobs wait for it too: they must not take what one before them may get.
            self.timers.insert((self.room.next_pass, Timer::Pass));
            return;
        }
        let fresh = std::mem::take(&mut self.fresh);
        if !std::mem::take(&mut self.room.appeared) {
            return self.look_at(now, &fresh, fx);
        }
        let before = self.room.spent_ns;
        self.consider_growth(now);
        let first: BTreeSet<QueueKey> = self.queue.iter().take(self.config.scan_max).cloned().collect();
        self.look_at(now, &first, fx);
        self.look_at(now, &(&fresh - &first), fx);
        self.rest(now, before);
    }

    fn look_at(&mut self, now: Millis, jobs: &BTreeSet<QueueKey>, fx: &mut Effects) {
        for (_, _, id) in jobs {
            self.place_or_explain(now, id, fx);
        }
    }

    /// What has been spent since then puts off the next pass.
    fn rest(&mut self, now: Millis, before_ns: u64) {
        let cost = Millis((self.room.spent_ns - before_ns) * APART / 1_000_000);
        self.room.next_pass = self.room.next_pass.max(now).plus(cost);
    }

    /// A look at all nodes, for something that can wait: it puts off the next pass.
    pub(crate) fn charge_visits(&mut self, now: Millis) {
        let before = self.room.spent_ns;
        self.room.spent_ns += self.nodes.len() as u64 * VISIT_NS;
        self.rest(now, before);
    }

    /// Returns how long to rest after a look at all nodes.
    pub(crate) fn rest_after_visits(&self) -> Millis {
        Millis(self.nodes.len() as u64 * VISIT_NS * APART / 1_000_000)
    }

    /// Places one job if it fits; else says why not, and gives false.
    pub(crate) fn place_or_explain(&mut self, now: Millis, id: &JobId, fx: &mut Effects) -> bool {
        let Some(job) = self.jobs.get(id) else { return false };
        let (need, min_nodes) = (Need::from(&job.spec), job.spec.min_nodes as usize);
        let known = self.room.short.get(&need).filter(|short| short.fitting < min_nodes);
        let reason = if let Some(short) = known {
            short.reason(&job.spec)
        } else {
            let mut steps = 0;
            let placed = place(&job.spec, self.nodes.values(), &mut steps);
            self.room.spent_ns += self.nodes.len() as u64 * VISIT_NS + steps * STEP_NS;
            match placed {
                Ok(placements) => {
                    if let Some(reason) = self.last_call(now, id, placements.len()) {
                        self.explain(id, reason, fx);
                        return false;
                    }
                    self.start(now, id, Gang::new(placements, now), fx);
                    return true;
                }
                Err(short) => {
                    let reason = short.reason(&job.spec);
                    // No more than one pass can use.
                    if self.room.short.len() >= self.config.scan_max {
                        self.room.short.clear();
                    }
                    self.room.short.insert(need, short);
                    reason
                }
            }
        };
        if let Some(job) = self.jobs.get_mut(id) {
            job.last_call_ends = None;
        }
        self.explain(id, reason, fx);
        false
    }

    /// Why a job that could start on so many nodes waits for more: it would have to start again with each that comes. Later
    /// generations start at once, with those that are left.
    fn last_call(&mut self, now: Millis, id: &JobId, found: usize) -> Option<String> {
        let job = self.jobs.get_mut(id)?;
        let is_first = job.generation == Generation(0);
        if !is_first || found >= job.spec.max_nodes as usize || job.spec.last_call == Millis(0) {
            return None;
        }
        let ends = *job.last_call_ends.get_or_insert(now.plus(job.spec.last_call));
        if ends <= now {
            return None;
        }
        self.timers.insert((ends, Timer::Requeue(id.clone())));
        let (most, seconds) = (job.spec.max_nodes, job.spec.last_call.0.div_ceil(1000));
        Some(format!(
            "waiting: {} can start, and up to {most} may come within {seconds} s of the first of them (last_call)",
            counted(found, "node")
        ))
    }

    fn explain(&mut self, id: &JobId, reason: String, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        // The cause of a restart stays visible while the job waits for nodes.
        let reason = match (&job.state, job.reason.split_once("; waiting: ")) {
            (JobState::Restarting, Some((cause, _))) => format!("{cause}; {reason}"),
            (JobState::Restarting, None) => format!("{}; {reason}", job.reason),
            _ => reason,
        };
        if job.reason != reason {
            job.reason = reason;
            fx.show_job(id);
            self.room.spent_ns += SHOW_NS;
        }
    }

    /// For tests: what placing jobs has cost so far, which grows with the nodes and jobs that were looked at.
    pub fn placement_spent_ns(&self) -> u64 {
        self.room.spent_ns
    }

    /// Whether what is thought to be known of the room can be true.
    pub(crate) fn check_room(&self) -> Result<(), String> {
        let wrong = self
            .room
            .short
            .iter()
            .find(|(need, short)| count_fitting(need, self.nodes.values()) > short.fitting);
        wrong.map_or(Ok(()), |(need, short)| Err(format!("there is more room than {short:?} for {need:?}")))
    }
}
