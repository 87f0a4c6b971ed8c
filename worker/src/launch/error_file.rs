//! The message that a rank left in its error file (`TORCHELASTIC_ERROR_FILE`), as torchrun's `@record` writes it.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use serde_json::Value;

/// Largest error file that is read: a call stack takes kilobytes, and a rank may write anything.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest message that is told: what a terminal can show.
const MESSAGE_BYTES_MAX: usize = 2048;
const TRACEBACK: &str = "Traceback (most recent call last)";

/// The line that says what went wrong. None if there is no file, or nothing of use in it.
pub(crate) fn message(path: &Path) -> Option<String> {
    // A pipe of that name must not hold us up.
    let mut open = OpenOptions::new();
    let file = open.read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    of_json(&bytes)
}

fn of_json(bytes: &[u8]) -> Option<String> {
    let json: Value = serde_json::from_slice(bytes).ok()?;
    let message = json.get("message")?;
    let places = [Some(message), message.get("message"), message.pointer("/extraInfo/py_callstack")];
    places.into_iter().flatten().filter_map(Value::as_str).find_map(line)
}

/// The exception's own line. What follows it is advice as a rule, and what comes before it the way there.
fn line(text: &str) -> Option<String> {
    // Of exceptions that led to others, the last one counts.
    let exception = text.rfind(TRACEBACK).and_then(|at| {
        let mut lines = text[at..].lines().skip(1);
        lines.find(|line| !line.trim().is_empty() && !line.starts_with(char::is_whitespace))
    });
    let line = exception.or_else(|| text.lines().find(|line| !line.trim().is_empty()))?.trim();
    // It is shown in terminals, which obey control characters.
    let mut line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.truncate(line.floor_char_boundary(MESSAGE_BYTES_MAX));
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exception_is_told_and_garbage_is_not() {
        let record = r#"{"message": {"message": "ValueError: shard 7 is empty", "extraInfo":
            {"py_callstack": "Traceback (most recent call last):\n  File \"a.py\"\nValueError: shard 7 is empty\n",
             "timestamp": "1753100000"}}}"#;
        let stack = "Traceback (most recent call last):\n  File \"a.py\"\nKeyError: 'x'\n\nDuring handling ...\n\n\
            Traceback (most recent call last):\n    f()\ntorch.OutOfMemoryError: CUDA out of memory\nSee the docs\n";
        let chained = serde_json::json!({"message": {"message": "", "extraInfo": {"py_callstack": stack}}});
        let chained = chained.to_string();
        let table = [
            (record, Some("ValueError: shard 7 is empty")),
            (&chained, Some("torch.OutOfMemoryError: CUDA out of memory")),
            (r#"{"message": "Signal 11 (SIGSEGV) received"}"#, Some("Signal 11 (SIGSEGV) received")),
            (r#"{"message": "\n  RuntimeError: a\nCompile with ..."}"#, Some("RuntimeError: a")),
            (
                r#"{"message": "Traceback (most recent call last):\n  File"}"#,
                Some("Traceback (most recent call last):"),
            ),
            (r#"{"message": "red \u001b[31m text"}"#, Some("red  [31m text")),
            (r#"{"message": 7}"#, None),
            (r#"{"message": {"message": ["x"], "extraInfo": null}}"#, None),
            (r#"{"message": " \n "}"#, None),
            (r#"{"error": "x"}"#, None),
            (r#"{"message": "cut"#, None),
            ("[]", None),
            ("", None),
            ("\u{0}\u{ff}", None),
        ];
        for (written, expected) in table {
            assert_eq!(of_json(written.as_bytes()).as_deref(), expected, "{written}");
        }
        let deep = "[".repeat(500_000);
        assert_eq!(of_json(deep.as_bytes()), None);
        let long = serde_json::json!({ "message": format!("x{}", "\u{e9}".repeat(5000)) }).to_string();
        assert_eq!(of_json(long.as_bytes()).unwrap().len(), 2047);
    }

    #[test]
    fn what_is_no_ordinary_file_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("error.json");
        assert_eq!(message(&file), None);
        std::fs::write(&file, r#"{"message": "E: a"}"#).unwrap();
        assert_eq!(message(&file).as_deref(), Some("E: a"));
        let padded = format!("{}{}", r#"{"message": "E: a"}"#, " ".repeat(2 << 20));
        std::fs::write(&file, &padded).unwrap();
        assert_eq!(message(&file).as_deref(), Some("E: a"));
        let huge = format!("{}{}", " ".repeat(2 << 20), r#"{"message": "E: a"}"#);
        std::fs::write(&file, &huge).unwrap();
        assert_eq!(message(&file), None, "only its beginning is read");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(message(&pipe), None);
        assert_eq!(message(dir.path()), None);
    }
}
