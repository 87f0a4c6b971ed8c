//! Which script a command has an interpreter of Python run. Nothing is run to find that out.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// Options of Python's that take the next word as their value.
const WITH_VALUE: [&str; 3] = ["-W", "-X", "--check-hash-based-pycs"];

/// The script, if the command is an interpreter of Python with one: not with a module, code or its own terminal.
pub(crate) fn of_python(command: &[OsString]) -> Option<&OsStr> {
    let [program, words @ ..] = command else { return None };
    let name = Path::new(program).file_name()?.to_str()?;
    let version = name.strip_prefix("python")?;
    if !version.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let script = word;
        // Options are text.
        let Some(word) = word.to_str() else { return Some(script) };
        if !word.starts_with('-') {
            return Some(script);
        }
        // Short options may be one word, and -c and -m end them.
        let is_group = !["--", "-W", "-X"].iter().any(|prefix| word.starts_with(prefix));
        if word == "-" || is_group && word.contains(['c', 'm', 'h', 'V']) {
            return None;
        }
        if WITH_VALUE.contains(&word) {
            words.next();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_told_from_modules_and_code() {
        let table = [
            ("python3 -u train.py --lr 0.1", Some("train.py")),
            ("/opt/env/bin/python train.py", Some("train.py")),
            ("python3.12 -W ignore -X faulthandler -OO a/b.py", Some("a/b.py")),
            ("python -Wignore::DeprecationWarning x", Some("x")),
            ("python -m pkg.train x.py", None),
            ("python -um pkg.train x.py", None),
            ("python -c pass x.py", None),
            ("python3 -", None),
            ("python3 --version", None),
            ("python3 -é", None),
            ("python3", None),
            ("python3-config x", None),
            ("pythonic x", None),
            ("sh train.py", None),
        ];
        for (line, expected) in table {
            let command: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(of_python(&command), expected.map(OsStr::new), "{line}");
        }
    }
}
