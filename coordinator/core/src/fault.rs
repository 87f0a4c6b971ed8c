//! What ends a generation, and what follows from it: a restart that spends the budget, a move that does not, or the
//! end of the job.

use crate::bugs::{Bug, planted};
use crate::core::{Core, Timer};
use crate::effects::Effects;
use crate::gang::counted;
use crate::job::{JobState, Observed, Outcome, RootCause};
use crate::types::{
    DesiredPhase, Generation, JobId, JobSpec, Millis, NodeName, Rank, RankExit, RankProgress,
};

/// A generation that ran at least this long before it failed is started again without delay.
const QUICK_FAILURE: Millis = Millis::from_secs(60);
/// Delay before the second restart of a job that crashes at once; doubles with each.
const BACKOFF_FIRST: Millis = Millis(250);
/// Generations of one job that may end because another program took the master port before they count as faults.
const PORT_RETRIES_MAX: u32 = 3;

/// What ended a generation.
pub(crate) enum Cause {
    /// A rank ended with something else than success.
    Exit(NodeName, RankExit),
    /// Something else; in words. A new generation may fare better.
    Fault(String),
    /// No rank shows progress; in words.
    Hang(String),
    /// A node could not do what it was told, and says why. `is_permanent`: a new generation would meet the same.
    Node { name: NodeName, error: String, is_permanent: bool },
    /// The nodes of the gang change, by somebody's will; in words. No fault, so no restart is spent.
    Move(String),
}

impl Core {
    /// Begins to end the current generation. The first cause counts; later ones are its consequences.
    pub(crate) fn fault(&mut self, now: Millis, id: &JobId, cause: Cause, fx: &mut Effects) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let generation = job.generation;
        let Some(gang) = job.gang.as_mut().filter(|gang| gang.outcome.is_none()) else { return };
        let port_taken = matches!(&cause, Cause::Exit(_, exit) if is_port_taken(exit))
            && job.port_retries < PORT_RETRIES_MAX;
        job.port_retries += u32::from(port_taken);
        let moves = matches!(cause, Cause::Move(_)) || port_taken;
        let permanent = matches!(cause, Cause::Node { is_permanent: true, .. });
        gang.dump_stacks = matches!(cause, Cause::Hang(_));
        let (why, quoted, exit) = match cause {
            Cause::Exit(node, exit) => (
                describe_exit(&job.spec, &node, &exit),
                said(&exit),
                Some(RootCause { generation, node, exit }),
            ),
            Cause::Node { name, error, .. } => (format!("node {name}: {error}"), Some(error), None),
            Cause::Fault(why) | Cause::Hang(why) | Cause::Move(why) => (why, None, None),
        };
        let left = job.spec.max_restarts.saturating_sub(job.restarts_used);
        let outcome = match (moves, permanent, left) {
            (true, ..) => Outcome::Move,
            (_, true, _) | (_, _, 0) => Outcome::Fail,
            _ => Outcome::Restart,
        };
        gang.outcome = Some(outcome);
        gang.desired = DesiredPhase::Stopped;
        job.state = if outcome == Outcome::Fail { JobState::Stopping } else { JobState::Restarting };
        job.reason = match (outcome, job.restarts_used) {
            (Outcome::Restart, used) => format!("{why}; restart {} of {}", used + 1, job.spec.max_restarts),
            (Outcome::Move | Outcome::Cancel, _) => format!("{why}; starts again, no restart spent"),
            (Outcome::Fail, 0) => why,
            (Outcome::Fail, used) => format!("{why}; after {}", counted(used as usize, "restart")),
        };
        (job.exit, job.quoted) = (exit, quoted);
        let ran = now.since(gang.placed);
        job.not_before = now.plus(if moves || ran >= QUICK_FAILURE || job.restarts_used == 0 {
            Millis(0)
        } else {
            let doublings = (job.restarts_used - 1).min(16);
            Millis(BACKOFF_FIRST.0 << doublings).min(self.config.backoff_max)
        });
        self.growable.remove(id);
        fx.store_job(id);
        self.send_assignments(id, fx);
    }

    /// Nobody could say meanwhile that ranks were launched: what is due has its whole time again.
    pub(crate) fn put_off_starts(&mut self, now: Millis) {
        let due = self.timers.iter().take_while(|(at, _)| *at <= now);
        let starts = due.filter(|(_, timer)| matches!(timer, Timer::StartTimeout(..)));
        for (at, timer) in starts.cloned().collect::<Vec<_>>() {
            let Timer::StartTimeout(id, _) = &timer else { continue };
            let span = self.jobs.get(id).map_or(Millis(0), |job| job.spec.start_timeout);
            self.timers.remove(&(at, timer.clone()));
            self.timers.insert((now.plus(span), timer));
        }
    }

    pub(crate) fn start_timeout(
        &mut self,
        now: Millis,
        id: &JobId,
        generation: Generation,
        fx: &mut Effects,
    ) {
        let Some(job) = self.jobs.get(id).filter(|job| job.generation == generation) else { return };
        if job.state != JobState::Starting {
            return;
        }
        let Some(gang) = &job.gang else { return };
        let late: Vec<&str> = (gang.placements.iter().zip(&gang.observed))
            .filter(|(_, seen)| **seen < Observed::Running)
            .map(|(placement, _)| placement.node.as_str())
            .collect();
        let (count, first) = (late.len(), late.first().copied().unwrap_or("no node"));
        let secs = job.spec.start_timeout.0 / 1000;
        let why =
            format!("not every rank was launched within {secs} s: {first} (of {count} nodes) is not ready");
        self.fault(now, id, Cause::Fault(why), fx);
    }

    /// The gang hangs once no node of it that still runs sees progress.
    pub(crate) fn check_progress(&mut self, now: Millis, id: &JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get(id).filter(|job| job.state == JobState::Running) else { return };
        let Some(gang) = &job.gang else { return };
        let running = gang.placements.len() - gang.counts.stopped;
        let hangs = gang.quiet.len() >= running && !gang.quiet.is_empty();
        if job.spec.progress_timeout == Millis(0) || !(hangs || planted(Bug::OneQuietNodeHangs)) {
            return;
        }
        let all: Vec<(&NodeName, &RankProgress)> = (gang.quiet.iter())
            .flat_map(|(at, ranks)| ranks.iter().map(|rank| (&gang.placements[*at].node, rank)))
            .collect();
        let stuck = job.rendezvous().and_then(|stuck| stuck.in_words());
        let why = format!(
            "no rank has shown progress for {} s: {}{}; their stacks are in their standard error",
            job.spec.progress_timeout.0 / 1000,
            describe_laggards(&all),
            stuck.map(|words| format!("; {words}")).unwrap_or_default()
        );
        self.fault(now, id, Cause::Hang(why), fx);
    }
}

