//! The shared libraries of what is brought. Each program and library in a tree of unpacked packages is
//! told where its own libraries are (its RUNPATH), so that it works in whatever environment it is
//! started, and so do the processes that it starts.
//!
//! It is told twice. Relative to the file, they are found wherever the tree is. By their final place,
//! they are found by a program that starts a copy of itself from memory, as buildah does.

use crate::deps::Deps;
use crate::minimal;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What every executable and shared library begins with.
const ELF: [u8; 4] = *b"\x7fELF";

/// How patchelf says that a file is linked to nothing.
const STATIC: &str = "cannot find section '.dynamic'";

/// Programs and libraries below a folder.
struct Tree {
    /// Executables, libraries and plug-ins, each once: no symbolic links.
    files: Vec<PathBuf>,
    /// The folder of each library name.
    folders: BTreeMap<String, PathBuf>,
}

/// Has each file of a tree find its libraries in the tree, which will lie at `place`, and fails if one
/// needs what neither the tree nor a minimal system has.
pub fn bind(deps: &Deps, tree: &Path, place: &Path) -> Result<()> {
    let patchelf = deps.path("bin/patchelf");
    let found = Tree::of(tree)?;
    for file in &found.files {
        let folders: BTreeSet<&PathBuf> =
            needed(&patchelf, file)?.iter().filter_map(|name| found.folders.get(name)).collect();
        if folders.is_empty() {
            continue;
        }
        let home = file.parent().context("a file lies in no folder")?;
        let mut runpath = Vec::new();
        for folder in folders {
            runpath.push(format!("$ORIGIN/{}", way(home, folder)));
            runpath.push(place.join(folder.strip_prefix(tree)?).display().to_string());
        }
        let runpath = runpath.join(":");
        patch(&patchelf, file, &["--set-rpath", &runpath])?;
    }
    let lacks = lacking(&patchelf, tree)?;
    if !lacks.is_empty() {
        bail!("libraries are missing: {}", lacks.join("; "));
    }
    Ok(())
}

/// Returns what files below `place` need and neither find there nor in a minimal system, in words.
pub fn lacking(patchelf: &Path, place: &Path) -> Result<Vec<String>> {
    let has = minimal::libraries(&minimal::packages()?)?;
    let mut lacks = Vec::new();
    for file in Tree::of(place)?.files {
        let beyond: Vec<String> =
            needed(patchelf, &file)?.into_iter().filter(|name| !has.contains(name)).collect();
        if beyond.is_empty() {
            continue;
        }
        let runpath = patch(patchelf, &file, &["--print-rpath"])?;
        let home = file.parent().context("a file lies in no folder")?;
        for name in beyond {
            let finds = |folder: &str| {
                let folder = folder.strip_prefix("$ORIGIN/");
                folder.is_some_and(|folder| home.join(folder).join(&name).is_file())
            };
            if !runpath.trim().split(':').any(finds) {
                lacks.push(format!("{} needs {name}", file.display()));
            }
        }
    }
    Ok(lacks)
}

impl Tree {
    fn of(place: &Path) -> Result<Self> {
        let mut tree = Self { files: Vec::new(), folders: BTreeMap::new() };
        tree.add(place)?;
        Ok(tree)
    }

    fn add(&mut self, place: &Path) -> Result<()> {
        if place.is_dir() {
            let entries =
                fs::read_dir(place).with_context(|| format!("failed to list {}", place.display()))?;
            let mut paths =
                entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>()?;
            paths.sort();
            // A link to a folder may lead anywhere; what it leads to in the tree is found there.
            return paths
                .iter()
                .filter(|path| !path.is_symlink() || path.is_file())
                .try_for_each(|path| self.add(path));
        }
        if !begins_as_elf(place) {
            return Ok(());
        }
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(folder) = place.parent().filter(|_| name.contains(".so")) {
            self.folders.entry(name).or_insert_with(|| folder.to_owned());
        }
        if !place.is_symlink() {
            self.files.push(place.to_owned());
        }
        Ok(())
    }
}

fn begins_as_elf(file: &Path) -> bool {
    let mut first = [0; ELF.len()];
    // What is no file, or leads nowhere, is no program.
    let read =
        file.is_file() && fs::File::open(file).is_ok_and(|mut file| file.read_exact(&mut first).is_ok());
    read && first == ELF
}

/// Returns the names of the libraries that a file is linked to; none if it is static.
fn needed(patchelf: &Path, file: &Path) -> Result<Vec<String>> {
    Ok(patch(patchelf, file, &["--print-needed"])?.lines().map(str::to_owned).collect())
}

/// Runs patchelf on a file. A static program has nothing to be asked for or to be changed.
fn patch(patchelf: &Path, file: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(patchelf).args(args).arg(file).output().context("failed to start patchelf")?;
    let words = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        if words.contains(STATIC) {
            return Ok(String::new());
        }
        bail!("patchelf failed on {}: {}", file.display(), words.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns the way from one folder to another of the same tree.
fn way(from: &Path, to: &Path) -> String {
    let [from, to] = [from, to].map(|path| path.components().collect::<Vec<_>>());
    let shared = from.iter().zip(&to).take_while(|(one, other)| one == other).count();
    let up = from[shared..].iter().map(|_| "..".to_owned());
    let down = to[shared..].iter().map(|part| part.as_os_str().to_string_lossy().into_owned());
    up.chain(down).collect::<Vec<_>>().join("/")
}
