//! Why the kernel does not start a file that is there: what its first line names is not.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use nix::errno::Errno;

/// Longest first line that the kernel reads.
const FIRST_LINE_BYTES_MAX: u64 = 256;

/// Returns what stands behind an error of exec, in words to follow it; empty where the error says all.
pub(super) fn explain(path: &Path, error: &io::Error) -> String {
    let errno = error.raw_os_error().map(Errno::from_raw);
    if !matches!(errno, Some(Errno::ENOENT | Errno::ENOEXEC)) || !path.exists() {
        return String::new();
    }
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FIRST_LINE_BYTES_MAX).read_to_end(&mut bytes));
    if read.is_err() {
        return String::new();
    }
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    match (line.strip_prefix(b"#!"), errno) {
        (Some(line), _) => {
            let line = String::from_utf8_lossy(line);
            let interpreter = line.trim_start_matches([' ', '\t']).split([' ', '\t']).next().unwrap_or("");
            let ends = "its lines end with carriage returns, as on Windows, which become part of that name; remove \
                        them, such as with `sed -i 's/\\r$//'`";
            let why = if interpreter.ends_with('\r') { ends } else { "it is not there, or does not start" };
            format!("; its first line names the interpreter {interpreter:?}: {why}")
        }
        (None, Some(Errno::ENOENT)) => "; it is there, but the loader that it was built for is not".to_owned(),
        (None, _) => "; it is no program of this machine, and no script whose first line names an interpreter, such as \
                      #!/bin/sh"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_behind_an_error_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        for (text, errno, expected) in [
            ("#!/bin/sh\r\necho\r\n", Errno::ENOENT, "\"/bin/sh\\r\": its lines end with carriage returns"),
            ("#! /opt/none -x\n", Errno::ENOENT, "names the interpreter \"/opt/none\": it is not there"),
            ("echo\n", Errno::ENOEXEC, "no script whose first line names an interpreter"),
            ("\x7fELF", Errno::ENOENT, "the loader that it was built for"),
            ("#!/bin/sh\n", Errno::EACCES, ""),
        ] {
            std::fs::write(&path, text).unwrap();
            let said = explain(&path, &io::Error::from_raw_os_error(errno as i32));
            assert!(said.contains(expected) && said.is_empty() == expected.is_empty(), "{text}: {said}");
        }
    }
}
