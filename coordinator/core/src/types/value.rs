//! A value of a point in JSON, which has no numbers for NaN and the infinities: these are strings there, as in proto3's
//! own JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error, Unexpected, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

const NAN: &str = "NaN";
const INFINITY: &str = "Infinity";
const NEGATIVE_INFINITY: &str = "-Infinity";

/// A number that a rank reported. It may be NaN or infinite: a loss that is one is what its user must see.
#[derive(Clone, Copy, Debug)]
pub struct Value(pub f64);

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() {
            serializer.serialize_f64(self.0)
        } else if self.0.is_nan() {
            serializer.serialize_str(NAN)
        } else {
            serializer.serialize_str(if self.0 > 0.0 { INFINITY } else { NEGATIVE_INFINITY })
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Numbers)
    }
}

struct Numbers;

impl Visitor<'_> for Numbers {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a number, \"{NAN}\", \"{INFINITY}\" or \"{NEGATIVE_INFINITY}\"")
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value(number))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        Ok(Value(number as f64))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        Ok(Value(number as f64))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        match text {
            NAN => Ok(Value(f64::NAN)),
            INFINITY => Ok(Value(f64::INFINITY)),
            NEGATIVE_INFINITY => Ok(Value(f64::NEG_INFINITY)),
            other => Err(E::invalid_value(Unexpected::Str(other), &self)),
        }
    }
}

/// Serializes values by name, for `#[serde(with)]`.
pub fn serialize<S: Serializer>(values: &BTreeMap<String, f64>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(values.iter().map(|(name, value)| (name, Value(*value))))
}

/// Deserializes values by name, for `#[serde(with)]`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let values = BTreeMap::<String, Value>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Line {
        #[serde(with = "super")]
        values: BTreeMap<String, f64>,
    }

    #[test]
    fn every_number_survives_json() {
        let numbers = [
            (0.1, "0.1"),
            (-1e300, "-1e+300"),
            (f64::NAN, r#""NaN""#),
            (-f64::NAN, r#""NaN""#),
            (f64::INFINITY, r#""Infinity""#),
            (f64::NEG_INFINITY, r#""-Infinity""#),
        ];
        for (number, expected) in numbers {
            let text = serde_json::to_string(&Line { values: [("loss".to_owned(), number)].into() }).unwrap();
            assert_eq!(text, format!(r#"{{"values":{{"loss":{expected}}}}}"#));
            let read = serde_json::from_str::<Line>(&text).unwrap().values["loss"];
            assert_eq!(format!("{read:?}"), format!("{number:?}"));
        }
        for text in ["3", "-3", "18446744073709551615"] {
            let read: Value = serde_json::from_str(text).unwrap();
            assert_eq!(format!("{:?}", read.0), format!("{:?}", text.parse::<f64>().unwrap()));
        }
        for text in [r#""nan""#, r#""1""#, "null", "[]", "NaN"] {
            assert!(serde_json::from_str::<Value>(text).is_err(), "{text}");
        }
    }
}
