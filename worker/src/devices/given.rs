//! What a file says of a machine in the place of what is there, so that GPUs and InfiniBand can be tested without either.

use std::fmt;
use std::sync::Arc;

use muster_core::Inventory;
use muster_proto::{convert, v1};

type Read = dyn Fn() -> Result<v1::Inventory, String> + Send + Sync;

/// Reads the description. It is read again at each look at the machine, so that a test can change it.
#[derive(Clone)]
pub struct Given(Arc<Read>);

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given(..)")
    }
}

impl Given {
    /// `read` gives the description, or says what is wrong with it.
    pub fn new(read: impl Fn() -> Result<v1::Inventory, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// What is named in the description replaces what was found; what is not is as it was found.
    pub(super) fn merge_into(&self, found: &mut Inventory) -> Result<(), String> {
        fn replace<T: Default + PartialEq>(found: &mut T, said: T) {
            if said != T::default() {
                *found = said;
            }
        }
        let said = convert::inventory_from_wire((self.0)()?).map_err(|error| error.to_string())?;
        replace(&mut found.total.cpu_millis, said.total.cpu_millis);
        replace(&mut found.total.memory_bytes, said.total.memory_bytes);
        replace(&mut found.gpus, said.gpus);
        replace(&mut found.hostname, said.hostname);
        replace(&mut found.fabric_ports, said.fabric_ports);
        replace(&mut found.interfaces, said.interfaces);
        replace(&mut found.numa_nodes, said.numa_nodes);
        replace(&mut found.shm_bytes, said.shm_bytes);
        replace(&mut found.memlock_bytes, said.memlock_bytes);
        replace(&mut found.open_files_max, said.open_files_max);
        replace(&mut found.driver_version, said.driver_version);
        replace(&mut found.cuda_version, said.cuda_version);
        replace(&mut found.gpu_fault, said.gpu_fault);
        found.labels.extend(said.labels);
        Ok(())
    }
}
