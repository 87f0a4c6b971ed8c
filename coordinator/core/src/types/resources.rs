//! Amounts of resources, and what is done with them. Nothing here overflows.

use serde::{Deserialize, Serialize};

/// An amount of resources. Its order has no meaning beside that there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Resources {
    /// Whole GPUs.
    pub gpus: u32,
    /// Thousandths of a CPU core.
    pub cpu_millis: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

impl Resources {
    /// Whether nothing is asked for.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// `self` for each of `count` processes, or the largest value where that does not fit.
    #[must_use]
    pub fn times(self, count: u32) -> Self {
        Self {
            gpus: self.gpus.saturating_mul(count),
            cpu_millis: self.cpu_millis.saturating_mul(count),
            memory_bytes: self.memory_bytes.saturating_mul(u64::from(count)),
        }
    }

    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            gpus: self.gpus.saturating_add(other.gpus),
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
        }
    }

    /// What is left of `self` once `other` is taken; zero where it is less.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            gpus: self.gpus.saturating_sub(other.gpus),
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
        }
    }
}
