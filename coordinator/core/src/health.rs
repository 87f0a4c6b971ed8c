//! Whether nodes are fit for work: what a node has found to be wrong with it, what a comparison with the fleet shows, and
//! the verdict that follows.
//!
//! A verdict gets worse at once, since nodes report nothing that has not lasted, and better only after a calm, which
//! doubles each time that the trouble comes back. Whoever gives the node back by hand (uncordon) ends the calm. A
//! quarantined node gets nothing new; what runs there goes on. Nodes are compared when they report, never all at once.

mod fleet;

use serde::{Deserialize, Serialize};

use crate::core::{Core, Timer};
use crate::effects::Effects;
use crate::inventory::Inventory;
use crate::types::{Millis, NodeName, Session};
pub(crate) use fleet::Fleet;

/// Most findings of a node: one for each port, GPU and check of a large machine.
pub const FINDINGS_MAX: usize = 64;
/// Time without the trouble after which a verdict gets better. Ports that flap do so within minutes.
const CALM: Millis = Millis::from_secs(5 * 60);
/// It doubles with each relapse, up to so many times: to 80 minutes.
const RELAPSES_MAX: u32 = 4;
/// A node that was healthy for so long is no longer held to its past.
const FORGIVEN_AFTER: Millis = Millis::from_secs(6 * 3600);

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// The node works, and less well than it should.
    Degraded,
    /// It shall get nothing new.
    Quarantined,
}

/// Whether a node is fit for work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Verdict {
    /// Nothing is known against it.
    #[default]
    Healthy,
    /// It gets work when no healthy node can take it.
    Degraded,
    /// It gets nothing new.
    Quarantined,
}

impl From<Severity> for Verdict {
    fn from(severity: Severity) -> Self {
        match severity {
            Severity::Degraded => Self::Degraded,
            Severity::Quarantined => Self::Quarantined,
        }
    }
}

/// One thing that is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is about.
    pub subject: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was seen, in words.
    pub reason: String,
}

/// What is known of a node's fitness. The verdict is stored; findings are said again by the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    verdict: Verdict,
    /// Why, in words.
    reason: String,
    /// When the verdict last changed.
    changed: Millis,
    /// Times that the verdict got worse since the node was last healthy for long.
    relapses: u32,
    /// What the node said last.
    #[serde(skip)]
    own: Vec<Finding>,
    /// What the comparison has shown.
    #[serde(skip)]
    compared: Option<Finding>,
    /// When the verdict gets better, unless the trouble comes back.
    #[serde(skip)]
    better_at: Option<Millis>,
}

impl Health {
    /// The verdict.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Why, in words; empty if it is healthy.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// When the verdict last changed.
    pub fn changed(&self) -> Millis {
        self.changed
    }

    /// What is wrong now.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.own.iter().chain(&self.compared)
    }

    fn worst(&self) -> Verdict {
        self.findings().map(|finding| finding.severity.into()).max().unwrap_or_default()
    }

    /// What is wrong now, in words.
    fn words(&self) -> String {
        let worst = self.findings().map(|finding| finding.severity).max();
        let words: Vec<String> = (self.findings().filter(|finding| Some(finding.severity) == worst))
            .map(|finding| format!("{}: {}", finding.subject, finding.reason))
            .collect();
        match words.as_slice() {
            [first, second, more @ ..] if !more.is_empty() => {
                format!("{first}; {second}; {} more", more.len())
            }
            all => all.join("; "),
        }
    }

    /// Judges anew. Gives when to look again, if that is new; and whether the verdict has changed.
    fn judge(&mut self, now: Millis) -> (Option<Millis>, bool) {
        let (worst, before) = (self.worst(), self.verdict);
        if worst >= before {
            self.better_at = None;
            if worst > before {
                let forgiven = before == Verdict::Healthy && now.since(self.changed) >= FORGIVEN_AFTER;
                self.relapses = if forgiven { 1 } else { self.relapses.saturating_add(1) };
                (self.verdict, self.changed) = (worst, now);
            }
            self.reason = self.words();
            return (None, worst > before);
        }
        match self.better_at {
            Some(at) if at <= now => {
                (self.verdict, self.changed, self.better_at) = (worst, now, None);
                self.reason = self.words();
                (None, true)
            }
            Some(_) => (None, false),
            None => {
                let doublings = self.relapses.saturating_sub(1).min(RELAPSES_MAX);
                let at = now.plus(Millis(CALM.0 << doublings));
                self.better_at = Some(at);
                (Some(at), false)
            }
        }
    }

    /// Somebody has looked at it and gives it back: what is not found now is forgotten. Whether anything changed.
    pub(crate) fn forgive(&mut self, now: Millis) -> bool {
        let worst = self.worst();
        let changed = self.verdict != worst;
        if changed {
            (self.verdict, self.changed) = (worst, now);
            self.reason = self.words();
        }
        (self.relapses, self.better_at) = (0, None);
        changed
    }
}

