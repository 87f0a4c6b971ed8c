//! From a schedule that fails to a small one that does.

use crate::{Entry, Outcome, run};

/// Runs that shrinking may take.
const RUNS_MAX: usize = 2_000;

/// Drops entries as long as the rest still fails. Gives the entries' indices in the schedule, and how it ends.
pub fn shrink(seed: u64, schedule: &[Entry]) -> (Vec<usize>, Outcome) {
    let try_with =
        |kept: &[usize]| run(seed, kept.iter().map(|index| schedule[*index].clone()).collect(), false);
    let mut kept: Vec<usize> = (0..schedule.len()).collect();
    let mut outcome = try_with(&kept);
    let (mut chunk, mut runs) = (kept.len().div_ceil(2), 0);
    while chunk > 0 && runs < RUNS_MAX {
        let (mut start, mut smaller) = (0, false);
        while start < kept.len() && runs < RUNS_MAX {
            let without: Vec<usize> = kept
                .iter()
                .enumerate()
                .filter(|(at, _)| !(start..start + chunk).contains(at))
                .map(|(_, i)| *i)
                .collect();
            runs += 1;
            let shorter = try_with(&without);
            if shorter.violation.is_some() {
                (kept, outcome, smaller) = (without, shorter, true);
            } else {
                start += chunk;
            }
        }
        chunk = match (smaller, chunk) {
            (true, chunk) => chunk.min(kept.len()),
            (false, 1) => 0,
            (false, chunk) => chunk / 2,
        };
    }
    (kept, outcome)
}
