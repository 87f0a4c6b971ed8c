//! The pattern that makes points of lines of output. Checked here, where all else of a specification is, and applied by
//! the node with the same code, so that what was accepted is what is matched.
//!
//! The crate `regex` leaves the core pure: it does no I/O and reads no clock, and the same line gives the same answer.
//! It takes time linear in the line whatever the pattern, so a hostile one costs no more than its bounds allow.

use std::collections::BTreeMap;

use regex::{Regex, RegexBuilder};

/// Longest pattern: several lines of text, while what is refused must fit into an answer.
const PATTERN_BYTES_MAX: usize = 1024;
/// Memory that a compiled pattern may take, and its cache while it matches: each node compiles it, once, in the shim.
/// `\d` takes some kilobytes of it each time it is repeated.
const COMPILED_BYTES_MAX: usize = 1 << 20;
/// Values in a point and bytes in a value's name, as the API allows.
const VALUES_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 128;
/// Bytes of a reason that are shown.
const REASON_BYTES_MAX: usize = 200;
/// The group that is no value.
const STEP: &str = "step";

/// A pattern that was checked: it has a named group for at least one value.
#[derive(Clone, Debug)]
pub struct MetricPattern {
    regex: Regex,
    /// Index of the group that is the step, if there is one.
    step: Option<usize>,
    /// The other named groups.
    values: Vec<(usize, String)>,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq)]
pub struct Matched {
    /// None if the pattern has no group for it.
    pub step: Option<u64>,
    /// Numbers by the names of their groups, NaN and the infinities among them.
    pub values: BTreeMap<String, f64>,
}

impl MetricPattern {
    /// Compiles and checks a pattern. The error says what is wrong and what to do, as a lowercase fragment.
    pub fn new(pattern: &str) -> Result<Self, String> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return Err(format!("has {} bytes; at most {PATTERN_BYTES_MAX} fit", pattern.len()));
        }
        let mut builder = RegexBuilder::new(pattern);
        builder.size_limit(COMPILED_BYTES_MAX).dfa_size_limit(COMPILED_BYTES_MAX);
        let regex = builder.build().map_err(|error| refusal(&error))?;
        let named = regex.capture_names().enumerate();
        let named: Vec<_> = named.filter_map(|(index, name)| Some((index, name?.to_owned()))).collect();
        let (steps, values): (Vec<_>, Vec<_>) = named.into_iter().partition(|(_, name)| name == STEP);
        if values.is_empty() {
            let example = r"loss (?P<loss>\S+)";
            return Err(format!("names no value; put a named group around each number, such as {example}"));
        }
        if values.len() > VALUES_MAX {
            return Err(format!("names {} values; at most {VALUES_MAX} fit into a point", values.len()));
        }
        if let Some((_, name)) = values.iter().find(|(_, name)| name.len() > NAME_BYTES_MAX) {
            return Err(format!("has a name of {} bytes; at most {NAME_BYTES_MAX} are allowed", name.len()));
        }
        Ok(Self { regex, step: steps.first().map(|(index, _)| *index), values })
    }

    /// What a line says, if it matches. One whose step is no number says nothing.
    pub fn read(&self, line: &str) -> Option<Matched> {
        let found = self.regex.captures(line)?;
        let step = match self.step {
            Some(group) => Some(found.get(group)?.as_str().parse().ok()?),
            None => None,
        };
        let number = |group: usize| found.get(group)?.as_str().parse::<f64>().ok();
        let value = |(group, name): &(usize, String)| Some((name.clone(), number(*group)?));
        Some(Matched { step, values: self.values.iter().filter_map(value).collect() })
    }
}

fn refusal(error: &regex::Error) -> String {
    match error {
        regex::Error::CompiledTooBig(_) => {
            r"is too large when compiled; repeat less, or use [0-9] in place of \d and (?-u:\w) of \w"
                .to_owned()
        }
        other => {
            // Its last line is the reason; those before it draw the pattern.
            let text = other.to_string();
            let reason = text.lines().last().unwrap_or_default();
            let reason = reason.trim_start_matches("error: ");
            let end = reason.floor_char_boundary(REASON_BYTES_MAX);
            format!("is no regular expression: {}; \\( stands for a parenthesis itself", &reason[..end])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_to_do() {
        let values = |count: usize| (0..count).map(|i| format!("(?<v{i}>.)")).collect::<Vec<_>>().concat();
        let table = [
            (r"step (?P<step>\d+).*loss (?P<loss>[0-9.eE+-]+)".to_owned(), None),
            (values(64), None),
            (values(65), Some("names 65 values; at most 64")),
            ("loss ([0-9.]+)".into(), Some("names no value; put a named group")),
            ("(?P<step>[0-9]+)".into(), Some("names no value; put a named group")),
            ("loss (".into(), Some("is no regular expression: unclosed group")),
            ("(?<a>.)(?<a>.)".into(), Some("is no regular expression: duplicate capture group name")),
            (r"(?<a>\w{1000}{1000})".into(), Some("is too large when compiled; repeat less")),
            ("(".repeat(1000), Some("is no regular expression: ")),
            (format!("(?<{}>.)", "n".repeat(129)), Some("has a name of 129 bytes; at most 128")),
            ("x".repeat(1025), Some("has 1025 bytes; at most 1024")),
        ];
        for (pattern, expected) in table {
            let refused = MetricPattern::new(&pattern).err();
            let is_as_expected = match (&refused, expected) {
                (Some(refused), Some(expected)) => {
                    refused.starts_with(expected) && refused.lines().count() == 1
                }
                (refused, expected) => refused.is_none() && expected.is_none(),
            };
            assert!(is_as_expected, "{pattern}: {refused:?}");
        }
    }

    #[test]
    fn lines_as_programs_print_them() {
        /// A pattern, a line, and the step and values in it.
        type Case = (&'static str, &'static str, Option<(Option<u64>, &'static [(&'static str, f64)])>);
        let full = r"step (?P<step>\d+).*loss[=: ]+(?P<loss>\S+?)(,|$)(.*lr (?P<lr>\S+))?";
        let table: [Case; 9] = [
            (full, "step 7: loss 0.25", Some((Some(7), &[("loss", 0.25)]))),
            (full, "[10:01] step 8, loss=2e-1, lr 1e-4", Some((Some(8), &[("loss", 0.2), ("lr", 1e-4)]))),
            (full, "step 9: loss none, lr Infinity", Some((Some(9), &[("lr", f64::INFINITY)]))),
            (full, "step 9: loss 1,5", Some((Some(9), &[("loss", 1.0)]))),
            (full, "step 99999999999999999999: loss 1", None),
            (full, "epoch 1", None),
            (full, "", None),
            ("(?<loss>[0-9.]+)", "loss 0.5 é\u{fffd}", Some((None, &[("loss", 0.5)]))),
            ("(?<step>[0-9]+)?/(?<loss>[0-9.]+)", "/0.5", None),
        ];
        for (pattern, line, expected) in table {
            let expected = expected.map(|(step, values)| Matched {
                step,
                values: values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            });
            assert_eq!(MetricPattern::new(pattern).unwrap().read(line), expected, "{line}");
        }
        let found = MetricPattern::new(full).unwrap().read("step 9: loss nan, lr -inf").unwrap();
        assert_eq!(
            (found.step, format!("{:?}", found.values)),
            (Some(9), r#"{"loss": NaN, "lr": -inf}"#.into())
        );
    }
}