/// Names the ranks that hold the others up: those that the kernel does not let run, else those behind in steps.
fn describe_laggards(all: &[(&NodeName, &RankProgress)]) -> String {
    let held = |state| match state {
        'T' | 't' => Some("is stopped by a signal or a debugger"),
        'D' => Some("waits in the kernel"),
        'Z' => Some("has ended"),
        _ => None,
    };
    let furthest = all.iter().filter_map(|(_, progress)| progress.step).max();
    let at = |progress: &RankProgress| match progress.step {
        Some(step) => format!(" at step {step}"),
        None => String::new(),
    };
    let name =
        |(node, progress): &(&NodeName, &RankProgress)| format!("rank {} on node {node}", progress.rank);
    let mut lag: Vec<String> = all
        .iter()
        .filter_map(|rank| Some(format!("{} {}{}", name(rank), held(rank.1.state)?, at(rank.1))))
        .collect();
    if let (true, Some(furthest)) = (lag.is_empty(), furthest) {
        let behind = all.iter().filter(|(_, progress)| progress.step < Some(furthest));
        lag = behind
            .map(|rank| match rank.1.step {
                Some(step) => format!("{} is at step {step} of {furthest}", name(rank)),
                None => format!("{} has reported no step, others {furthest}", name(rank)),
            })
            .collect();
    }
    match lag.as_slice() {
        [] => "no rank is behind the others".to_owned(),
        [.., _] if lag.len() > 3 => format!("{} and {} more", lag[..3].join(", "), lag.len() - 3),
        _ => lag.join(", "),
    }
}

/// Whether rank 0 could not serve the store because another program took its port meanwhile.
fn is_port_taken(exit: &RankExit) -> bool {
    let said =
        |text: &str| text.contains("EADDRINUSE") || text.to_lowercase().contains("address already in use");
    exit.rank == Rank(0) && (said(&exit.stderr_tail) || exit.error.as_deref().is_some_and(said))
}

/// How a rank ended, in words.
fn describe_exit(spec: &JobSpec, node: &NodeName, exit: &RankExit) -> String {
    let how = match (exit.code, exit.signal) {
        _ if exit.out_of_memory && spec.per_proc.memory_bytes > 0 => {
            let limit = spec.per_proc.memory_bytes as f64 / f64::from(1 << 30);
            format!("ran out of memory: the kernel killed it; it may have {limit:.1} GiB")
        }
        _ if exit.out_of_memory => "ran out of memory: the kernel killed it".to_owned(),
        (_, Some(signal)) => format!("was ended by signal {signal}{}", signal_name(signal)),
        (Some(code), None) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    };
    let said = said(exit).map(|said| format!(": {said}"));
    format!("rank {} on node {node} {how}{}", exit.rank, said.unwrap_or_default())
}

/// Returns the words of a rank about its end that reasons quote.
fn said(exit: &RankExit) -> Option<String> {
    let last = exit.stderr_tail.lines().rev().find(|line| !line.trim().is_empty());
    let said = exit.error.as_deref().or(last);
    said.map(|line| line.chars().take(200).collect())
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => " (SIGHUP)",
        2 => " (SIGINT)",
        3 => " (SIGQUIT)",
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        13 => " (SIGPIPE)",
        15 => " (SIGTERM)",
        _ => "",
    }
}
