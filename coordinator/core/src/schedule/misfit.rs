//! Why nodes do not fit, and which of them matter to whoever waits.

use std::collections::BTreeSet;
use std::fmt;

use super::Need;
use crate::health::Verdict;
use crate::inventory::{GPU_MODEL_LABEL, is_model};
use crate::node::{Node, NodeState};
use crate::types::{JobId, NodeName, RUN_LABEL};

/// Refusals spelled out in a reason; the rest are counted, so that a reason stays a sentence.
const REFUSALS_SHOWN_MAX: usize = 3;
/// Models of GPUs that are spelled out where none is the right one.
const MODELS_SHOWN_MAX: usize = 3;

/// How much a node that does not fit matters to whoever waits for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Matters {
    /// It has what is asked for, and not enough of it is free.
    Busy,
    /// It takes work, and not this job's, now or ever.
    Unsuited,
    /// It takes no work, which a person or a repair changes.
    Closed,
    /// It may come back.
    Away,
    /// It has left; only counted beside others.
    Left,
}

const MATTERS: usize = Matters::Left as usize + 1;

/// The nodes that refuse a job. Few are kept, whatever their number: most of ten thousand are but
/// counted.
#[derive(Default)]
pub(super) struct Refusals<'a> {
    kept: [Vec<(&'a NodeName, Misfit<'a>)>; MATTERS],
    counts: [usize; MATTERS],
    /// Nodes whose GPUs are of another model than the job asks for, and their models.
    others: usize,
    models: BTreeSet<&'a str>,
    wanted_model: &'a str,
}

impl<'a> Refusals<'a> {
    /// Takes one more.
    pub fn add(&mut self, node: &'a Node, why: Misfit<'a>) {
        if let Misfit::Model { is, wanted } = why {
            self.others += 1;
            self.wanted_model = wanted;
            if self.models.len() < MODELS_SHOWN_MAX {
                self.models.extend(is);
            }
        }
        let matters = why.matters() as usize;
        self.counts[matters] += 1;
        if self.kept[matters].len() < REFUSALS_SHOWN_MAX {
            self.kept[matters].push((&node.name, why));
        }
    }

    /// Returns them in words, those that matter first; `fitting` others do not refuse.
    pub fn words(&self, fitting: usize) -> String {
        let [takers @ .., left] = &self.counts;
        let here: usize = takers.iter().sum();
        if here + left == 0 {
            return "no other node has joined".to_owned();
        }
        let kept = self.kept.iter().flatten().filter(|(_, why)| here == 0 || why.matters() != Matters::Left);
        let shown = kept.take(REFUSALS_SHOWN_MAX).map(|(name, why)| format!("{name} refused: {why}"));
        let mut words: Vec<String> = shown.collect();
        let (of, gone) = if here == 0 { (*left, 0) } else { (here, *left) };
        match of - words.len() {
            0 => {}
            more => words.push(format!("{more} more refused")),
        }
        if gone > 0 {
            words.push(format!("{gone} have left"));
        }
        let open = self.counts[Matters::Busy as usize] + self.counts[Matters::Unsuited as usize];
        if fitting == 0 && self.others > 0 && self.others == open {
            let known: Vec<&str> = self.models.iter().copied().collect();
            let known = if known.is_empty() { "no GPUs of one model".to_owned() } else { known.join(", ") };
            words.insert(0, format!("no node has GPUs {:?}, known are {known}", self.wanted_model));
        }
        words.join("; ")
    }
}

/// Why a node cannot take its part of a gang.
pub(super) enum Misfit<'a> {
    /// It takes no work at all.
    Closed(&'static str, &'a str),
    Exclusive(&'a JobId),
    Label {
        key: &'a str,
        is: Option<&'a str>,
        wanted: &'a str,
    },
    Model {
        is: Option<&'a str>,
        wanted: &'a str,
    },
    Shared {
        jobs: usize,
    },
    Gpus {
        free: usize,
        total: u32,
        need: u32,
        faulty: usize,
    },
    Cpu {
        free: u32,
        total: u32,
        need: u32,
    },
    Memory {
        free: u64,
        total: u64,
        need: u64,
    },
}

impl Misfit<'_> {
    fn matters(&self) -> Matters {
        match *self {
            Self::Closed("not connected" | "lost", _) => Matters::Away,
            Self::Closed("left", _) => Matters::Left,
            Self::Closed(..) => Matters::Closed,
            Self::Label { .. } | Self::Model { .. } => Matters::Unsuited,
            Self::Gpus { total, need, .. } | Self::Cpu { total, need, .. } if need > total => {
                Matters::Unsuited
            }
            Self::Memory { total, need, .. } if need > total => Matters::Unsuited,
            // Something of it, or all of it, is somebody's, and comes back.
            Self::Exclusive(_)
            | Self::Shared { .. }
            | Self::Gpus { .. }
            | Self::Cpu { .. }
            | Self::Memory { .. } => Matters::Busy,
        }
    }
}

