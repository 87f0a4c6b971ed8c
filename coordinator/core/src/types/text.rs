//! Text that users, nodes or ranks wrote, made harmless for terminals, logs and lines of JSON.
//!
//! Only those characters are replaced that could end a line, move a cursor or reverse what is
//! read. Backslashes stay, so that text that was escaped already stays as it is.

use std::borrow::Cow;
use std::fmt::{self, Write};

/// Stands for what is not shown to everybody.
pub const REDACTED: &str = "[redacted]";

/// Returns whether a character controls a terminal or the layout of a line.
pub fn is_control(c: char) -> bool {
    // C0, DEL and C1; the separators of lines and paragraphs; and what sets the direction of text.
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns the text on one line, with every control character written out: `\n`, `\x1b`, `\u{202e}`.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    text.chars().for_each(|c| push(&mut escaped, c));
    Cow::Owned(escaped)
}

/// Returns a line of a program's output with its control characters written out. Tabs stay; bytes
/// that are no UTF-8 are written as `\xff`.
pub fn escape_output(line: &[u8]) -> String {
    let mut escaped = String::with_capacity(line.len());
    for chunk in line.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '\t' { escaped.push(c) } else { push(&mut escaped, c) }
        }
        for byte in chunk.invalid() {
            write!(escaped, "\\x{byte:02x}").ok();
        }
    }
    escaped
}

/// Returns JSON of the same value in which no string holds a raw control character. Serializers
/// write out those of ASCII alone.
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let raw = |c: char| is_control(c) && c >= '\x7f';
    if !json.contains(raw) {
        return Cow::Borrowed(json);
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if raw(c) {
            // All of them fit four digits.
            write!(escaped, "\\u{:04x}", u32::from(c)).ok();
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

fn push(to: &mut String, c: char) {
    match c {
        '\n' => to.push_str("\\n"),
        '\r' => to.push_str("\\r"),
        '\t' => to.push_str("\\t"),
        c if !is_control(c) => to.push(c),
        c if c.is_ascii() => drop(write!(to, "\\x{:02x}", u32::from(c))),
        c => drop(write!(to, "\\u{{{:x}}}", u32::from(c))),
    }
}

/// A writer that passes text on as [`escape`] shows it.
#[derive(Debug)]
pub struct Escaping<W>(pub W);

impl<W: Write> Write for Escaping<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_str(&escape(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each kind that must not reach a terminal.
    const HOSTILE: &str = "a\n\r\t\0\x1b[2J\x7f\u{85}\u{9b}\u{61c}\u{200f}\u{2028}\u{2029}\u{202e}\u{2066}z";

    #[test]
    fn control_characters_are_written_out_and_others_stay() {
        let expected = "a\\n\\r\\t\\x00\\x1b[2J\\x7f\\u{85}\\u{9b}\\u{61c}\\u{200f}\\u{2028}\\u{2029}\\u{202e}\\u{2066}z";
        assert_eq!(escape(HOSTILE), expected);
        assert_eq!(escape(expected), expected, "twice is as good as once");
        let plain = "C:\\new Größe 模型 🚀 e\u{301}";
        assert!(matches!(escape(plain), Cow::Borrowed(text) if text == plain));
        let mut written = String::new();
        write!(Escaping(&mut written), "{HOSTILE}").unwrap();
        assert_eq!(written, expected);
    }

    #[test]
    fn output_keeps_its_tabs_and_shows_its_bytes() {
        assert_eq!(escape_output(b"a\tb\x9b\xc2\x9b\xff\x1b[0m"), "a\tb\\x9b\\u{9b}\\xff\\x1b[0m");
    }

    #[test]
    fn json_keeps_its_value() {
        let json = serde_json::to_string(HOSTILE).unwrap();
        let escaped = escape_json(&json);
        assert!(!escaped.contains(is_control), "{escaped:?}");
        assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), HOSTILE);
    }
}
