//! Runs a daemon and stops it dead at its n-th write to its store, then starts it again at once, as a supervisor would.
//!
//! `stopper HOW STOPS STORE REPORT COMMAND…`. STOPS is a list such as `17,3`: the first life ends at its 17th write, the
//! second at its 3rd, the one after them is left alone. STORE is the store's file; what counts is what changes it, its
//! directory, or a file beside it of the same name and another extension. REPORT gets a JSON line for each life that was
//! stopped. Ends with 77 where the machine lets nobody trace.
//!
//! Made rather than taken from strace: that counts each thread for itself, and can neither tear a write nor take back what
//! was not synchronised, as a power cut does.

mod disk;
mod trace;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

/// The state in which the file is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The process is killed before the call.
    Before,
    /// It is killed when a part of the bytes is written.
    Torn,
    /// The machine loses power: of what was not synchronised, each sector may be lost or not.
    Power,
}

/// The exit code by which test runners know what was skipped.
const SKIPPED: u8 = 77;

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [how, stops, store, report, command @ ..] = &args[..] else {
        bail!("usage: stopper before|torn|power N,M,… STORE REPORT COMMAND…");
    };
    let how = match how.as_str() {
        "before" => How::Before,
        "torn" => How::Torn,
        "power" => How::Power,
        other => bail!("{other:?} is no way to stop"),
    };
    let store = PathBuf::from(store);
    for (life, stop) in stops.split(',').enumerate() {
        let nth: u64 = stop.parse().with_context(|| format!("{stop:?} is no number"))?;
        match trace::run(command, &store, how, nth)? {
            trace::End::Stopped(call) => {
                let mut file = OpenOptions::new().create(true).append(true).open(report)?;
                let line = serde_json::json!({ "life": life + 1, "nth": nth, "call": call });
                writeln!(file, "{line}").context("failed to write the report")?;
            }
            trace::End::Ended(code) => return Ok(ExitCode::from(code)),
            trace::End::CannotTrace => return Ok(ExitCode::from(SKIPPED)),
        }
    }
    let [program, args @ ..] = command else { bail!("there is no command") };
    let status =
        Command::new(program).args(args).status().with_context(|| format!("failed to run {program}"))?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}
