//! Everything that the commands print goes through here. What users, nodes or ranks wrote cannot
//! leave its line, and reaches no terminal as a control character.
//!
//! A print is one line, which ends here. A line's end within its text is written out like any other
//! control character. What has several lines is handed over as such.

//!
//! Nobody who prints on standard error waits for a reader. Results on standard output wait for theirs,
//! as `muster logs … | less` needs it.

pub(crate) mod bar;
pub(crate) mod lined;
mod queue;
mod writer;

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use muster_core::types::text::escape;

use crate::exit::Failure;
use queue::Queue;
use writer::Print;
pub(crate) use writer::Target;

/// Home, and clear what is below.
const CLEAR: &[u8] = b"\x1b[H\x1b[J";
/// Longest pause of a reader for which the end of a command waits that is there for something else.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Time for a panic's words, which a process may not outlive by much.
const PANIC_MAX: Duration = Duration::from_secs(1);

/// The queues of both targets: one and the same where both are one file, whose order is then kept.
static QUEUES: LazyLock<[Arc<Queue>; 2]> = LazyLock::new(|| {
    let start = || Queue::start(writer::to_process());
    let file = |descriptor: std::os::fd::BorrowedFd<'_>| nix::sys::stat::fstat(descriptor).ok();
    let (out, err) = (std::io::stdout(), std::io::stderr());
    let first = start();
    let second = match (file(out.as_fd()), file(err.as_fd())) {
        (Some(out), Some(err)) if (out.st_dev, out.st_ino) == (err.st_dev, err.st_ino) => first.clone(),
        _ => start(),
    };
    [first, second]
});

fn queue(target: Target) -> &'static Queue {
    &QUEUES[target as usize]
}

/// Writes lines to standard output in one piece, once there is room.
pub(crate) fn lines<L: AsRef<str>>(lines: impl IntoIterator<Item = L>) -> Result<(), Failure> {
    let print = Print::own(Target::Stdout, joined(lines).into_bytes());
    queue(Target::Stdout).put(print).map_err(failed)
}

/// Writes lines to standard error. A reader that has gone, or that pauses, is no reason to wait or to end.
pub(crate) fn say_lines<L: AsRef<str>>(lines: impl IntoIterator<Item = L>) {
    let text = joined(lines);
    if !text.is_empty() {
        queue(Target::Stderr).offer(Print::own(Target::Stderr, text.into_bytes()));
    }
}

/// Writes one line to standard output.
pub(crate) fn line(text: Arguments<'_>) -> Result<(), Failure> {
    lines([text.to_string()])
}

/// Writes one line to standard error.
pub(crate) fn say_line(text: Arguments<'_>) {
    say_lines([text.to_string()]);
}

/// Clears the terminal.
pub(crate) fn clear() -> Result<(), Failure> {
    raw(CLEAR.to_owned(), Target::Stdout)
}

/// Writes bytes as they are, once there is room: the output of ranks, for who asked for it.
pub(crate) fn raw(bytes: Vec<u8>, target: Target) -> Result<(), Failure> {
    queue(target).put(Print::raw(target, bytes)).map_err(failed)
}

/// Writes text of one stream among several, once there is room.
pub(crate) fn put_stream(text: lined::Text) -> Result<(), Failure> {
    queue(text.target).put(text.print()).map_err(failed)
}

/// The same, for a task that has something else to do meanwhile.
pub(crate) async fn send_stream(text: lined::Text) -> Result<(), Failure> {
    queue(text.target).send(text.print()).await.map_err(failed)
}

/// Returns bytes that wait for their reader.
pub(crate) fn held_bytes(target: Target) -> usize {
    queue(target).held_bytes()
}

/// Returns bytes that were written so far.
pub(crate) fn taken_bytes() -> u64 {
    queue(Target::Stdout).taken_bytes() + queue(Target::Stderr).taken_bytes()
}

