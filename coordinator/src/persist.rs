//! Between the core's records and the store's bytes: JSON, so that a store can be read by people.

use muster_core::{Job, Meta, Node, Snapshot, Write};
use muster_store::{Batch, Store};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// Version of the records. A store with a newer one is refused rather than misread.
const SCHEMA: u32 = 1;

/// Reads everything. An empty store gives an empty snapshot.
pub(crate) fn load(store: &mut dyn Store) -> Result<Snapshot, Error> {
    let mut snapshot = Snapshot::default();
    for (key, value) in store.load()? {
        match key.split_once('/') {
            None if key == "schema" => check_schema(decode(&key, &value)?)?,
            None if key == "meta" => snapshot.meta = Some(decode::<Meta>(&key, &value)?),
            Some(("job", _)) => snapshot.jobs.push(decode::<Job>(&key, &value)?),
            Some(("node", _)) => snapshot.nodes.push(decode::<Node>(&key, &value)?),
            None | Some(_) => {
                return Err(Error::Decode(format!("the key {key:?} is not known to this version")));
            }
        }
    }
    Ok(snapshot)
}

fn check_schema(found: u32) -> Result<(), Error> {
    if found > SCHEMA {
        return Err(Error::Decode(format!(
            "it has schema {found}, and this version knows {SCHEMA}; use the version that wrote it, or a newer one"
        )));
    }
    Ok(())
}

/// Adds one change to a batch.
pub(crate) fn encode(batch: &mut Batch, write: &Write) {
    match write {
        Write::Meta(meta) => {
            put(batch, "schema".to_owned(), &SCHEMA);
            put(batch, "meta".to_owned(), meta);
        }
        Write::Job(job) => put(batch, format!("job/{}", job.id), job),
        Write::DeleteJob(id) => batch.delete(format!("job/{id}")),
        Write::Node(node) => put(batch, format!("node/{}", node.name), node),
        Write::DeleteNode(name) => batch.delete(format!("node/{name}")),
    }
}

fn put(batch: &mut Batch, key: String, record: &impl Serialize) {
    // Our records have string keys and no fallible serializer: encoding them cannot fail. Should a future
    // record break that, losing it silently would be worse than stopping.
    #[expect(clippy::expect_used, reason = "see above")]
    let value = serde_json::to_vec(record).expect("records of the core are valid JSON");
    batch.put(key, value);
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(value)
        .map_err(|error| Error::Decode(format!("the record {key:?} is not valid: {error}")))
}
