//! Messages as proto3 JSON, both ways, by the descriptors that reflection serves: what is printed here is what
//! grpcurl prints, and what is read is what grpcurl takes; and the job files that people write.

use std::sync::LazyLock;

use anyhow::Context;
use muster_core::types::text::escape_json;
use muster_proto::v1;
use prost::Message;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    // The bytes are compiled in beside the types they describe.
    #[expect(clippy::expect_used, reason = "see above")]
    DescriptorPool::decode(muster_proto::DESCRIPTOR_SET).expect("the compiled-in descriptors are valid")
});

fn descriptor(name: &str) -> anyhow::Result<MessageDescriptor> {
    let full = format!("muster.v1.{name}");
    POOL.get_message_by_name(&full).with_context(|| format!("{full} is not among the descriptors"))
}

/// Returns a message of type `name` in one line, in which nothing controls a terminal.
pub fn line(name: &str, message: &impl Message) -> anyhow::Result<String> {
    let dynamic = DynamicMessage::decode(descriptor(name)?, message.encode_to_vec().as_slice())?;
    let json = serde_json::to_string(&dynamic)?;
    Ok(escape_json(&json).into_owned())
}

/// Reads a message of type `name`. An unknown field is an error that names the nearest known one.
pub fn read<T: Message + Default>(name: &str, value: serde_json::Value) -> anyhow::Result<T> {
    let descriptor = descriptor(name)?;
    check_fields(&descriptor, &value, "")?;
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let dynamic = DynamicMessage::deserialize_with_options(descriptor, value, &options)?;
    Ok(dynamic.transcode_to()?)
}

/// The job specification in a file's text, TOML or JSON.
pub fn job_spec(text: &str, is_toml: bool) -> anyhow::Result<v1::JobSpec> {
    let value = if is_toml {
        toml::from_str(text).context("it is not valid TOML")?
    } else {
        serde_json::from_str(text).context("it is not valid JSON")?
    };
    read("JobSpec", value).context("it is not a job specification")
}

fn check_fields(descriptor: &MessageDescriptor, value: &serde_json::Value, path: &str) -> anyhow::Result<()> {
    let serde_json::Value::Object(fields) = value else { return Ok(()) };
    for (key, value) in fields {
        let known = descriptor.fields().find(|field| field.json_name() == key || field.name() == key);
        let Some(field) = known else {
            let score = |name: &str| strsim::jaro_winkler(name, key);
            let nearest =
                descriptor.fields().max_by(|a, b| score(a.json_name()).total_cmp(&score(b.json_name())));
            let nearest = nearest.map(|field| format!("; did you mean {path}{}?", field.json_name()));
            anyhow::bail!("there is no field {path}{key}{}", nearest.unwrap_or_default());
        };
        let prost_reflect::Kind::Message(inner) = field.kind() else { continue };
        if inner.full_name() == "google.protobuf.Duration" {
            let seconds = value.as_str().and_then(|text| text.strip_suffix('s')?.parse::<f64>().ok());
            anyhow::ensure!(
                seconds.is_some(),
                "{path}{key} is {value}; write a duration in seconds, such as \"90s\""
            );
        } else if !field.is_map() && inner.full_name().starts_with("muster.") {
            check_fields(&inner, value, &format!("{path}{key}."))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_proto::v1;

    fn spec(text: &str) -> anyhow::Result<v1::JobSpec> {
        read("JobSpec", serde_json::from_str(text).unwrap())
    }

    #[test]
    fn both_spellings_and_durations_are_read() {
        let read = spec(r#"{"command":["a"],"min_nodes":2,"procsPerNode":3,"stopGrace":"1.5s"}"#).unwrap();
        assert_eq!((read.min_nodes, read.procs_per_node), (Some(2), Some(3)));
        assert_eq!(read.stop_grace, Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }));
        let line = line("JobSpec", &read).unwrap();
        assert_eq!(line, r#"{"command":["a"],"minNodes":2,"procsPerNode":3,"stopGrace":"1.500s"}"#);
    }

    #[test]
    fn values_that_are_not_finite_are_strings_as_in_proto3() {
        for (value, said) in
            [(f64::NAN, "NaN"), (f64::INFINITY, "Infinity"), (f64::NEG_INFINITY, "-Infinity")]
        {
            // One at a time: a map has no order.
            let values = [("loss".to_owned(), value)].into();
            let line = line("Point", &v1::Point { values, ..v1::Point::default() }).unwrap();
            assert_eq!(line, format!(r#"{{"values":{{"loss":"{said}"}}}}"#));
        }
    }

    #[test]
    fn an_unknown_field_names_the_nearest() {
        let error = |text: &str| spec(text).unwrap_err().to_string();
        assert_eq!(error(r#"{"minNode":2}"#), "there is no field minNode; did you mean minNodes?");
        assert_eq!(
            error(r#"{"perProc":{"gpu":2}}"#),
            "there is no field perProc.gpu; did you mean perProc.gpus?"
        );
        let bad_span = r#"stopGrace is "1 minute"; write a duration in seconds, such as "90s""#;
        assert!(error(r#"{"stopGrace":"1 minute"}"#).starts_with(bad_span));
        assert!(spec(r#"{"minNodes":"many"}"#).is_err());
        assert!(spec("[1]").is_err());
    }
}
