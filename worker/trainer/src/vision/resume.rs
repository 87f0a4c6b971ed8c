//! Going on where an earlier start of the job was: rank 0 reads and writes checkpoints, the others take what it has.

use super::sgd::Sgd;
use anyhow::Context as _;
use muster_ddp::checkpoint::{Checkpoint, Checkpoints, Found, Owner, Part, latest};
use muster_ddp::{ProcessGroup, model_parts, restore_model};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Tensor, nn};

/// The part that says where training was.
const POSITION: &str = "position";
/// Checkpoints that are kept: should the newest be damaged, there are others.
const KEEP: usize = 3;

/// How far training has come, in terms that hold for any number of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data that are done.
    pub epochs: u64,
    /// Steps of the one under way that are done.
    pub steps: u64,
    /// Steps that a pass had.
    pub steps_per_epoch: u64,
}

impl Position {
    /// The same place where a pass has another number of steps.
    fn scaled(self, steps_per_epoch: u64) -> Self {
        let steps = self.steps * steps_per_epoch / self.steps_per_epoch.max(1);
        Self { steps, steps_per_epoch, ..self }
    }

    /// All steps that are done.
    pub fn total(self) -> u64 {
        self.epochs * self.steps_per_epoch + self.steps
    }
}

/// Writes checkpoints on rank 0.
#[derive(Debug)]
pub struct Saver {
    checkpoints: Checkpoints,
    world_size: u32,
}

/// Finds where to go on, before the model travels from rank 0 to the others. On other ranks there is nothing to do.
pub fn prepare(
    dir: Option<&Path>,
    group: &ProcessGroup,
    vs: &nn::VarStore,
    sgd: &mut Sgd,
) -> anyhow::Result<(Option<Saver>, Position)> {
    let (Some(dir), true) = (dir, group.is_first()) else { return Ok((None, Position::default())) };
    let checkpoints = match Checkpoints::open(dir, Owner::from_env(), KEEP) {
        // A full disk costs new checkpoints, not training.
        Err(error) if error.is_full() => {
            eprintln!("warning: training goes on without new checkpoints: {error}");
            None
        }
        opened => Some(opened?),
    };
    let Found { checkpoint, skipped } = latest(dir)?;
    for half in skipped {
        eprintln!("warning: {half}");
    }
    let position = match checkpoint {
        Some(checkpoint) => restore(&checkpoint, vs, sgd).with_context(|| {
            format!(
                "failed to go on from a checkpoint; to start anew, remove {} or name another",
                dir.display()
            )
        })?,
        None => Position::default(),
    };
    let world_size = group.world_size() as u32;
    Ok((checkpoints.map(|checkpoints| Saver { checkpoints, world_size }), position))
}

fn restore(checkpoint: &Checkpoint, vs: &nn::VarStore, sgd: &mut Sgd) -> anyhow::Result<Position> {
    restore_model(vs, checkpoint)?;
    sgd.restore(checkpoint)?;
    let position = checkpoint.part(POSITION).context("it does not say where training was")?;
    let position = serde_json::from_slice(&position.data).context("it does not say where training was")?;
    let Checkpoint { path, step, world_size, generation, .. } = checkpoint;
    println!(
        "going on from step {step} of {}, written by {world_size} ranks of generation {generation}",
        path.display()
    );
    Ok(position)
}

/// Gives every rank rank 0's position and momenta; the model travels by itself. A collective.
pub fn share(
    position: Position,
    steps_per_epoch: u64,
    group: &ProcessGroup,
    sgd: &mut Sgd,
) -> anyhow::Result<Position> {
    let numbers = [position.epochs, position.steps, position.steps_per_epoch].map(u64::cast_signed);
    let mut tensor = Tensor::from_slice(&numbers);
    group.broadcast(&mut tensor, 0)?;
    let [epochs, steps, before] = [0, 1, 2].map(|at| tensor.int64_value(&[at]).cast_unsigned());
    let position = Position { epochs, steps, steps_per_epoch: before };
    if position != Position::default() {
        sgd.broadcast(group)?;
    }
    Ok(position.scaled(steps_per_epoch))
}

impl Saver {
    /// Writes a checkpoint. An error means that another start of the job has taken over; anything else is a warning.
    pub fn save(&self, position: Position, vs: &nn::VarStore, sgd: &Sgd) -> anyhow::Result<()> {
        let mut parts = model_parts(vs);
        parts.extend(sgd.parts());
        let data = serde_json::to_vec(&position)?;
        parts.push(Part { name: POSITION.to_owned(), kind: "json".to_owned(), shape: vec![], data });
        match self.checkpoints.save(position.total(), self.world_size, &parts) {
            Err(error) if error.is_superseded() => Err(error).context("this process has been replaced"),
            Err(error) => {
                eprintln!("warning: training goes on, and the last checkpoint stays: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Position;

    #[test]
    fn the_place_is_the_same_with_another_number_of_ranks() {
        let half = Position { epochs: 3, steps: 50, steps_per_epoch: 100 };
        assert_eq!(half.total(), 350);
        for steps_per_epoch in [100, 200, 51] {
            let there = half.scaled(steps_per_epoch);
            assert_eq!((there.epochs, there.steps), (3, steps_per_epoch / 2));
        }
        assert_eq!(Position::default().scaled(9), Position { steps_per_epoch: 9, ..Position::default() });
    }
}
