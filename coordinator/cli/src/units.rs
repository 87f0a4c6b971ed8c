//! What people write on a command line: spans, sizes, node counts, pairs.

use std::str::FromStr;
use std::time::Duration;

/// A span such as `90s`, `1.5m`, `250ms`; a bare number is seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let scale = match unit {
            "" | "s" => 1.0,
            "ms" => 1e-3,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            other => return Err(format!("{other:?} is not a unit of time; use ms, s, m, h or d")),
        };
        let seconds: f64 = number.parse().map_err(|_| format!("{text:?} is not a span such as 30s"))?;
        Duration::try_from_secs_f64(seconds * scale)
            .map(Self)
            .map_err(|_| format!("{text:?} is out of range"))
    }
}

/// A size such as `4GiB`, `500MB`; a bare number is bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let scale: f64 = match unit {
            "" | "B" => 1.0,
            "k" | "kB" | "KB" => 1e3,
            "M" | "MB" => 1e6,
            "G" | "GB" => 1e9,
            "T" | "TB" => 1e12,
            "KiB" | "Ki" => 1024.0,
            "MiB" | "Mi" => 1024.0 * 1024.0,
            "GiB" | "Gi" => 1024.0 * 1024.0 * 1024.0,
            "TiB" | "Ti" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            other => return Err(format!("{other:?} is not a unit of size; use MB, GB, MiB or GiB")),
        };
        let value: f64 = number.parse().map_err(|_| format!("{text:?} is not a size such as 4GiB"))?;
        let bytes = value * scale;
        if !(0.0..1e18).contains(&bytes) {
            return Err(format!("{text:?} is out of range"));
        }
        Ok(Self(bytes as u64))
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    (text[..at].trim(), text[at..].trim())
}

/// Nodes as torchrun takes them: `4`, or `2:4` for the fewest and the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeRange {
    pub min: u32,
    pub max: u32,
}

impl FromStr for NodeRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        let count = |part: &str| part.parse().map_err(|_| format!("{text:?} is neither N nor MIN:MAX"));
        Ok(Self { min: count(min)?, max: count(max)? })
    }
}

/// `KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValue(pub String, pub String);

impl FromStr for KeyValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self(key.to_owned(), value.to_owned())),
            Some(_) | None => Err(format!("{text:?} is not of the form KEY=VALUE")),
        }
    }
}

/// `KEY=VALUE`, or `KEY` for the value that it has here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Variable(pub String, pub String);

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('=') {
            return text.parse().map(|KeyValue(key, value)| Self(key, value));
        }
        match std::env::var(text) {
            Ok(value) => Ok(Self(text.to_owned(), value)),
            Err(std::env::VarError::NotPresent) => Err(format!("{text:?} is not set here; use KEY=VALUE")),
            Err(error @ std::env::VarError::NotUnicode(_)) => Err(format!("{text:?}: {error}")),
        }
    }
}

/// A span for people: `45s`, `3m 20s`, `2h 05m`.
pub(crate) fn show_span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// A size for people.
pub(crate) fn show_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write() {
        let span = |text: &str| text.parse::<Span>().ok().map(|span| span.0.as_millis());
        let spans = [("30s", Some(30_000)), ("250ms", Some(250)), ("1.5m", Some(90_000)), ("7", Some(7000))];
        for (text, expected) in
            spans.into_iter().chain([("-1s", None), ("x", None), ("5y", None), ("", None)])
        {
            assert_eq!(span(text), expected, "{text}");
        }
        let bytes = |text: &str| text.parse::<Bytes>().ok().map(|bytes| bytes.0);
        let sizes =
            [("4GiB", Some(4 << 30)), ("1.5 kB", Some(1500)), ("12", Some(12)), ("-1", None), ("4X", None)];
        for (text, expected) in sizes {
            assert_eq!(bytes(text), expected, "{text}");
        }
        let range = |text: &str| text.parse::<NodeRange>().ok().map(|range| (range.min, range.max));
        for (text, expected) in [("4", Some((4, 4))), ("2:4", Some((2, 4))), ("a", None), ("1:", None)] {
            assert_eq!(range(text), expected, "{text}");
        }
    }
}
