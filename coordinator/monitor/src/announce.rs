//! Where a daemon serves, said on standard error for whoever started it.

use std::io::{self, Write};
use std::sync::OnceLock;

static PRINT: OnceLock<fn(&str)> = OnceLock::new();

/// Has a function print the lines of [`announce`], such as one that never waits. The first one stays.
pub fn announce_by(print: fn(&str)) {
    PRINT.set(print).ok();
}

/// Prints one line of JSON, in one piece. Nobody may be there to read it.
pub fn announce(line: &str) {
    match PRINT.get() {
        Some(print) => print(line),
        None => io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap_or_default(),
    }
}
