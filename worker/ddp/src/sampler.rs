//! Shares a data set out among ranks. Pure arithmetic: reads no data, talks to nobody.

use crate::error::Error;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Which part of the whole is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// This rank, from 0.
    pub rank: usize,
    /// The number of ranks.
    pub world_size: usize,
}

/// One rank's part of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Which samples; never empty.
    pub indices: Vec<i64>,
    /// `indices.len() * world_size / samples of all ranks in this step`: 1 where the step divides evenly.
    ///
    /// DDP averages over ranks, so ranks whose batches differ by one sample would count too much or too
    /// little. Multiply a mean loss by this before backward and the gradient is exactly that of the
    /// step's whole batch.
    pub weight: f64,
}

/// Shuffles by seed and epoch, and gives every sample to exactly one rank in every epoch.
///
/// Unlike PyTorch's, nothing is padded and nothing is dropped when the length is not divisible. Every
/// rank still takes the same number of steps, which DDP needs: the epoch is first cut into steps of
/// (nearly) equal size, and then each step into one batch per rank. Sizes differ by at most one within a
/// step; [`Batch::weight`] makes up for that.
#[derive(Clone, Debug)]
pub struct DistributedSampler {
    len: usize,
    share: Share,
    seed: u64,
}

impl DistributedSampler {
    /// A sampler over samples `0..len`. All ranks give the same `len` and `seed`.
    ///
    /// An error where there are fewer samples than ranks.
    pub fn new(len: usize, share: Share, seed: u64) -> Result<Self, Error> {
        assert!(share.rank < share.world_size, "rank {} of {}", share.rank, share.world_size);
        if len < share.world_size {
            return Err(Error::TooFewSamples { len, world_size: share.world_size });
        }
        Ok(Self { len, share, seed })
    }

    /// The number of steps in an epoch, the same on every rank.
    ///
    /// `batch_size` is the most samples a rank gets per step. (With one exception: a batch size of 1 and a
    /// length that is not divisible makes some batches 2, rather than have one empty.)
    pub fn steps(&self, batch_size: usize) -> usize {
        let per_step = batch_size.max(1) * self.share.world_size;
        self.len.div_ceil(per_step).min(self.len / self.share.world_size)
    }

    /// This rank's batches of an epoch.
    pub fn batches(&self, epoch: u64, batch_size: usize) -> impl ExactSizeIterator<Item = Batch> + use<> {
        let order = self.order(epoch);
        let (steps, Share { rank, world_size }) = (self.steps(batch_size), self.share);
        (0..steps).map(move |step| {
            let whole = &order[part(order.len(), steps, step)];
            let indices = whole[part(whole.len(), world_size, rank)].to_vec();
            let weight = (indices.len() * world_size) as f64 / whole.len() as f64;
            Batch { indices, weight }
        })
    }

    /// All of this rank's samples of an epoch, for a loop that batches by itself.
    ///
    /// Ranks' numbers of samples differ by at most one; mind that a loop of batches over them may take a
    /// step more on one rank than on another, which [`DistributedSampler::batches`] never does.
    pub fn epoch(&self, epoch: u64) -> impl ExactSizeIterator<Item = i64> + use<> {
        let mut order = self.order(epoch);
        let mine = part(self.len, self.share.world_size, self.share.rank);
        order.truncate(mine.end);
        order.split_off(mine.start).into_iter()
    }

    /// This rank's samples in their natural order: for evaluation.
    pub fn sequential(&self) -> std::ops::Range<i64> {
        let range = part(self.len, self.share.world_size, self.share.rank);
        range.start as i64..range.end as i64
    }

    fn order(&self, epoch: u64) -> Vec<i64> {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..16].copy_from_slice(&epoch.to_le_bytes());
        let mut order: Vec<i64> = (0..self.len as i64).collect();
        order.shuffle(&mut ChaCha8Rng::from_seed(seed));
        order
    }
}

/// The `index`th of `parts` parts of `0..len`, whose sizes differ by at most one.
fn part(len: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    // In 128 bits: a product of two lengths.
    let bound = |i: usize| (len as u128 * i as u128 / parts as u128) as usize;
    bound(index)..bound(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn samplers(len: usize, world_size: usize, seed: u64) -> Vec<DistributedSampler> {
        (0..world_size)
            .map(|rank| DistributedSampler::new(len, Share { rank, world_size }, seed).unwrap())
            .collect()
    }

    proptest! {
        #[test]
        fn every_sample_goes_to_exactly_one_rank_in_equally_many_steps(
            world_size in 1usize..9, extra in 0usize..200, batch_size in 1usize..40, seed: u64, epoch: u64,
        ) {
            let len = world_size + extra;
            let samplers = samplers(len, world_size, seed);
            let ranks: Vec<Vec<Batch>> =
                samplers.iter().map(|sampler| sampler.batches(epoch, batch_size).collect()).collect();
            let mut seen = BTreeSet::new();
            for step in 0..ranks[0].len() {
                let sizes: Vec<usize> = ranks.iter().map(|batches| batches[step].indices.len()).collect();
                let (least, most) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
                prop_assert!(least >= 1 && most - least <= 1, "{sizes:?}");
                prop_assert!(most <= batch_size.max(2));
                let weights: f64 = ranks.iter().map(|batches| batches[step].weight).sum();
                prop_assert!((weights - world_size as f64).abs() < 1e-9);
            }
            for batches in &ranks {
                prop_assert_eq!(batches.len(), ranks[0].len());
                for index in batches.iter().flat_map(|batch| &batch.indices) {
                    prop_assert!(seen.insert(*index), "{} twice", index);
                }
            }
            prop_assert_eq!(seen, (0..len as i64).collect());
        }

        #[test]
        fn loops_of_their_own_and_evaluation_cover_every_sample_once(
            world_size in 1usize..9, extra in 0usize..200, seed: u64,
        ) {
            let len = world_size + extra;
            let samplers = samplers(len, world_size, seed);
            let whole: Vec<i64> = (0..len as i64).collect();
            let mut shuffled: Vec<i64> = samplers.iter().flat_map(|sampler| sampler.epoch(1)).collect();
            shuffled.sort_unstable();
            prop_assert_eq!(&shuffled, &whole);
            let sequential: Vec<i64> = samplers.iter().flat_map(DistributedSampler::sequential).collect();
            prop_assert_eq!(&sequential, &whole);
        }
    }

    #[test]
    fn order_depends_on_seed_and_epoch_and_on_nothing_else() {
        let sampler = |seed| DistributedSampler::new(100, Share { rank: 0, world_size: 1 }, seed).unwrap();
        assert_eq!(sampler(1).order(1), sampler(1).order(1));
        assert_ne!(sampler(1).order(1), sampler(1).order(2));
        assert_ne!(sampler(1).order(1), sampler(2).order(1));
    }

    #[test]
    fn fewer_samples_than_ranks_is_refused() {
        let refused = DistributedSampler::new(3, Share { rank: 0, world_size: 4 }, 0).unwrap_err();
        assert!(refused.to_string().contains("3 samples"), "{refused}");
    }
}
