//! Everything that the commands print goes through here. What users, nodes or ranks wrote cannot
//! leave its line, and reaches no terminal as a control character.
//!
//! A print is one line, which ends here. A line's end within its text is written out like any other
//! control character. What has several lines is handed over as such.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use muster_core::types::text::escape;

use crate::exit::Failure;

/// Home, and clear what is below.
const CLEAR: &[u8] = b"\x1b[H\x1b[J";

/// Writes lines to standard output in one piece. `println!` would panic when the reader has gone.
pub(crate) fn lines<L: AsRef<str>>(lines: impl IntoIterator<Item = L>) -> Result<(), Failure> {
    raw(joined(lines).as_bytes(), false)
}

/// Writes lines to standard error. A reader that has gone is no reason to end.
pub(crate) fn say_lines<L: AsRef<str>>(lines: impl IntoIterator<Item = L>) {
    raw(joined(lines).as_bytes(), true).ok();
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
    raw(CLEAR, false)
}

/// Writes bytes as they are: the output of one rank, for who asked for it.
pub(crate) fn raw(bytes: &[u8], to_stderr: bool) -> Result<(), Failure> {
    let written = if to_stderr {
        std::io::stderr().write_all(bytes)
    } else {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())
    };
    written.map_err(failed)
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