/// Waits until there is room for so many bytes, or a reader that has gone makes that pointless.
pub(crate) async fn room(bytes: usize, target: Target) {
    queue(target).room(target, bytes).await;
}

/// Waits until everything is written, or nothing of it was for so long: tells whether all was. The error is that
/// of standard output.
pub(crate) async fn drain([out_pause_max, err_pause_max]: [Duration; 2]) -> Result<bool, Failure> {
    let out = queue(Target::Stdout).drain(out_pause_max).await.map_err(failed);
    let err = queue(Target::Stderr).drain(err_pause_max).await;
    Ok(out? && err.is_ok_and(|all| all))
}

/// Has lines that a log leaves out be spoken of in JSON.
pub(crate) fn gaps_in_json() {
    queue(Target::Stderr).set_gap(|lines| {
        let message = "lines were left out here, which nothing had read in time";
        serde_json::json!({ "level": "WARN", "message": message, "lines": lines }).to_string()
    });
}

/// Writes the lines of a log to standard error.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Log;

impl Write for Log {
    /// Takes whole lines, as they are handed over.
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        queue(Target::Stderr).offer(Print::own(Target::Stderr, line.to_vec()));
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Says that a thread panicked, as the standard library would, which would wait for the reader.
pub(crate) fn say_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let backtrace = std::backtrace::Backtrace::capture();
    let is_wanted = backtrace.status() == std::backtrace::BacktraceStatus::Captured;
    let backtrace = if is_wanted { backtrace.to_string() } else { String::new() };
    let text = format!("thread '{name}' {panic}\n{backtrace}");
    say_lines(text.lines());
    queue(Target::Stderr).drain_here(PANIC_MAX);
}

/// Returns the lines of a text of others, each set off so that none looks like a line of ours.
pub(crate) fn quoted(text: &str) -> Vec<String> {
    text.trim_end().lines().map(|line| format!("  {line}")).collect()
}

fn joined<L: AsRef<str>>(lines: impl IntoIterator<Item = L>) -> String {
    let mut all = String::new();
    for line in lines {
        all.push_str(&escape(line.as_ref()));
        all.push('\n');
    }
    all
}

/// Returns what a failed write to our output means.
fn failed(error: std::io::Error) -> Failure {
    if error.kind() == ErrorKind::BrokenPipe {
        return Failure::ReaderGone;
    }
    anyhow::Error::from(error).context("failed to write the output").into()
}

/// Writes one line to standard output, with a format string; ends the function on an error.
macro_rules! out {
    ($($arg:tt)*) => {
        $crate::output::line(format_args!($($arg)*))?
    };
}
pub(crate) use out;

/// Writes one line to standard error, with a format string.
macro_rules! say {
    ($($arg:tt)*) => {
        $crate::output::say_line(format_args!($($arg)*))
    };
}
pub(crate) use say;

/// Returns rows under a header as lines, each column as wide as its widest cell. Cells are measured
/// as they are shown.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let shown = |row: &Vec<String>| row.iter().map(|cell| escape(cell).into_owned()).collect();
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    let all: Vec<Vec<String>> = std::iter::once(header).chain(rows.iter().map(shown)).collect();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..all[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    all.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_others_stays_one_line() {
        let hostile = "x\njob k3 succeeded\x1b[2J\u{202e}";
        assert_eq!(joined([hostile]), "x\\njob k3 succeeded\\x1b[2J\\u{202e}\n");
        assert_eq!(joined(quoted("a\nerror: b\n")), "  a\n  error: b\n");
    }

    #[test]
    fn a_table_is_as_wide_as_what_it_shows() {
        let row = |name: &str| vec![name.to_owned(), "x".to_owned()];
        let shown = table(&["NAME", "B"], &[row("a\n\x1b"), row("größe")]);
        assert_eq!(shown, ["NAME     B", "a\\n\\x1b  x", "größe    x"]);
    }
}