impl Core {
    /// What a node has found, and what it has now if that differs.
    pub(crate) fn health(
        &mut self,
        now: Millis,
        name: &NodeName,
        session: Session,
        (findings, inventory): (Vec<Finding>, Option<Box<Inventory>>),
        fx: &mut Effects,
    ) {
        if !self.has_session(name, session) {
            return;
        }
        if let Some(inventory) = inventory {
            self.set_inventory(name, *inventory, fx);
        }
        if let Some(node) = self.nodes.get_mut(name)
            && node.health.own != findings
        {
            node.health.own = findings;
            fx.show_node(name);
        }
        self.judge(now, name, fx);
    }

    /// Takes what a machine has, if it is new.
    pub(crate) fn set_inventory(&mut self, name: &NodeName, inventory: Inventory, fx: &mut Effects) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if *node.inventory == inventory {
            return;
        }
        self.fleet.remove(&node.inventory);
        node.set_inventory(inventory.into());
        self.fleet.add(&node.inventory);
        fx.store_node(name);
        // It may have more than before.
        self.room.appear();
    }

    /// Compares the node with those like it, and judges.
    pub(crate) fn judge(&mut self, now: Millis, name: &NodeName, fx: &mut Effects) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let compared = self.fleet.compare(&node.inventory);
        if node.health.compared != compared {
            node.health.compared = compared;
            fx.show_node(name);
        }
        let (look_again, changed) = node.health.judge(now);
        if let Some(at) = look_again {
            self.timers.insert((at, Timer::Recover(name.clone())));
        }
        if changed {
            fx.store_node(name);
            self.room.appear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(severity: Option<Severity>) -> Vec<Finding> {
        let finding = |severity| Finding { subject: "disk".into(), severity, reason: "full".into() };
        severity.map(finding).into_iter().collect()
    }

    /// Feeds what was found at some second, and gives the verdict.
    fn at(health: &mut Health, second: u64, severity: Option<Severity>) -> Verdict {
        health.own = found(severity);
        health.judge(Millis::from_secs(second));
        health.verdict
    }

    #[test]
    fn it_gets_worse_at_once_and_better_after_a_calm() {
        let mut health = Health::default();
        let table = [
            (0, None, Verdict::Healthy),
            (10, Some(Severity::Quarantined), Verdict::Quarantined),
            (20, Some(Severity::Degraded), Verdict::Quarantined),
            (200, None, Verdict::Quarantined),
            // The calm began at 20.
            (319, None, Verdict::Quarantined),
            (320, None, Verdict::Healthy),
            // The second time it takes twice as long, and trouble in between begins it anew.
            (400, Some(Severity::Degraded), Verdict::Degraded),
            (500, None, Verdict::Degraded),
            (900, Some(Severity::Degraded), Verdict::Degraded),
            (1000, None, Verdict::Degraded),
            (1599, None, Verdict::Degraded),
            (1600, None, Verdict::Healthy),
            // Long after it is the first time again.
            (100_000, Some(Severity::Degraded), Verdict::Degraded),
            (100_001, None, Verdict::Degraded),
            (100_301, None, Verdict::Healthy),
        ];
        for (second, severity, expected) in table {
            assert_eq!(at(&mut health, second, severity), expected, "at {second}");
        }
    }

    #[test]
    fn whoever_gives_it_back_need_not_wait() {
        let mut health = Health::default();
        at(&mut health, 0, Some(Severity::Quarantined));
        assert!(!health.forgive(Millis::from_secs(1)), "it is still found");
        assert_eq!((health.verdict, health.reason()), (Verdict::Quarantined, "disk: full"));
        at(&mut health, 2, None);
        assert!(health.forgive(Millis::from_secs(3)));
        assert_eq!((health.verdict, health.reason()), (Verdict::Healthy, ""));
    }
}
