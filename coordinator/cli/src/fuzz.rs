//! The decoders of this crate for the fuzzer and the property tests: the file of `muster submit --file`. In no build
//! that is shipped.

use muster_decoders::Decoder;
use muster_proto::v1;

use crate::messages;

/// Every decoder of this crate.
pub const DECODERS: [Decoder; 2] = [
    Decoder { name: "job_file_json", decode: |bytes| job_file(bytes, false), samples: json_samples },
    Decoder { name: "job_file_toml", decode: |bytes| job_file(bytes, true), samples: toml_samples },
];

fn job_file(bytes: &[u8], is_toml: bool) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match messages::job_spec(text, is_toml) {
        Ok(spec) => survives(&spec),
        Err(error) => assert!(!error.to_string().is_empty(), "a refusal says why"),
    }
}

/// What is read from a file can be shown, and read again.
fn survives(spec: &v1::JobSpec) {
    // A Duration that is out of range is the coordinator's to refuse; JSON cannot say it.
    let span_fits = |span: &prost_types::Duration| span.seconds.abs() <= 315_576_000_000;
    let spans = [spec.stop_grace, spec.start_timeout, spec.progress_timeout, spec.last_call];
    if !spans.iter().flatten().all(span_fits) {
        return;
    }
    let line = messages::line("JobSpec", spec).expect("a message can be shown");
    assert_eq!(messages::job_spec(&line, false).expect("what was shown can be read"), *spec, "{line}");
}

fn json_samples() -> Vec<Vec<u8>> {
    let whole = r#"{"name":"vision","command":["python3","train.py"],"env":{"A":"1"},"minNodes":1,"max_nodes":2,
"procsPerNode":2,"perProc":{"gpus":1,"cpuMillis":500,"memoryBytes":"1048576"},"maxRestarts":3,"priority":-1,
"nodeSelector":{"zone":"a"},"stopGrace":"1.5s","lastCall":"30s","startTimeout":"60s","stopSignal":"SIGINT",
"onCoordinatorLoss":"COORDINATOR_LOSS_POLICY_STOP"}"#;
    [whole, r#"{"command":["sh"]}"#].map(Into::into).into()
}

fn toml_samples() -> Vec<Vec<u8>> {
    vec![
        b"name = \"a\"\ncommand = [\"x\", 'y']\nminNodes = 4\nstopGrace = \"90s\"\n[env]\nA = \"1\"\n\
          [perProc]\ngpus = 1\n"
            .into(),
    ]
}

#[cfg(test)]
mod tests {
    #[test]
    fn decoders_hold_what_they_promise() {
        muster_decoders::check(&super::DECODERS);
    }
}
