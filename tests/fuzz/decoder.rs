//! One decoder under libFuzzer: the one that MUSTER_DECODER names. All decoders are in one binary, built once, and the
//! list of them is the crates' own, so a new one is fuzzed as soon as it is in its crate's list.
//!
//! With MUSTER_SEEDS it fuzzes nothing: it prints the decoders' names, one a line, and writes their samples into that
//! directory, one folder each.

#![no_main]

use std::io::Write;
use std::path::Path;
use std::sync::LazyLock;

use muster_decoders::Decoder;

static DECODER: LazyLock<Decoder> = LazyLock::new(|| {
    let name = std::env::var("MUSTER_DECODER").unwrap_or_default();
    let found = decoders().find(|decoder| decoder.name == name);
    found.unwrap_or_else(|| end(&format!("MUSTER_DECODER is {name:?}, which is not the name of a decoder")))
});

fn decoders() -> impl Iterator<Item = Decoder> {
    (muster_proto::fuzz::DECODERS.into_iter())
        .chain(muster_coordinator::fuzz::DECODERS)
        .chain(muster_worker::fuzz::DECODERS)
        .chain(muster_tcpstore::fuzz::DECODERS)
        .chain(muster_cli::fuzz::DECODERS)
}

fn end(why: &str) -> ! {
    eprintln!("error: {why}");
    std::process::exit(2)
}

fn write_seeds(dir: &Path) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for decoder in decoders() {
        let dir = dir.join(decoder.name);
        std::fs::create_dir_all(&dir)?;
        for (number, sample) in (decoder.samples)().into_iter().enumerate() {
            std::fs::write(dir.join(format!("sample-{number}")), sample)?;
        }
        writeln!(out, "{}", decoder.name)?;
    }
    Ok(())
}

libfuzzer_sys::fuzz_target!(
    init: {
        if let Some(dir) = std::env::var_os("MUSTER_SEEDS") {
            match write_seeds(Path::new(&dir)) {
                Ok(()) => std::process::exit(0),
                Err(error) => end(&format!("failed to write the samples: {error}")),
            }
        }
        LazyLock::force(&DECODER);
    },
    |bytes: &[u8]| (DECODER.decode)(bytes)
);
