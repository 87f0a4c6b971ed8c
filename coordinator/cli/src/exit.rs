//! How a command ends: the one place that decides exit codes and how errors are shown.

use std::process::ExitCode;

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::output::{quoted, say_lines};

/// Why a command did not do what it was asked. `muster --help` lists the codes.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The followed job failed; its end was shown already.
    JobFailed,
    /// The followed job was cancelled; its end was shown already.
    JobCancelled,
    /// The command line or a file is wrong.
    Usage(String),
    /// The command line is wrong; it was said already how.
    CommandLine,
    /// No coordinator answers.
    Unreachable(String),
    /// The coordinator answered with an error.
    Status(Box<Status>),
    /// Ctrl-C.
    Interrupted,
    /// The doctor has found something; it was shown already.
    Unsound,
    /// Whoever read our output has gone, such as `head`: it has what it wanted.
    ReaderGone,
    /// Anything else.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Failure {
    /// The documented exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::ReaderGone => 0,
            Self::JobFailed | Self::Unsound | Self::Other(_) => 1,
            Self::Usage(_) | Self::CommandLine => 2,
            Self::Unreachable(_) => 3,
            Self::JobCancelled => 6,
            Self::Interrupted => 130,
            Self::Status(status) => match status.code() {
                Code::Unavailable => 3,
                Code::NotFound => 4,
                Code::InvalidArgument
                | Code::AlreadyExists
                | Code::FailedPrecondition
                | Code::ResourceExhausted
                | Code::PermissionDenied
                | Code::Unauthenticated => 5,
                _ => 1,
            },
        }
    }

    /// Says what went wrong on standard error and gives the exit code.
    pub fn report(&self) -> ExitCode {
        say_lines(self.lines());
        ExitCode::from(self.code())
    }

    /// The same as a part of other words.
    pub fn why(&self) -> String {
        self.lines().join("\n").trim_start_matches("error: ").to_owned()
    }

    /// Returns it in words, as lines; none where it was shown already.
    fn lines(&self) -> Vec<String> {
        match self {
            Self::JobFailed
            | Self::JobCancelled
            | Self::Interrupted
            | Self::Unsound
            | Self::CommandLine
            | Self::ReaderGone => Vec::new(),
            Self::Usage(why) | Self::Unreachable(why) => local_lines(why),
            // A file's error shows its place in the file.
            Self::Other(error) => local_lines(&format!("{error:#}")),
            Self::Status(status) => status_lines(status),
        }
    }
}

/// Returns an error in words of ours. Further lines are set off: some hold words of others.
fn local_lines(why: &str) -> Vec<String> {
    let (first, rest) = why.split_once('\n').unwrap_or((why, ""));
    std::iter::once(format!("error: {first}")).chain(quoted(rest)).collect()
}

/// Returns a status with its details in words. Field violations replace the message, which repeats them.
fn status_lines(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    if violations.is_empty() {
        let retry = details.retry_info().and_then(|info| info.retry_delay);
        let retry = retry.map(|delay| format!("; try again in {} s", delay.as_secs().max(1)));
        return vec![format!("error: {}{}", status.message(), retry.unwrap_or_default())];
    }
    let mut lines = vec!["error: the coordinator refuses the request".to_owned()];
    lines.extend(violations.iter().map(|v| format!("  {}: {}", v.field, v.description)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_as_documented() {
        let status = |code| Failure::from(Status::new(code, "x")).code();
        let table = [
            (Failure::JobFailed.code(), 1),
            (Failure::Usage(String::new()).code(), 2),
            (Failure::Unreachable(String::new()).code(), 3),
            (status(Code::Unavailable), 3),
            (status(Code::NotFound), 4),
            (status(Code::InvalidArgument), 5),
            (Failure::JobCancelled.code(), 6),
            (Failure::Interrupted.code(), 130),
        ];
        for (found, expected) in table {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn violations_are_shown_by_field() {
        let field = muster_proto::convert::field_error("spec.min_nodes", "is 0");
        let text = Failure::from(muster_proto::convert::invalid_argument(&[field])).lines();
        assert_eq!(text, ["error: the coordinator refuses the request", "  spec.min_nodes: is 0"]);
    }
}
