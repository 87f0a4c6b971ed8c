//! Where the data may be. Looks at names only; reading is somebody else's.

use std::path::{Path, PathBuf};

/// Where Debian's package `dataset-fashion-mnist` puts it.
const SYSTEM: &str = "/usr/share/datasets/fashion-mnist";
/// Without this file a directory is not a data set.
const MARKER: &str = "train-images-idx3-ubyte.gz";
/// Levels walked up from the program and from the current directory.
const PARENTS_MAX: usize = 16;

/// No directory holds a data set.
#[derive(Debug, thiserror::Error)]
#[error("found no {MARKER} in any of {}: run `cargo xtask setup`, or say where it is with --data", list(.looked_at))]
pub struct NotFound {
    looked_at: Vec<PathBuf>,
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The directory of the data set: `--data`, else $MUSTER_DATA, else `.deps/data/*` of a parent of the
/// program or of the current directory, else Debian's package.
///
/// An explicit place is not searched beyond: training on other data than was asked for helps nobody.
pub fn find(flag: Option<&Path>) -> Result<PathBuf, NotFound> {
    let variable = std::env::var_os("MUSTER_DATA").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    if let Some(dir) = flag.map(Path::to_owned).or(variable) {
        return among(vec![dir]);
    }
    let program = std::env::current_exe().and_then(std::fs::canonicalize).ok();
    let current = std::env::current_dir().ok();
    let mut places: Vec<PathBuf> = [program, current]
        .iter()
        .flatten()
        .flat_map(|start| start.ancestors().take(PARENTS_MAX))
        .map(|parent| parent.join(".deps/data"))
        .collect();
    places.push(PathBuf::from(SYSTEM));
    let mut seen = std::collections::BTreeSet::new();
    places.retain(|place| seen.insert(place.clone()));
    among(places)
}

/// The first place that is a data set or has one directly inside, in the order of names.
fn among(places: Vec<PathBuf>) -> Result<PathBuf, NotFound> {
    let is_data_set = |dir: &PathBuf| dir.join(MARKER).is_file();
    for place in &places {
        let mut inside: Vec<PathBuf> =
            std::fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        // Fashion-MNIST before whatever else there is.
        inside.sort_by_key(|dir| (!dir.ends_with("fashion-mnist"), dir.clone()));
        if let Some(found) = std::iter::once(place.clone()).chain(inside).find(is_data_set) {
            return Ok(found);
        }
    }
    Err(NotFound { looked_at: places })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_data_set_or_has_one_inside() {
        let dir = tempfile::tempdir().unwrap();
        let refused = find(Some(dir.path())).unwrap_err().to_string();
        assert!(refused.contains(&dir.path().display().to_string()), "{refused}");
        assert!(refused.contains("cargo xtask setup"), "{refused}");
        for name in ["digits", "fashion-mnist"] {
            let inside = dir.path().join(name);
            std::fs::create_dir(&inside).unwrap();
            std::fs::write(inside.join(MARKER), b"").unwrap();
            assert_eq!(find(Some(dir.path())).unwrap(), inside);
            assert_eq!(find(Some(&inside)).unwrap(), inside);
        }
    }
}
