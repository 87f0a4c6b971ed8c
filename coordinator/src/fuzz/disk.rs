//! What lies on the disk: the store's records, and the file of a job's points. A disk that lies must not bring the
//! coordinator down in a loop: what is damaged is refused in words.

use std::sync::LazyLock;

use muster_core::types::Millis;
use muster_core::{Caller, Config, Core, Input, Snapshot};
use muster_store::{Batch, MemoryStore, Store};
use serde::Serialize;
use serde_json::Value;

use super::cluster::{Cluster, NOW, spec};
use crate::metrics::Point;
use crate::metrics::file::Lines;
use crate::persist;

/// The keys of the records that mutations start from.
pub(super) const JOB_KEY: &str = "job/";
pub(super) const NODE_KEY: &str = "node/node-1";
pub(super) const TOKEN_KEY: &str = "token/ci";
pub(super) const BARRED_KEY: &str = "barred/node-3";

type Records = Vec<(String, Vec<u8>)>;

/// The key of the job's record, and every record of a small cluster. Made once: the records are what is tried.
static RECORDS: LazyLock<(String, Records)> = LazyLock::new(|| {
    let mut cluster = Cluster::new();
    (format!("{JOB_KEY}{}", cluster.job), cluster.store.load().expect("memory can be read"))
});

pub(super) fn stored_job(bytes: &[u8]) {
    if let Some(snapshot) = load(&RECORDS.0, bytes) {
        assert_eq!(format!("{JOB_KEY}{}", snapshot.jobs[0].id), RECORDS.0);
        same_again(&snapshot.jobs[0]);
        run(snapshot);
    }
}

pub(super) fn stored_node(bytes: &[u8]) {
    if let Some(snapshot) = load(NODE_KEY, bytes) {
        assert_eq!(format!("node/{}", snapshot.nodes[0].name), NODE_KEY);
        same_again(&snapshot.nodes[0]);
        run(snapshot);
    }
}

pub(super) fn stored_token(bytes: &[u8]) {
    if let Some(snapshot) = load(TOKEN_KEY, bytes) {
        assert_eq!(format!("token/{}", snapshot.tokens[0].name), TOKEN_KEY);
        same_again(&snapshot.tokens[0]);
        run(snapshot);
    }
}

pub(super) fn stored_barred(bytes: &[u8]) {
    if let Some(snapshot) = load(BARRED_KEY, bytes) {
        assert_eq!(format!("barred/{}", snapshot.barred[0].node), BARRED_KEY);
        same_again(&snapshot.barred[0]);
        run(snapshot);
    }
}

pub(super) fn stored_meta(bytes: &[u8]) {
    if let Some(snapshot) = load("meta", bytes) {
        same_again(&snapshot.meta);
        run(snapshot);
    }
}

/// The state of a store with that record beside valid ones, if it is accepted.
fn load(key: &str, bytes: &[u8]) -> Option<Snapshot> {
    let mut store = MemoryStore::default();
    let fence = store.campaign().expect("memory has room");
    let mut batch = Batch::default();
    for (other, value) in &RECORDS.1 {
        // Others of the record's kind are left out: it stands for itself.
        if !other.starts_with(key.split('/').next().unwrap_or_default()) {
            batch.put(other.clone(), value.clone());
        }
    }
    batch.put(key.to_owned(), bytes.to_vec());
    store.commit(fence, &batch).expect("memory has room");
    match persist::load(&mut store) {
        Ok(snapshot) => Some(snapshot),
        Err(error) => {
            assert!(error.to_string().contains(key), "the refusal names the record: {error}");
            None
        }
    }
}

fn same_again<T: Serialize + serde::de::DeserializeOwned>(record: &T) {
    let json = |record: &T| serde_json::to_value(record).expect("records are JSON");
    let again: T =
        serde_json::from_slice(&serde_json::to_vec(record).expect("records are JSON")).expect("it reads");
    assert_eq!(json(&again), json(record));
}

/// A coordinator starts on it, and goes on until every deadline has passed.
fn run(snapshot: Snapshot) {
    let (mut core, _) = Core::load(NOW, Config::default(), 1, snapshot);
    core.step(NOW, Input::Submit { by: Caller::trusted(), request_id: None, spec: Box::new(spec(1, 1, 0)) });
    for at in [NOW, NOW.plus(Millis::from_secs(48 * 3600)), Millis(u64::MAX)] {
        core.step(at, Input::Tick);
    }
}

/// Valid records of the kind: one as it is, and one of a job that has ended.
pub(super) fn samples(prefix: &str) -> Vec<Vec<u8>> {
    let mut cluster = Cluster::new();
    let running = RECORDS.1.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, value)| value.clone());
    cluster.feed(Input::Cancel {
        by: Caller::trusted(),
        job: cluster.job.to_string(),
        reason: "by hand".into(),
        signal: None,
    });
    let (node, session) = (cluster.node.clone(), cluster.session);
    cluster.feed(Input::Goodbye { node, session });
    let ended = cluster.store.load().expect("memory can be read").into_iter();
    running.chain(ended.filter(|(key, _)| key.starts_with(prefix)).map(|(_, value)| value)).collect()
}

pub(super) fn points_file(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        let mut lines = Lines::after(0, bytes);
        let (indices, points): (Vec<u64>, Vec<Point>) = lines.by_ref().unzip();
        assert!(indices.is_sorted_by(|a, b| a < b), "an index rises");
        (usize::try_from(lines.bytes()).expect("it is less than the file"), points)
    };
    let (whole, points) = read(bytes);
    // The next write goes there.
    assert!(whole <= bytes.len() && (whole == 0 || bytes[whole - 1] == b'\n'));
    // As text, for NaN equals nothing.
    assert_eq!(format!("{:?}", read(&bytes[..whole])), format!("{:?}", (whole, &points)));
    let series = crate::metrics::Series::of(points.clone());
    let kept = series.after(0, usize::MAX);
    assert!(kept.len() <= points.len() && kept.is_sorted_by(|a, b| a.0 < b.0));
    for point in &points {
        let again: Value = serde_json::to_value(point).expect("points are JSON");
        let again = serde_json::from_value::<Point>(again).expect("it reads");
        assert_eq!(format!("{again:?}"), format!("{point:?}"));
        crate::view::point(point);
    }
}

pub(super) fn points_samples() -> Vec<Vec<u8>> {
    let line = |generation: u32, rank: u32, seq: u64, loss: &str| {
        format!(
            r#"{{"generation":{generation},"rank":{rank},"seq":{seq},"step":{seq},"time":{},"values":{{"loss":{loss}}}}}"#,
            NOW.plus(Millis(seq)).0
        ) + "\n"
    };
    let file = [
        line(1, 0, 1, "2.5"),
        line(1, 1, 1, "\"NaN\""),
        line(1, 0, 2, "1e-300"),
        line(2, 0, 1, "\"-Infinity\""),
    ]
    .concat();
    let torn = file[..file.len() - 7].to_owned();
    [file, torn, line(u32::MAX, u32::MAX, u64::MAX, "1.0"), "x".repeat(100_000)]
        .map(String::into_bytes)
        .into()
}