pub(super) fn misfit<'a>(need: &'a Need, node: &'a Node) -> Option<Misfit<'a>> {
    match node.state {
        NodeState::Disconnected => return Some(Misfit::Closed("not connected", "")),
        NodeState::Lost => return Some(Misfit::Closed("lost", "")),
        NodeState::Left => return Some(Misfit::Closed("left", "")),
        NodeState::Ready => {}
    }
    let closed = [
        ("drained", node.drain.as_ref().map(|drain| &drain.reason)),
        ("cordoned", node.cordon.as_ref()),
        ("leaving", node.leaving.as_ref()),
    ];
    if let Some((what, why)) = closed.into_iter().find_map(|(what, why)| Some((what, why?))) {
        return Some(Misfit::Closed(what, why));
    }
    if node.health.verdict() == Verdict::Quarantined {
        return Some(Misfit::Closed("quarantined", node.health.reason()));
    }
    if let Some(run) = node.inventory.labels.get(RUN_LABEL)
        && !need.selector.contains_key(RUN_LABEL)
    {
        return Some(Misfit::Closed("brought by the run", run));
    }
    if let Some(job) = &node.reserved.exclusive {
        return Some(Misfit::Exclusive(job));
    }
    for (key, wanted) in &need.selector {
        if key == GPU_MODEL_LABEL {
            let is = node.inventory.gpu_model();
            if is.is_some_and(|is| is_model(is, wanted)) {
                continue;
            }
            return Some(Misfit::Model { is, wanted });
        }
        let is = node.inventory.labels.get(key).map(String::as_str);
        if is != Some(wanted) {
            return Some(Misfit::Label { key, is, wanted });
        }
    }
    let jobs = node.reserved.jobs.len() + node.reserved.leftovers.len();
    if need.amount.is_zero() {
        return (jobs > 0).then_some(Misfit::Shared { jobs });
    }
    let (need, free, total) = (need.amount, node.free(), node.inventory.total);
    let free_gpus = if need.gpus == 0 { 0 } else { node.free_gpus().count() };
    if (free_gpus as u64) < u64::from(need.gpus) {
        let faulty = node.inventory.gpus.iter().filter(|gpu| gpu.fault.is_some()).count();
        return Some(Misfit::Gpus { free: free_gpus, total: total.gpus, need: need.gpus, faulty });
    }
    if free.cpu_millis < need.cpu_millis {
        let (free, total, need) = (free.cpu_millis, total.cpu_millis, need.cpu_millis);
        return Some(Misfit::Cpu { free, total, need });
    }
    if free.memory_bytes < need.memory_bytes {
        let (free, total, need) = (free.memory_bytes, total.memory_bytes, need.memory_bytes);
        return Some(Misfit::Memory { free, total, need });
    }
    None
}

impl fmt::Display for Misfit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = |millis: u32| f64::from(millis) / 1000.0;
        let gib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 30));
        match *self {
            Self::Closed(what, "") => f.write_str(what),
            Self::Closed(what, why) => write!(f, "{what} ({why})"),
            Self::Exclusive(job) => {
                write!(f, "held by job {job}, which names no resources and so has its nodes for itself")
            }
            Self::Label { key, is: Some(label), wanted } => {
                write!(f, "label {key} is {label:?}, not {wanted:?}")
            }
            Self::Label { key, is: None, .. } => write!(f, "has no label {key}"),
            Self::Model { is: Some(is), wanted } => write!(f, "its GPUs are {is:?}, not {wanted:?}"),
            Self::Model { is: None, wanted } => {
                write!(f, "has no GPUs of one model, and is to have {wanted:?}")
            }
            Self::Shared { jobs } => {
                write!(f, "runs {jobs} other jobs, and this one names no resources to share it with them")
            }
            Self::Gpus { free, total, need, faulty: 0 } => {
                write!(f, "{free} of {total} GPUs free, {need} needed")
            }
            Self::Gpus { free, total, need, faulty } => {
                write!(f, "{free} of {total} GPUs free ({faulty} faulty), {need} needed")
            }
            Self::Cpu { free, total, need } => {
                write!(f, "{} of {} CPU cores free, {} needed", cores(free), cores(total), cores(need))
            }
            Self::Memory { free, total, need } => {
                write!(f, "{} of {} GiB memory free, {} needed", gib(free), gib(total), gib(need))
            }
        }
    }
}
