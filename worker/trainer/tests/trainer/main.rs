//! The training programs as processes; helpers that every test of them uses.

#![expect(clippy::unwrap_used, reason = "a test program: helpers may panic as tests may")]

mod checkpoints;
mod vision;

use flate2::{Compression, write::GzEncoder};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// Images of 8 by 8 in which the bright row is the label: learnable within a second.
fn write_data_set(dir: &Path) {
    for (name, count) in [("train", 800u32), ("t10k", 83)] {
        let labels: Vec<u8> = (0..count).map(|i| (i * 7 % 8) as u8).collect();
        let pixels = labels.iter().flat_map(|&label| {
            (0..64u8).map(move |pixel| if pixel / 8 == label { 255 } else { pixel % 5 * 9 })
        });
        write_idx(
            &dir.join(format!("{name}-images-idx3-ubyte.gz")),
            &[0x803, count, 8, 8],
            &pixels.collect::<Vec<u8>>(),
        );
        write_idx(&dir.join(format!("{name}-labels-idx1-ubyte.gz")), &[0x801, count], &labels);
    }
}

fn write_idx(path: &Path, header: &[u32], items: &[u8]) {
    let mut encoder = GzEncoder::new(std::fs::File::create(path).unwrap(), Compression::fast());
    for number in header {
        encoder.write_all(&number.to_be_bytes()).unwrap();
    }
    encoder.write_all(items).unwrap();
    encoder.finish().unwrap();
}

fn trainer(data: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster-trainer"));
    command.arg("vision").args(flags).arg("--data").arg(data).env("OMP_NUM_THREADS", "1");
    for name in [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "MUSTER_TELEMETRY",
        "MUSTER_CHECKPOINT_DIR",
    ] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(data: &Path, flags: &[&str]) -> Output {
    trainer(data, flags).output().unwrap()
}

/// Killed if the test panics first.
struct Rank(Option<Child>);

impl Rank {
    fn output(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _already_gone = child.kill();
            let _status = child.wait();
        }
    }
}
