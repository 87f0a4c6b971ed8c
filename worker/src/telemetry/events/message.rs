//! What one record of an event file says: the few fields of TensorFlow's Event that make a scalar. All others, images,
//! histograms and text among them, are passed over.

use prost::Message;

/// The types of a tensor's elements that a scalar may have, and their sizes are those of f32 and f64.
const DT_FLOAT: i32 = 1;
const DT_DOUBLE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    scalar: Option<f32>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<Tensor>,
}

#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", tag = "4")]
    content: Vec<u8>,
    #[prost(float, repeated, tag = "5")]
    floats: Vec<f32>,
    #[prost(double, repeated, tag = "6")]
    doubles: Vec<f64>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dims: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// The scalars of an event.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scalars {
    pub step: u64,
    /// Unix time in seconds, as the program has it.
    pub time: f64,
    /// By tag, in their order. They may be NaN or infinite.
    pub values: Vec<(String, f64)>,
}

/// Reads a record. None without a scalar, and for a step before the first: TensorBoard shows that at the left, and a
/// point has no place for it. The error says why it is no event.
pub(crate) fn scalars(record: &[u8]) -> Result<Option<Scalars>, String> {
    let event = Event::decode(record).map_err(|error| format!("a record is no event: {error}"))?;
    let values = event.summary.map_or_else(Vec::new, |summary| summary.values);
    let values: Vec<_> = values.into_iter().filter_map(scalar).collect();
    let step = u64::try_from(event.step).ok().filter(|_| !values.is_empty());
    Ok(step.map(|step| Scalars { step, time: event.wall_time, values }))
}

/// As programs have written scalars: in a field of their own, and since TensorFlow 2 as tensors without dimensions.
fn scalar(value: Value) -> Option<(String, f64)> {
    let number = match (value.scalar, &value.tensor) {
        (Some(number), _) => widened(number),
        (None, Some(tensor)) => number_in(tensor)?,
        (None, None) => return None,
    };
    Some((value.tag, number)).filter(|(tag, _)| !tag.is_empty())
}

fn number_in(tensor: &Tensor) -> Option<f64> {
    if tensor.shape.as_ref().is_some_and(|shape| !shape.dims.is_empty()) {
        return None;
    }
    match (tensor.dtype, &tensor.floats[..], &tensor.doubles[..]) {
        (DT_FLOAT, [number], _) => Some(widened(*number)),
        (DT_FLOAT, [], _) => Some(widened(f32::from_le_bytes(tensor.content[..].try_into().ok()?))),
        (DT_DOUBLE, _, [number]) => Some(*number),
        (DT_DOUBLE, _, []) => Some(f64::from_le_bytes(tensor.content[..].try_into().ok()?)),
        _ => None,
    }
}

/// The number that the program had in mind: 0.1 rather than 0.10000000149, which is as near to the same f32.
fn widened(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// An event with these values, for tests and as the fuzzer's samples.
#[cfg(any(test, fuzzing))]
pub(crate) fn encoded(step: i64, values: &[(&str, f32)]) -> Vec<u8> {
    let value =
        |(tag, number): &(&str, f32)| Value { tag: (*tag).to_owned(), scalar: Some(*number), tensor: None };
    let values = values.iter().map(value).collect();
    Event { wall_time: 1_760_000_000.5, step, summary: Some(Summary { values }) }.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tensor: Tensor) -> Vec<u8> {
        let value = Value { tag: "loss".into(), scalar: None, tensor: Some(tensor) };
        Event { wall_time: 1.0, step: 3, summary: Some(Summary { values: vec![value] }) }.encode_to_vec()
    }

    #[test]
    fn scalars_in_every_form_and_nothing_else() {
        let float = Tensor { dtype: DT_FLOAT, ..Tensor::default() };
        let double = Tensor { dtype: DT_DOUBLE, ..Tensor::default() };
        let shape =
            |dims: &[i64]| Some(Shape { dims: dims.iter().map(|size| Dim { size: *size }).collect() });
        let table = [
            (encoded(3, &[("loss", 0.1)]), Some(0.1)),
            (of(Tensor { floats: vec![0.1], ..float.clone() }), Some(0.1)),
            (of(Tensor { content: 0.1f32.to_le_bytes().into(), ..float.clone() }), Some(0.1)),
            (of(Tensor { floats: vec![0.1], shape: shape(&[]), ..float.clone() }), Some(0.1)),
            (of(Tensor { doubles: vec![0.1], ..double.clone() }), Some(0.1)),
            (of(Tensor { content: 0.1f64.to_le_bytes().into(), ..double.clone() }), Some(0.1)),
            (of(Tensor { floats: vec![0.1], shape: shape(&[1]), ..float.clone() }), None),
            (of(Tensor { floats: vec![0.1, 0.2], ..float.clone() }), None),
            (of(Tensor { content: vec![0; 5], ..float.clone() }), None),
            (of(Tensor { content: vec![0; 4], ..double }), None),
            (of(Tensor { dtype: 7, floats: vec![0.1], ..float.clone() }), None),
            (of(float), None),
            (encoded(3, &[("", 0.1)]), None),
            (encoded(-1, &[("loss", 0.1)]), None),
            (Vec::new(), None),
        ];
        for (bytes, expected) in table {
            let found = scalars(&bytes).unwrap();
            let expected = expected.map(|number| (3, vec![("loss".to_owned(), number)]));
            assert_eq!(found.map(|found| (found.step, found.values)), expected, "{bytes:x?}");
        }
    }

    #[test]
    fn what_is_no_event_is_refused() {
        let nested = |depth: usize| {
            let inner = (0..depth).fold(Vec::new(), |inner: Vec<u8>, _| {
                [&[0x2a, inner.len().min(127) as u8][..], &inner].concat()
            });
            [&[0x2a, inner.len().min(127) as u8][..], &inner].concat()
        };
        // Half a field, a length beyond the end, a group that is never closed, a tag that is no text.
        let table: [&[u8]; 5] = [
            &[0x09, 1],
            &[0x2a, 0xff, 0xff, 0xff, 0xff, 0x0f],
            &[0x0b; 200],
            &[0x2a, 5, 10, 3, 10, 1, 0xff],
            &[0xff; 64],
        ];
        for bytes in table {
            scalars(bytes).unwrap_err();
        }
        // Deeply nested fields that are not known are not entered.
        scalars(&nested(60)).ok();
    }
}
