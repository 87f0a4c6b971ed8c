//! Packages of Debian's archive, unpacked without being installed.

use crate::deps::{Deps, remove};
use crate::machine;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Brings packages and unpacks them; gives the folder that stands for the root of the system.
pub fn unpacked(deps: &Deps, packages: &[&str]) -> Result<PathBuf> {
    let work = deps.path("staging/apt");
    // What earlier packages have left there is not to be taken for these.
    remove(&work)?;
    let tree = work.join("tree");
    for archive in download(&work, packages)? {
        let mut unpack = Command::new("dpkg");
        quiet(unpack.arg("-x").arg(&archive).arg(&tree))
            .with_context(|| format!("failed to unpack {}", archive.display()))?;
    }
    Ok(tree)
}

/// Has apt download the packages: with the system's lists, or with lists of our own where those are
/// absent or too old. Needs no root and installs nothing.
fn download(work: &Path, packages: &[&str]) -> Result<Vec<PathBuf>> {
    if machine::on_path(Path::new("apt-get")).is_none() {
        bail!("there is no apt-get here");
    }
    let lists = work.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    fs::create_dir_all(work.join("cache/archives/partial"))?;
    let apt = |private: bool, args: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.current_dir(work).args(["-qq", "-o", "APT::Sandbox::User="]);
        if private {
            apt.arg("-o").arg(format!("Dir::State::lists={}/", lists.display()));
            apt.arg("-o").arg(format!("Dir::Cache={}/", work.join("cache").display()));
        }
        quiet(apt.args(args))
    };
    let download = [&["download"], packages].concat();
    if apt(false, &download).is_err() {
        apt(true, &["update"]).context("apt-get could not fetch its lists")?;
        apt(true, &download).with_context(|| format!("apt-get has no {}", packages.join(", ")))?;
    }
    let entries = fs::read_dir(work)?.collect::<std::io::Result<Vec<_>>>()?;
    let paths = entries.iter().map(fs::DirEntry::path);
    let archives: Vec<_> = paths.filter(|path| path.extension().is_some_and(|ext| ext == "deb")).collect();
    if archives.len() != packages.len() {
        bail!("apt-get downloaded {} of {} packages", archives.len(), packages.len());
    }
    Ok(archives)
}

/// Runs a command whose words matter only if it fails.
fn quiet(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to start {name}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{}", words.lines().last().unwrap_or("it failed without a word").trim());
    }
    Ok(())
}
