//! One download: goes on where a broken one stopped, and hands out nothing whose hash is not the pinned one.

use crate::sha256;
use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;
use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

/// How often one file is asked for before giving up: with the pauses between, 15 s without a network.
const ATTEMPTS_MAX: u32 = 5;

/// What the file must be, pinned in the source.
#[derive(Clone, Copy)]
pub struct Pin {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its SHA-256, in lower-case hexadecimal.
    pub sha256: &'static str,
}

/// What a server sends: the bytes of the file from `start` on, which may be less than was asked for.
pub struct Body {
    /// The offset of the first byte in the file.
    pub start: u64,
    /// The bytes; they may end early.
    pub bytes: Box<dyn Read>,
}

/// Brings the file to `path` by way of `path.part`; `open` asks for its bytes from an offset on.
pub fn download(
    open: &dyn Fn(u64) -> Result<Body>,
    pin: Pin,
    path: &Path,
    progress: &ProgressBar,
    pause: Duration,
) -> Result<()> {
    if path.exists() && sha256::hex(&sha256::of_file(path)?) == pin.sha256 {
        return Ok(());
    }
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let resumed = part.metadata().is_ok_and(|part| part.len() > 0);
    complete(open, pin, part, progress, pause)?;
    let mut hash = sha256::hex(&sha256::of_file(part)?);
    if hash != pin.sha256 && resumed {
        // What an earlier run left may be damaged: that is worth one download from the start.
        fs::remove_file(part)?;
        complete(open, pin, part, progress, pause)?;
        hash = sha256::hex(&sha256::of_file(part)?);
    }
    if hash != pin.sha256 {
        fs::remove_file(part)?;
        bail!("what came has sha256 {hash}, not the pinned {}; it was thrown away", pin.sha256);
    }
    fs::rename(part, path).with_context(|| format!("failed to rename to {}", path.display()))
}

/// Asks for the missing rest until the part file has its full length.
fn complete(
    open: &dyn Fn(u64) -> Result<Body>,
    pin: Pin,
    part: &Path,
    progress: &ProgressBar,
    pause: Duration,
) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(part)
        .with_context(|| format!("failed to open {}", part.display()))?;
    if file.metadata()?.len() > pin.bytes {
        file.set_len(0)?;
    }
    for attempt in 1.. {
        let have = file.metadata()?.len();
        progress.set_position(have);
        if have == pin.bytes {
            file.sync_all().context("failed to write the download to disk")?;
            break;
        }
        let trouble = match open(have) {
            Err(trouble) => trouble,
            Ok(body) if body.start > have => bail!("the server skipped bytes {have} to {}", body.start),
            Ok(body) => {
                // A server that knows no ranges starts over, and so does the part file.
                file.set_len(body.start)?;
                file.seek(SeekFrom::Start(body.start))?;
                progress.set_position(body.start);
                let limit = pin.bytes - body.start;
                let ended = copy(body.bytes.take(limit + 1), &mut file, progress)?;
                let have = file.metadata()?.len();
                if have > pin.bytes {
                    file.set_len(0)?;
                    bail!("the server's file is longer than the pinned {} bytes", pin.bytes);
                }
                if have == pin.bytes {
                    continue;
                }
                ended.err().unwrap_or_else(|| anyhow!("it ended after {have} of {} bytes", pin.bytes))
            }
        };
        if attempt == ATTEMPTS_MAX {
            return Err(trouble.context(format!("gave up after {ATTEMPTS_MAX} attempts")));
        }
        progress
            .suspend(|| eprintln!("  trying again after attempt {attempt} of {ATTEMPTS_MAX}: {trouble:#}"));
        std::thread::sleep(pause * (1 << (attempt - 1)));
    }
    Ok(())
}

/// Copies until the end or until reading fails (inner error: worth another try); a failure to write is lasting.
fn copy(mut from: impl Read, to: &mut impl Write, progress: &ProgressBar) -> Result<Result<()>> {
    let mut block = vec![0; 1 << 18];
    loop {
        match from.read(&mut block) {
            Ok(0) => return Ok(Ok(())),
            Ok(read) => {
                to.write_all(&block[..read]).context("failed to write the download to disk")?;
                progress.inc(read as u64);
            }
            Err(error) => return Ok(Err(error.into())),
        }
    }
}

#[cfg(test)]
mod tests;
