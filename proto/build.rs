//! Compiles `muster/v1/*.proto` with protox (no protoc needed) into messages, clients, servers and the
//! descriptor set, comments included, that reflection serves.

use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 8] = [
    "job",
    "job_service",
    "node",
    "node_service",
    "cluster_service",
    "worker_service",
    "rendezvous_service",
    "token",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=muster");
    let files: Vec<String> = FILES.iter().map(|name| format!("muster/v1/{name}.proto")).collect();
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(&files)?;
    let descriptors = compiler.file_descriptor_set();
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("muster.v1.bin");
    std::fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".").bytes(".").compile_fds(descriptors)?;
    Ok(())
}
