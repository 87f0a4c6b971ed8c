//! One line of a rank, which may be anything.

use std::collections::BTreeMap;

use muster_core::types::{Millis, Value};
use serde::Deserialize;

/// Values in a point and bytes in a value's name, as the API allows.
pub(super) const VALUES_MAX: usize = 64;
pub(super) const NAME_BYTES_MAX: usize = 128;
/// The last second that a Timestamp can say, in the year 9999; readers choke on what lies beyond it.
const TIME_SECONDS_MAX: f64 = 253_402_300_799.0;

/// A point before it is numbered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reported {
    pub step: u64,
    pub time: Option<Millis>,
    pub values: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct Line {
    step: u64,
    time: Option<Value>,
    /// What is null is left out, and the rest is kept.
    values: BTreeMap<String, Option<Value>>,
}

/// Numbers that JSON does not have and that programs write all the same, Python's json among them. The longest that
/// begins at a place comes first.
const BARE: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];

/// Returns the line with each such number in quotes, or none if there is none outside of a string.
fn quoted(line: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(line.len() + 16);
    let mut rest = line;
    let mut in_string = false;
    let mut found = false;
    while let Some((byte, after)) = rest.split_first() {
        let bare = BARE.into_iter().find(|bare| !in_string && rest.starts_with(bare));
        if let Some(bare) = bare {
            out.extend_from_slice(&[b"\"", bare, b"\""].concat());
            rest = &rest[bare.len()..];
            found = true;
            continue;
        }
        out.push(*byte);
        rest = after;
        match byte {
            b'"' => in_string = !in_string,
            // What is escaped does not end the string.
            b'\\' if in_string => {
                out.extend(rest.first());
                rest = rest.get(1..).unwrap_or_default();
            }
            _ => {}
        }
    }
    found.then_some(out)
}

/// Reads JSON, and what Python takes for it. Most lines have no such number and are looked at once.
fn read(line: &[u8]) -> Result<Line, serde_json::Error> {
    serde_json::from_slice(line).or_else(|error| match quoted(line) {
        Some(line) => serde_json::from_slice(&line),
        None => Err(error),
    })
}

/// A time in Unix seconds. One that cannot be is as none: the point itself may be fine.
pub(super) fn time(seconds: f64) -> Option<Millis> {
    (0.0..TIME_SECONDS_MAX).contains(&seconds).then_some(Millis((seconds * 1000.0) as u64))
}

/// Reads a line. The error says what is wrong with it.
pub(crate) fn parse(line: &[u8]) -> Result<Reported, String> {
    let line = read(line).map_err(|error| format!("is not a point: {error}"))?;
    if line.values.len() > VALUES_MAX {
        return Err(format!("holds {} values; at most {VALUES_MAX} are kept", line.values.len()));
    }
    if let Some(name) = line.values.keys().find(|name| name.is_empty() || name.len() > NAME_BYTES_MAX) {
        let bytes = name.len();
        return Err(format!("has a value whose name has {bytes} bytes; 1 to {NAME_BYTES_MAX} are allowed"));
    }
    let time = line.time.and_then(|Value(seconds)| time(seconds));
    let values = line.values.into_iter().filter_map(|(name, value)| Some((name, value?.0)));
    Ok(Reported { step: line.step, time, values: values.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_not_finite_are_values() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        let table: [(&str, &[(&str, f64)]); 6] = [
            (r#"{"step":1,"values":{"loss":NaN,"lr":0.1}}"#, &[("loss", nan), ("lr", 0.1)]),
            (r#"{"step": 1, "values": {"a": Infinity, "b": -Infinity}}"#, &[("a", inf), ("b", -inf)]),
            (r#"{"step":1,"time":NaN,"values":{"a":"Infinity","b":"NaN"}}"#, &[("a", inf), ("b", nan)]),
            (r#"{"step":1,"values":{"NaN \\\" -Infinity":-Infinity}}"#, &[(r#"NaN \" -Infinity"#, -inf)]),
            (r#"{"step":1,"values":{"\\":NaN},"more":[NaN,"NaN"]}"#, &[(r"\", nan)]),
            (r#"{"step":1,"values":{"loss":null}}"#, &[]),
        ];
        for (line, expected) in table {
            let found: Vec<_> = parse(line.as_bytes()).unwrap().values.into_iter().collect();
            let expected: Vec<_> =
                expected.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
            assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{line}");
        }
        for line in
            [r#"{"step":NaN,"values":{}}"#, r#"{"step":1,"values":NaN}"#, r#"{"step":1,"values":{"a":nan}}"#]
        {
            parse(line.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn lines_as_programs_write_them() {
        let table: [(&str, Option<(u64, usize)>); 8] = [
            (r#"{"step":1,"values":{"loss":2.3}}"#, Some((1, 1))),
            (r#"{"step":1,"time":1760000000.5,"values":{"loss":null,"lr":0.1}}"#, Some((1, 1))),
            (r#"{"step":1,"values":{},"more":[1]}"#, Some((1, 0))),
            (r#"{"step":-1,"values":{"loss":2.3}}"#, None),
            (r#"{"values":{"loss":2.3}}"#, None),
            (r#"{"step":1,"values":{"loss":"2.3"}}"#, None),
            ("not json", None),
            ("", None),
        ];
        for (line, expected) in table {
            let parsed = parse(line.as_bytes()).ok().map(|point| (point.step, point.values.len()));
            assert_eq!(parsed, expected, "{line}");
        }
        let times =
            [("1.5", Some(1500)), ("-1", None), ("253402300799", None), ("1e300", None), ("null", None)];
        for (time, expected) in times {
            let line = format!(r#"{{"step":1,"time":{time},"values":{{}}}}"#);
            assert_eq!(parse(line.as_bytes()).unwrap().time, expected.map(Millis), "{time}");
        }
        let values = |count| (0..count).map(|i| format!(r#""v{i}":1"#)).collect::<Vec<_>>().join(",");
        let line = |count| format!(r#"{{"step":1,"values":{{{}}}}}"#, values(count));
        assert!(parse(line(64).as_bytes()).is_ok() && parse(line(65).as_bytes()).is_err());
        let named = |bytes| format!(r#"{{"step":1,"values":{{"{}":1}}}}"#, "x".repeat(bytes));
        assert!(parse(named(128).as_bytes()).is_ok() && parse(named(129).as_bytes()).is_err());
    }
}
