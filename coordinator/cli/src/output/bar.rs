//! The terminal of a progress bar, drawn through the queue of standard error: a terminal that is stopped stops
//! nothing else.

use std::fmt::Write;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use console::Term;
use indicatif::TermLike;

use super::writer::Print;
use super::{Target, queue};

/// What is drawn since the last flush.
#[derive(Debug)]
pub(crate) struct Terminal {
    term: Term,
    drawn: Mutex<String>,
}

impl Terminal {
    /// That of standard error.
    pub fn stderr() -> Self {
        Self { term: Term::stderr(), drawn: Mutex::default() }
    }

    fn drawn(&self) -> MutexGuard<'_, String> {
        // A text is whole after each of its changes.
        self.drawn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, text: std::fmt::Arguments<'_>) -> io::Result<()> {
        self.drawn().write_fmt(text).map_err(io::Error::other)
    }

    fn go(&self, cells: usize, direction: char) -> io::Result<()> {
        if cells > 0 { self.draw(format_args!("\x1b[{cells}{direction}")) } else { Ok(()) }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        self.term.size().1
    }

    fn height(&self) -> u16 {
        self.term.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.go(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.go(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.go(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.go(n, 'D')
    }

    fn write_line(&self, s: &str) -> io::Result<()> {
        self.draw(format_args!("{s}\n"))
    }

    fn write_str(&self, s: &str) -> io::Result<()> {
        self.draw(format_args!("{s}"))
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw(format_args!("\r\x1b[2K"))
    }

    fn flush(&self) -> io::Result<()> {
        let drawn = std::mem::take(&mut *self.drawn());
        if !drawn.is_empty() {
            queue(Target::Stderr).offer_passing(Print::raw(Target::Stderr, drawn.into_bytes()));
        }
        Ok(())
    }
}
