//! From the states of a shim to what is new in them for the core.

use muster_core::types::GangId;
use muster_worker_core::Input;

use super::protocol::{Phase, State};

/// The state of which the core knows.
#[derive(Debug, Default)]
pub(super) struct Told(State);

impl Told {
    /// After an adoption, which tells that the gang was launched, and the exits.
    pub fn adopted(state: &State) -> Self {
        Self(State { phase: Phase::Running, exits: state.exits.clone(), ..State::default() })
    }

    /// What a state adds to it.
    pub fn inputs(&mut self, gang: &GangId, state: &State) -> Vec<Input> {
        let before = std::mem::replace(&mut self.0, state.clone());
        let is_new = |holds: fn(&State) -> bool| holds(state) && !holds(&before);
        let mut inputs = Vec::new();
        // A state may have been passed over for a later one.
        if is_new(|state| state.phase == Phase::Prepared || was_launched(state)) {
            inputs.push(Input::Prepared(gang.clone(), state.master_port));
        }
        if state.processes != before.processes {
            inputs.push(Input::Processes(gang.clone(), state.processes.clone()));
        }
        if is_new(was_launched) {
            inputs.push(Input::Launched(gang.clone()));
        }
        if is_new(|state| state.fenced) {
            inputs.push(Input::Fenced(gang.clone()));
        }
        // Exits are only ever added, at the end.
        let exits = state.exits.iter().skip(before.exits.len());
        inputs.extend(exits.map(|exit| Input::Exited(gang.clone(), exit.clone())));
        if state.quiet != before.quiet {
            inputs.push(Input::Quiet(gang.clone(), state.quiet.clone()));
        }
        if state.rendezvous != before.rendezvous {
            inputs.push(Input::Rendezvous(gang.clone(), state.rendezvous.clone()));
        }
        if is_new(|state| !state.killed.is_empty()) {
            inputs.push(Input::Killed(gang.clone()));
        }
        if is_new(|state| state.phase == Phase::Stopped) {
            inputs.push(match &state.error {
                Some(error) => Input::Failed(gang.clone(), error.clone()),
                None => Input::Gone(gang.clone()),
            });
        }
        inputs
    }
}

fn was_launched(state: &State) -> bool {
    state.phase == Phase::Running || !state.exits.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{Generation, JobId, Millis, Rank, RankExit, RendezvousReport};

    #[test]
    fn each_thing_is_told_once_whatever_states_are_passed_over() {
        let gang = GangId { job: JobId::new("j").unwrap(), generation: Generation(1) };
        let exit = |rank| RankExit {
            rank: Rank(rank),
            code: Some(0),
            signal: None,
            time: Millis(0),
            stderr_tail: String::new(),
            out_of_memory: false,
            error: None,
        };
        let state =
            |phase, exits: u32| State { phase, exits: (0..exits).map(exit).collect(), ..State::default() };
        let stuck = |come| State {
            processes: vec![7],
            rendezvous: Some(Box::new(RendezvousReport { come, ..RendezvousReport::default() })),
            ..state(Phase::Running, 0)
        };
        let table: [(&[State], &str); 5] = [
            (&[state(Phase::Prepared, 0), state(Phase::Running, 1), state(Phase::Stopped, 2)], "PLEEG"),
            (&[state(Phase::Preparing, 0), state(Phase::Stopped, 2), state(Phase::Stopped, 2)], "PLEEG"),
            (&[State { error: Some("x".into()), ..state(Phase::Stopped, 0) }], "F"),
            (
                &[
                    State { fenced: true, killed: vec![Rank(0)], ..state(Phase::Running, 0) },
                    State { fenced: true, ..state(Phase::Stopped, 1) },
                ],
                "PLfkEG",
            ),
            (
                &[stuck(1), stuck(1), stuck(2), State { processes: vec![7], ..state(Phase::Running, 0) }],
                "PpLrrr",
            ),
        ];
        for (states, expected) in table {
            let mut told = Told::default();
            let inputs = states.iter().flat_map(|state| told.inputs(&gang, state));
            let letters: String = inputs
                .map(|input| match input {
                    Input::Prepared(..) => 'P',
                    Input::Launched(_) => 'L',
                    Input::Exited(..) => 'E',
                    Input::Gone(_) => 'G',
                    Input::Failed(..) => 'F',
                    Input::Fenced(_) => 'f',
                    Input::Killed(..) => 'k',
                    Input::Processes(..) => 'p',
                    Input::Rendezvous(..) => 'r',
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(letters, expected);
        }
    }
}
