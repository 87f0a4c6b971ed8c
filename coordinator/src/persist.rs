//! Between the core's records and the store's bytes: JSON, so that a store can be read by people.

use std::num::NonZero;
use std::panic::resume_unwind;

use muster_core::access::{Barred, Token};
use muster_core::types::{JobId, NodeName, NodePlacement, TokenName, limits};
use muster_core::{Job, Meta, Node, Snapshot, Write};
use muster_store::{Batch, Store};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// Version of the records. A store with a newer one is refused rather than misread.
const SCHEMA: u32 = 1;
/// Rows that are worth a thread.
const ROWS_MIN: usize = 1024;
/// No cluster counts so far; a larger count is damage.
const COUNT_MAX: u64 = 1 << 62;

/// Reads everything. An empty store gives an empty snapshot.
///
/// Records are read by all processors: a large cluster waits for this when its coordinator starts again.
pub(crate) fn load(store: &mut dyn Store) -> Result<Snapshot, Error> {
    let rows = store.load()?;
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = rows.len().div_ceil(threads).max(ROWS_MIN);
    let parts = std::thread::scope(|scope| {
        let reading: Vec<_> = rows.chunks(share).map(|rows| scope.spawn(|| read(rows))).collect();
        reading
            .into_iter()
            .map(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect::<Vec<_>>()
    });
    let mut snapshot = Snapshot::default();
    for part in parts {
        let Snapshot { meta, jobs, nodes, tokens, barred } = part?;
        snapshot.meta = snapshot.meta.or(meta);
        snapshot.jobs.extend(jobs);
        snapshot.nodes.extend(nodes);
        snapshot.tokens.extend(tokens);
        snapshot.barred.extend(barred);
    }
    Ok(snapshot)
}

fn read(rows: &[(String, Vec<u8>)]) -> Result<Snapshot, Error> {
    let mut snapshot = Snapshot::default();
    for (key, value) in rows {
        match key.split_once('/') {
            None if key == "schema" => check_schema(decode(key, value)?)?,
            None if key == "meta" => snapshot.meta = Some(checked(key, decode(key, value)?, meta)?),
            Some(("job", id)) => {
                snapshot.jobs.push(checked(key, decode(key, value)?, |record| job(id, record))?);
            }
            Some(("node", name)) => {
                snapshot.nodes.push(checked(key, decode(key, value)?, |record| node(name, record))?);
            }
            Some(("token", name)) => {
                snapshot.tokens.push(checked(key, decode(key, value)?, |record| token(name, record))?);
            }
            Some(("barred", name)) => {
                let record = checked(key, decode(key, value)?, |record: &Barred| {
                    ensure(record.node.as_str() == name, "it belongs under another key")
                })?;
                snapshot.barred.push(record);
            }
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

/// A record that is JSON and still not one that the core has written would bring the core down, each time that
/// the coordinator starts: it is refused in words instead.
fn checked<T>(key: &str, record: T, check: impl Fn(&T) -> Result<(), String>) -> Result<T, Error> {
    match check(&record) {
        Ok(()) => Ok(record),
        Err(why) => Err(Error::Decode(format!("the record {key:?} is damaged: {why}"))),
    }
}

fn ensure(ok: bool, why: &str) -> Result<(), String> {
    if ok { Ok(()) } else { Err(why.to_owned()) }
}

fn meta(meta: &Meta) -> Result<(), String> {
    ensure(meta.orders.max(meta.sessions) <= COUNT_MAX, "a counter is beyond what can be counted")
}

fn job(id: &str, job: &Job) -> Result<(), String> {
    JobId::new(job.id.as_str())?;
    ensure(job.id.as_str() == id, "it belongs under another key")?;
    let spec = &job.spec;
    let in_range = spec.max_nodes <= limits::NODES_MAX && spec.procs_per_node <= limits::PROCS_PER_NODE_MAX;
    ensure(in_range && spec.min_nodes <= spec.max_nodes, "its counts are out of range")?;
    ensure(job.generation.0 < u32::MAX && job.restarts_used < u32::MAX, "its generation is beyond the last")?;
    let gang = job.gang.iter().map(|gang| &gang.placements);
    gang.chain(job.past.iter().map(|past| &past.placements)).try_for_each(|nodes| placements(nodes))
}

fn placements(placements: &[NodePlacement]) -> Result<(), String> {
    let mut next = 0;
    for (group_rank, placement) in (0..).zip(placements) {
        NodeName::new(placement.node.as_str())?;
        let follows = placement.group_rank == group_rank && placement.first_rank.0 == next;
        ensure(follows && placement.procs > 0, "its ranks are not contiguous")?;
        next = next.saturating_add(placement.procs);
    }
    ensure(next <= limits::WORLD_SIZE_MAX, "it has more ranks than a gang can have")
}

fn node(name: &str, node: &Node) -> Result<(), String> {
    NodeName::new(node.name.as_str())?;
    ensure(node.name.as_str() == name, "it belongs under another key")
}

fn token(name: &str, token: &Token) -> Result<(), String> {
    TokenName::new(token.name.as_str())?;
    ensure(token.name.as_str() == name, "it belongs under another key")
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
        Write::Token(token) => put(batch, format!("token/{}", token.name), token),
        Write::DeleteToken(name) => batch.delete(format!("token/{name}")),
        Write::Barred(barred) => put(batch, format!("barred/{}", barred.node), barred),
        Write::DeleteBarred(node) => batch.delete(format!("barred/{node}")),
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
