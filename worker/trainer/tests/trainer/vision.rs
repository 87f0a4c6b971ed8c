//! `muster-trainer vision` as users start it: real processes, a real socket, a data set made on the spot.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::{Rank, run, trainer, write_data_set};

/// The standard output of rank 0 of two, less what depends on the clock.
fn losses_of_two_ranks(data: &Path) -> Vec<String> {
    // The port may be taken between here and rank 0, by anyone: then another one is tried.
    for _ in 0..3 {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ranks: Vec<Rank> = (0..2)
            .map(|rank| {
                let mut command = trainer(data, &["--epochs", "2"]);
                command
                    .env("RANK", rank.to_string())
                    .env("LOCAL_RANK", rank.to_string())
                    .env("WORLD_SIZE", "2")
                    .env("MASTER_ADDR", "127.0.0.1")
                    .env("MASTER_PORT", port.to_string())
                    .env("MUSTER_TIMEOUT_SECONDS", "30");
                Rank(Some(command.spawn().unwrap()))
            })
            .collect();
        let outputs: Vec<Output> = ranks.into_iter().map(Rank::output).collect();
        if outputs.iter().all(|output| output.status.success()) {
            assert!(outputs[1].stdout.is_empty(), "only rank 0 prints");
            return String::from_utf8_lossy(&outputs[0].stdout)
                .lines()
                .filter(|line| line.starts_with("step") || line.starts_with("epoch"))
                .map(|line| line.split(" images/s").next().unwrap_or_default())
                .map(|line| line.split(" after ").next().unwrap_or_default())
                // The rate stands last on a step's line.
                .map(|line| {
                    if line.starts_with("step") { line.rsplit_once(' ').unwrap().0 } else { line }.to_owned()
                })
                .collect();
        }
    }
    panic!("two ranks failed on three ports");
}

#[test]
fn two_ranks_learn_and_the_same_seed_gives_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let first = losses_of_two_ranks(dir.path());
    let last = first.last().unwrap();
    let accuracy: f64 = last.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(last.starts_with("epoch 2/2 accuracy") && accuracy > 0.9, "{first:?}");
    assert_eq!(first, losses_of_two_ranks(dir.path()));
}

#[test]
fn metrics_arrive_on_the_telemetry_socket() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let socket = dir.path().join("telemetry.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = trainer(dir.path(), &["--epochs", "2", "--global-batch-size", "32"]);
    let rank = Rank(Some(command.env("MUSTER_TELEMETRY", &socket).spawn().unwrap()));
    let (stream, _) = listener.accept().unwrap();
    let points: Vec<Value> =
        BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert!(rank.output().status.success());

    let names: BTreeSet<&str> = points
        .iter()
        .flat_map(|point| point["values"].as_object().unwrap().keys())
        .map(String::as_str)
        .collect();
    let expected = ["accuracy", "epoch", "images_per_second", "learning_rate", "loss", "steps_total"];
    assert_eq!(names, BTreeSet::from(expected));
    let steps: Vec<u64> = points.iter().map(|point| point["step"].as_u64().unwrap()).collect();
    assert!(steps.is_sorted() && steps.windows(2).all(|pair| pair[1] - pair[0] <= 10), "{steps:?}");
    // 800 images in batches of 32, twice.
    assert_eq!(steps.last(), Some(&50));
    assert!(points.iter().all(|point| point["time"].as_f64().unwrap() > 1.7e9));
    let last = &points.last().unwrap()["values"];
    assert!(last["accuracy"].as_f64().unwrap() > 0.9 && last["epoch"] == 2.0, "{last}");
}

#[test]
fn exit_codes_and_messages_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let check = |flags: &[&str], code: i32, words: &[&str]| {
        let output = run(dir.path(), flags);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{flags:?}: {stderr}");
    };
    let place = dir.path().display().to_string();
    check(&[], 1, &["found no train-images", &place, "cargo xtask setup"]);
    let error_file = dir.path().join("error.json");
    let told = trainer(dir.path(), &[]).env("TORCHELASTIC_ERROR_FILE", &error_file).output().unwrap();
    assert_eq!(told.status.code(), Some(1));
    let left = std::fs::read_to_string(error_file).unwrap();
    assert!(left.contains(r#"{"message":{"#) && left.contains("found no train-images"), "{left}");
    check(&["--epochs", "0"], 2, &["--epochs"]);
    check(&["--no-such-flag"], 2, &["--no-such-flag"]);
    write_data_set(dir.path());
    check(&["--epochs", "1", "--limit", "64"], 0, &[]);
    check(&["--epochs", "1", "--limit", "64", "--target-accuracy", "1.1"], 1, &["target accuracy"]);
    let torn = dir.path().join("train-images-idx3-ubyte.gz");
    let bytes = std::fs::read(&torn).unwrap();
    std::fs::write(&torn, &bytes[..bytes.len() / 2]).unwrap();
    check(&[], 1, &["train-images-idx3-ubyte.gz", "cut short", "cargo xtask setup"]);
}

#[test]
fn half_a_launcher_is_an_error_that_names_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    write_data_set(dir.path());
    let output = trainer(dir.path(), &[]).env("RANK", "0").env("WORLD_SIZE", "2").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("MASTER_ADDR is not set") && stderr.contains("torchrun"), "{stderr}");
}
