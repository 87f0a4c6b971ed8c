//! What failed, told again at the end: it would otherwise stand thousands of lines above the end of
//! a log, of which many a CI shows the end only.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// Bytes kept of what one failed test wrote: its own words and the panic come first, the logs of
/// its daemons after them.
const TEST_BYTES_MAX: usize = 6 << 10;
/// Failed tests that are told again; of more, the names are enough.
const TESTS_MAX: usize = 10;

/// The sections in which test programs write what failed tests wrote, cut to what can be read.
#[derive(Default)]
struct Failures {
    /// Of each failed test, what it wrote.
    sections: Vec<String>,
    /// Sections beyond the bound.
    more: usize,
    /// Bytes of the present section that were left out.
    left: usize,
    inside: bool,
}

impl Failures {
    /// Takes one line of the output.
    fn take(&mut self, line: &str) {
        if line.starts_with("---- ") && line.trim_end().ends_with(" stdout ----") {
            self.end();
            self.inside = self.sections.len() < TESTS_MAX;
            if self.inside {
                self.sections.push(line.to_owned());
            } else {
                self.more += 1;
            }
        } else if matches!(line.trim_end(), "failures:") || line.starts_with("test result: ") {
            self.end();
        } else if let Some(section) = self.sections.last_mut().filter(|_| self.inside) {
            if section.len() + line.len() <= TEST_BYTES_MAX {
                section.push_str(line);
            } else {
                self.left += line.len();
            }
        }
    }

    fn end(&mut self) {
        if let Some(section) = self.sections.last_mut().filter(|_| self.inside && self.left > 0) {
            section.extend(["[", &self.left.to_string(), " bytes more: see above]\n"]);
        }
        (self.inside, self.left) = (false, 0);
    }

    /// Returns what is to be told again, if anything failed.
    fn told(mut self) -> String {
        self.end();
        let more = match self.more {
            0 => String::new(),
            more => format!("[{more} failed tests more: see above]\n"),
        };
        self.sections.concat() + &more
    }
}

/// Runs a command of tests, shows its output as it comes, and what failed once more at the end.
///
/// # Errors
///
/// Fails if the command cannot be started or does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let started = command.stdout(Stdio::piped()).spawn();
    let mut child = started.with_context(|| format!("failed to start {name}"))?;
    let mut output = BufReader::new(child.stdout.take().context("the output was asked for")?);
    let (mut failures, mut line) = (Failures::default(), Vec::new());
    while output.read_until(b'\n', &mut line)? > 0 {
        // Whoever reads may have gone; the tests go on, for their exit code.
        let _ = std::io::stdout().write_all(&line);
        failures.take(&String::from_utf8_lossy(&line));
        line.clear();
    }
    let status = child.wait()?;
    if !status.success() {
        eprintln!("\n==> what failed, once more:\n{}", failures.told());
        bail!("{name} ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo;

    #[test]
    fn the_words_of_failed_tests_are_told_again_and_long_ones_cut() {
        let long = "a log\n".repeat(2000);
        let output = format!(
            "running 3 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n---- b stdout ----\npanicked: no leader\n\n\
             ---- c stdout ----\n{long}\n\nfailures:\n    b\n    c\n\ntest result: FAILED. 1 passed\n\nrunning 1 test\n"
        );
        let mut failures = Failures::default();
        output.split_inclusive('\n').for_each(|line| failures.take(line));
        let told = failures.told();
        assert!(
            told.starts_with("---- b stdout ----\npanicked: no leader\n\n---- c stdout ----\na log\n"),
            "{told}"
        );
        assert!(told.ends_with("bytes more: see above]\n") && told.len() < 7000, "{told}");
        assert!(!told.contains("    b\n") && !told.contains("test result"), "{told}");
    }

    #[test]
    fn a_command_that_fails_says_so() {
        assert!(run(&mut cargo::command(&["sh", "-c", "echo fine"])).is_ok());
        let error = run(&mut cargo::command(&["sh", "-c", "exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh ended with exit status: 3");
    }
}
