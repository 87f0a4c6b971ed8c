//! What a checkpoint says of itself: one line of JSON, and one with its SHA-256.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Error;

/// The file with the bytes.
pub(crate) const DATA: &str = "data";
/// The file that says what they are.
pub(crate) const MANIFEST: &str = "manifest";
/// Ends the name of an earlier writer's checkpoint while one of the same step takes its place.
pub(crate) const REPLACED: &str = "replaced";
/// Version of the format; a newer one is not read.
const FORMAT: u32 = 1;

/// Something that has a name: a tensor, or any bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Unique in its checkpoint.
    pub name: String,
    /// What the bytes are, such as `f32`; whoever reads it knows.
    pub kind: String,
    /// The lengths of a tensor's dimensions; empty for anything else.
    pub shape: Vec<i64>,
    /// The bytes.
    pub data: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub format: u32,
    pub step: u64,
    pub world_size: u32,
    pub job: String,
    pub generation: u64,
    /// The claim under which it was written: of two checkpoints the one with the later claim is the newer.
    pub claim: u64,
    pub parts: Vec<PartEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PartEntry {
    pub name: String,
    pub kind: String,
    pub shape: Vec<i64>,
    pub bytes: u64,
    pub sha256: String,
}

/// The directory of a step, so that a listing is in order.
pub(crate) fn dir_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step that a directory is of.
pub(crate) fn step_of(dir: &Path) -> Option<u64> {
    let name = dir.file_name()?.to_str()?.strip_prefix("step-")?;
    name.strip_suffix(REPLACED).and_then(|name| name.strip_suffix('.')).unwrap_or(name).parse().ok()
}

impl Manifest {
    pub(crate) fn of(
        parts: &[Part],
        step: u64,
        world_size: u32,
        job: String,
        generation: u64,
        claim: u64,
    ) -> Result<Self, Error> {
        let mut names = BTreeSet::new();
        if let Some(twice) = parts.iter().find(|part| !names.insert(&part.name)) {
            return Err(Error::TwoParts(twice.name.clone()));
        }
        let parts = parts.iter().map(|part| PartEntry {
            name: part.name.clone(),
            kind: part.kind.clone(),
            shape: part.shape.clone(),
            bytes: part.data.len() as u64,
            sha256: hex(&part.data),
        });
        Ok(Self { format: FORMAT, step, world_size, job, generation, claim, parts: parts.collect() })
    }

    pub(crate) fn encode(&self) -> String {
        #[expect(clippy::expect_used, reason = "strings and numbers are always valid JSON")]
        let line = serde_json::to_string(self).expect("a manifest is valid JSON");
        let sum = hex(line.as_bytes());
        format!("{line}\n{sum}\n")
    }

    /// Reads and checks it; an error says what is wrong.
    pub(crate) fn read(dir: &Path) -> Result<Self, String> {
        let text = match std::fs::read_to_string(dir.join(MANIFEST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err("it has no manifest".to_owned());
            }
            read => read.map_err(|error| format!("its manifest cannot be read: {error}"))?,
        };
        let mut lines = text.split('\n');
        let (Some(line), Some(sum)) = (lines.next(), lines.next()) else {
            return Err("its manifest is cut short".to_owned());
        };
        if hex(line.as_bytes()) != sum {
            return Err("its manifest is damaged or cut short".to_owned());
        }
        let manifest: Self = serde_json::from_str(line)
            .map_err(|error| format!("its manifest cannot be understood: {error}"))?;
        if manifest.format > FORMAT {
            return Err(format!("it has format {}, and this version knows {FORMAT}", manifest.format));
        }
        Ok(manifest)
    }

    /// Takes the bytes of every part, and checks them.
    pub(crate) fn parts(&self, mut data: &[u8]) -> Result<Vec<Part>, String> {
        let mut parts = Vec::new();
        for entry in &self.parts {
            let bytes = usize::try_from(entry.bytes).map_err(|_| format!("{} is too large", entry.name))?;
            let Some((mine, rest)) = data.split_at_checked(bytes) else {
                return Err(format!("its data end before {}", entry.name));
            };
            if hex(mine) != entry.sha256 {
                return Err(format!("{} is damaged", entry.name));
            }
            let PartEntry { name, kind, shape, .. } = entry.clone();
            parts.push(Part { name, kind, shape, data: mine.to_vec() });
            data = rest;
        }
        if data.is_empty() { Ok(parts) } else { Err("it has more data than its manifest says".to_owned()) }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(half.into(), 16).unwrap_or_default();
    Sha256::digest(bytes).iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
