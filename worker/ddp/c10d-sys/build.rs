//! Compiles the C++ shim against the libtorch that `cargo xtask setup` brings.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=shim");
    let Some(libtorch) = std::env::var_os("LIBTORCH").map(PathBuf::from) else {
        println!("cargo::error=LIBTORCH is not set: run `cargo xtask setup`, which brings libtorch 2.11.0");
        return;
    };
    let include = libtorch.join("include");
    if !include.join("torch/csrc/distributed/c10d/reducer.hpp").is_file() {
        println!(
            "cargo::error=LIBTORCH holds no libtorch with c10d: run `cargo xtask setup`, which brings 2.11.0"
        );
        return;
    }
    let lib = libtorch.join("lib");

    cc::Build::new()
        .cpp(true)
        .std("c++17")
        // Also in dev: these headers are templates all the way down, and -O0 makes them slower to link.
        .opt_level(2)
        .debug(false)
        .define("USE_C10D_GLOO", None)
        .flag("-isystem")
        .flag(include.as_os_str())
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").as_os_str())
        .include("shim")
        .include("shim/gloo-stubs")
        .files(["shim/group.cpp", "shim/reducer.cpp"])
        .compile("muster_c10d");

    println!("cargo::rustc-link-search=native={}", lib.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
    // Only for this package's own tests; a package with binaries says the same for itself.
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo::metadata=libtorch_lib={}", lib.display());
}
