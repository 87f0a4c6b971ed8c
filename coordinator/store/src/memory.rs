//! A store that lasts as long as its process: for tests, and to run without a disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Batch, Error, Fence, Store};

/// Shared by its clones, so that a second coordinator can be tried on the same state.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    fence: u64,
    values: BTreeMap<String, Vec<u8>>,
}

impl MemoryStore {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the map half changed: each change is one insert or remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn campaign(&mut self) -> Result<Fence, Error> {
        let mut state = self.state();
        state.fence += 1;
        Ok(Fence(state.fence))
    }

    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        Ok(self.state().values.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&mut self, fence: Fence, batch: &Batch) -> Result<(), Error> {
        let mut state = self.state();
        if fence.0 != state.fence {
            return Err(Error::Fenced);
        }
        for (key, value) in &batch.puts {
            state.values.insert(key.clone(), value.clone());
        }
        for key in &batch.deletes {
            state.values.remove(key);
        }
        Ok(())
    }
}
