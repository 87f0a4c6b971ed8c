//! Files from the package index that pip is set up to use, through a short Python program: it trusts
//! the certificates and uses the proxy, mirror and find-links that pip would, and TLS needs no compiling.

use crate::deps::Deps;
use crate::fetch::{self, Body, Pin};
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PROGRAM: &str = include_str!("pypi.py");

/// One file of one release of a project.
#[derive(Clone, Copy)]
pub struct Release {
    /// The project, as in the index's addresses.
    pub project: &'static str,
    /// The wheel or source archive.
    pub file: &'static str,
    /// What it must be.
    pub pin: Pin,
}

impl Release {
    /// Brings the file into `downloads`, with a progress bar where stderr is a terminal.
    pub fn download(&self, deps: &Deps) -> Result<PathBuf> {
        let path = deps.path("downloads").join(self.file);
        let style = ProgressStyle::with_template(
            "  {msg:24} {wide_bar} {decimal_bytes:>10} of {decimal_total_bytes} {decimal_bytes_per_sec:>12} {eta:>4}",
        )?;
        let progress = ProgressBar::new(self.pin.bytes).with_style(style).with_message(self.project);
        if progress.is_hidden() && !path.exists() {
            let have = deps.path("downloads").join(format!("{}.part", self.file)).metadata();
            let [have, all] =
                [have.map_or(0, |part| part.len()), self.pin.bytes].map(|bytes| bytes.div_ceil(1_000_000));
            let here = if have > 0 { format!(", {have} MB of it are here") } else { String::new() };
            eprintln!("  downloading {} ({all} MB{here})", self.project);
        }
        let url = OnceCell::new();
        let open = |offset| {
            if url.get().is_none() {
                let _ = url.set(self.locate()?);
            }
            get(url.get().map_or("", String::as_str), offset)
        };
        let downloaded = fetch::download(&open, self.pin, &path, &progress, Duration::from_secs(1));
        progress.finish_and_clear();
        downloaded.with_context(|| format!("failed to download {}", self.file))?;
        Ok(path)
    }

    fn locate(&self) -> Result<String> {
        let output = python("locate", self.project, self.file).output().context("failed to start python3")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }
}

/// Asks for the bytes of `url` from `offset` on.
pub fn get(url: &str, offset: u64) -> Result<Body> {
    let mut child = python("get", url, &offset.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("failed to start python3")?;
    let mut bytes = BufReader::with_capacity(1 << 18, child.stdout.take().context("python3 has no output")?);
    let mut first = String::new();
    bytes.read_line(&mut first)?;
    let Some(start) = first.split_whitespace().next().and_then(|start| start.parse().ok()) else {
        let output = child.wait_with_output()?;
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    };
    Ok(Body { start, bytes: Box::new(Output { bytes, child }) })
}

/// Writes one file of a wheel or source archive to `to`.
pub fn unpack_member(archive: &Path, member: &str, to: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("failed to create {}", to.display()))?;
    let mut command = python("member", &archive.to_string_lossy(), member);
    let output = command.stdout(file).stderr(Stdio::piped()).output().context("failed to start python3")?;
    if !output.status.success() {
        bail!("failed to unpack {member}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn python(mode: &str, first: &str, second: &str) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", PROGRAM, mode, first, second]).stdin(Stdio::null());
    command
}

/// The bytes that the program prints; at their end, whether it had trouble.
struct Output {
    bytes: BufReader<std::process::ChildStdout>,
    child: Child,
}

impl Read for Output {
    fn read(&mut self, block: &mut [u8]) -> io::Result<usize> {
        let read = self.bytes.read(block)?;
        if read == 0 && !block.is_empty() && !self.child.wait()?.success() {
            let mut words = String::new();
            if let Some(mut stderr) = self.child.stderr.take() {
                stderr.read_to_string(&mut words)?;
            }
            return Err(io::Error::other(words.trim().to_owned()));
        }
        Ok(read)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // Without the kill, a reader that has seen enough would wait for the rest.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
