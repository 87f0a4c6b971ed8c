//! Text of one stream among several: a line at a time with its prefix, and what has no end of its line yet, such as a
//! prompt, once it was held back for a moment.

use std::time::Duration;

use tokio::time::Instant;

use super::Target;
use super::writer::Print;

/// Time for which text without the end of its line is held back: most lines are whole by then.
pub(crate) const HELD_MAX: Duration = Duration::from_millis(100);
/// Longest text that is held back.
const HELD_BYTES_MAX: usize = 64 << 10;

/// How the text of a line is shown.
pub(crate) type Shown = fn(&[u8]) -> Vec<u8>;

/// Some text of a stream, for its target.
#[derive(Debug)]
pub(crate) struct Text {
    pub(super) target: Target,
    stream: u64,
    /// The prefix; in the text itself it stands from the second line on.
    head: Vec<u8>,
    bytes: Vec<u8>,
}

impl Text {
    #[cfg(test)]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn print(self) -> Print {
        Print::stream(self.target, self.stream, self.head, self.bytes)
    }
}

/// A stream whose lines are shown.
#[derive(Debug)]
pub(crate) struct Lined {
    target: Target,
    /// Tells it from the others.
    stream: u64,
    prefix: Vec<u8>,
    shown: Shown,
    /// Text of the last line that was not given out.
    held: Vec<u8>,
    since: Option<Instant>,
    /// Some of the last line was given out.
    is_open: bool,
    /// The last line ended with a carriage return, to which a line feed may belong.
    is_returned: bool,
}

impl Lined {
    pub fn new(target: Target, stream: u64, prefix: Vec<u8>, shown: Shown) -> Self {
        let held = Vec::new();
        Self { target, stream, prefix, shown, held, since: None, is_open: false, is_returned: false }
    }

    /// Takes bytes, and gives out the lines that they end. What a program draws over itself, such as a bar of
    /// progress, is a line each time: several streams share the terminal.
    pub fn add(&mut self, bytes: &[u8]) -> Option<Text> {
        let mut out = Vec::new();
        let ends = |byte: &u8| matches!(byte, b'\n' | b'\r');
        for part in bytes.split_inclusive(ends) {
            let (text, end) = match part.split_last() {
                Some((end, text)) if ends(end) => (text, Some(*end)),
                _ => (part, None),
            };
            self.held.extend_from_slice(text);
            let has_text = self.is_open || !self.held.is_empty();
            match end {
                Some(b'\r') if has_text => self.end_line(&mut out, true),
                // A carriage return at the start of a line changes nothing.
                Some(b'\r') => {}
                Some(_) if self.is_returned && !has_text => self.is_returned = false,
                Some(_) => self.end_line(&mut out, false),
                None => self.is_returned &= !has_text,
            }
        }
        if self.held.len() > HELD_BYTES_MAX {
            self.give_rest(&mut out, self.held.len());
        }
        if self.held.is_empty() {
            self.since = None;
        } else {
            self.since.get_or_insert_with(Instant::now);
        }
        self.text(out)
    }

    /// Gives out what was held back for long enough, but for half a character.
    pub fn due(&mut self) -> Option<Text> {
        if self.since.is_none_or(|since| since.elapsed() < HELD_MAX) {
            return None;
        }
        let whole = self.held.utf8_chunks().last().map_or(0, |last| {
            let rest = last.invalid();
            let is_half = std::str::from_utf8(rest).is_err_and(|error| error.error_len().is_none());
            if is_half { rest.len() } else { 0 }
        });
        self.take(self.held.len() - whole)
    }

    /// Gives out the rest.
    pub fn rest(&mut self) -> Option<Text> {
        self.take(self.held.len())
    }

    /// Gives out the rest, as a line.
    pub fn end(&mut self) -> Option<Text> {
        let mut out = Vec::new();
        if self.is_open || !self.held.is_empty() {
            self.end_line(&mut out, false);
        }
        self.text(out)
    }

    fn take(&mut self, bytes: usize) -> Option<Text> {
        let mut out = Vec::new();
        if bytes > 0 {
            self.give_rest(&mut out, bytes);
        }
        self.since = None;
        self.text(out)
    }

    fn text(&self, bytes: Vec<u8>) -> Option<Text> {
        let (target, stream) = (self.target, self.stream);
        (!bytes.is_empty()).then(|| Text { target, stream, head: self.prefix.clone(), bytes })
    }

    fn end_line(&mut self, out: &mut Vec<u8>, is_returned: bool) {
        self.give_rest(out, self.held.len());
        out.push(b'\n');
        (self.is_open, self.is_returned) = (false, is_returned);
    }

    fn give_rest(&mut self, out: &mut Vec<u8>, bytes: usize) {
        if !self.is_open && !out.is_empty() {
            out.extend_from_slice(&self.prefix);
        }
        let text: Vec<u8> = self.held.drain(..bytes).collect();
        out.extend((self.shown)(&text));
        self.is_open = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lined() -> Lined {
        Lined::new(Target::Stdout, 0, b"> ".to_vec(), <[u8]>::to_vec)
    }

    fn shown(text: Option<Text>) -> String {
        String::from_utf8(text.map_or(Vec::new(), |text| text.bytes)).unwrap()
    }

    #[test]
    fn lines_end_as_programs_end_them() {
        // The first prefix is the writer's, who knows whether the line is open.
        for (text, expected) in [
            ("a\nb\nc", "a\n> b\n"),
            ("a\r\n\n", "a\n> \n"),
            ("\r 10%\r 20%\n", " 10%\n>  20%\n"),
            ("\r\n", "\n"),
            ("\n\n", "\n> \n"),
            ("no end", ""),
        ] {
            assert_eq!(shown(lined().add(text.as_bytes())), expected, "{text:?}");
            let mut lined = lined();
            let by_byte: Vec<String> = text.bytes().map(|byte| shown(lined.add(&[byte]))).collect();
            let expected = expected.replace("> ", "");
            assert_eq!(by_byte.concat(), expected, "{text:?}, byte by byte");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn text_without_an_end_is_shown_after_a_moment() {
        let mut lined = lined();
        assert_eq!(shown(lined.add(b"done\nname? ")), "done\n");
        assert_eq!(shown(lined.due()), "");
        tokio::time::advance(HELD_MAX).await;
        assert_eq!(shown(lined.due()), "name? ");
        assert_eq!(shown(lined.due()), "");
        assert_eq!(shown(lined.add(b"x\ny")), "x\n", "it goes on where it was");
        // Dots that never pause are shown too.
        for _ in 0..4 {
            tokio::time::advance(HELD_MAX / 4).await;
            lined.add(b".");
        }
        assert_eq!(shown(lined.due()), "y....");
        lined.add("ü".as_bytes().split_at(1).0);
        tokio::time::advance(HELD_MAX).await;
        assert_eq!(shown(lined.due()), "", "half a character");
        assert_eq!(lined.rest().unwrap().bytes, [0xc3]);
    }

    #[test]
    fn what_is_held_back_has_a_bound() {
        let long = vec![b'x'; HELD_BYTES_MAX + 1];
        assert_eq!(lined().add(&long).unwrap().bytes.len(), long.len());
    }
}
