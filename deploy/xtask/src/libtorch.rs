//! libtorch out of torch's own wheel, with the two CUDA libraries that even its CPU half is linked to:
//! 544 MB to download instead of the 4 GB that `pip install torch` takes.

use crate::cargo;
use crate::deps::{Deps, Part};
use crate::fetch::Pin;
use crate::pypi::Release;
use crate::{machine, sha256};
use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const TORCH: Release = Release {
    project: "torch",
    file: "torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl",
    pin: Pin {
        bytes: 530_712_279,
        sha256: "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
    },
};
const CUDA_RUNTIME: Release = Release {
    project: "nvidia-cuda-runtime",
    file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    pin: Pin { bytes: 2_243_632, sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548" },
};
const CUPTI: Release = Release {
    project: "nvidia-cuda-cupti",
    file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
    pin: Pin {
        bytes: 10_715_597,
        sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    },
};

/// The folders in which pip notes what it installed, one for each wheel.
const INSTALLED: [&str; 3] = [
    "torch-2.11.0.dist-info",
    "nvidia_cuda_runtime-13.0.96.dist-info",
    "nvidia_cuda_cupti-13.0.85.dist-info",
];

/// The part of the set-up that this is.
pub fn part() -> Part {
    Part {
        name: "libtorch 2.11.0",
        stamp: "libtorch/.stamp",
        fingerprint: [TORCH, CUDA_RUNTIME, CUPTI].map(|release| release.pin.sha256).join(" "),
        files: &[
            "libtorch/torch/lib/libtorch_cpu.so",
            "libtorch/torch/include/torch/csrc/api/include/torch/all.h",
        ],
    }
}

/// Takes what `pip install --target` has put there by hand if it is whole, else downloads and installs.
pub fn bring(deps: &Deps) -> Result<String> {
    let place = deps.path("libtorch");
    if place.is_dir() {
        match verify(&place) {
            Ok(files) => return Ok(format!("was there already; {files} files have the right hashes")),
            Err(error) => eprintln!("  {} is not whole ({error:#}); it will be replaced", place.display()),
        }
    }
    machine::disk(deps)?;
    let wheels = [TORCH, CUDA_RUNTIME, CUPTI]
        .iter()
        .map(|release| release.download(deps))
        .collect::<Result<Vec<_>>>()?;
    let staged = deps.path("staging/libtorch");
    let temporary = deps.path("staging/tmp");
    fs::create_dir_all(&temporary)?;
    let progress = ProgressBar::new_spinner().with_message("unpacking libtorch (1.2 GB)");
    progress.enable_steady_tick(Duration::from_millis(120));
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"])
        .args(["--only-binary=:all:", "--python-version", "3.12", "--target"])
        .arg(&staged)
        .args(&wheels)
        .env("TMPDIR", &temporary)
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .stdin(deps.lock_as_input()?);
    let unpacked = cargo::run(&mut pip);
    progress.finish_and_clear();
    unpacked.context("pip failed to unpack libtorch")?;
    deps.place(&staged, "libtorch")?;
    for wheel in wheels {
        fs::remove_file(wheel)?;
    }
    Ok("downloaded".into())
}

/// Compares every file of the three wheels with the hash that pip noted; gives their number.
fn verify(place: &Path) -> Result<usize> {
    let mut files = 0;
    for folder in INSTALLED {
        let record = fs::read_to_string(place.join(folder).join("RECORD"))
            .with_context(|| format!("{folder} has no RECORD"))?;
        for line in record.lines() {
            let Some((name, hash)) = parse_record(line) else { continue };
            if sha256::base64_url(&sha256::of_file(&place.join(name))?) != hash {
                bail!("{name} is damaged");
            }
            files += 1;
        }
    }
    Ok(files)
}

/// A file and its hash; None for what has no hash (the RECORD itself) or lies outside (scripts).
fn parse_record(line: &str) -> Option<(&str, &str)> {
    let (rest, _bytes) = line.rsplit_once(',')?;
    let (name, hash) = rest.rsplit_once(',')?;
    let name = name.trim_matches('"');
    (!name.starts_with("..")).then_some((name, hash.strip_prefix("sha256=")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_record() {
        assert_eq!(parse_record("torch/a.so,sha256=abc,12"), Some(("torch/a.so", "abc")));
        assert_eq!(parse_record("\"torch/a,b.so\",sha256=abc,12"), Some(("torch/a,b.so", "abc")));
        assert_eq!(parse_record("../../bin/torchrun,sha256=abc,12"), None);
        assert_eq!(parse_record("torch-2.11.0.dist-info/RECORD,,"), None);
    }

    #[test]
    fn a_damaged_or_missing_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for info in INSTALLED {
            fs::create_dir(folder.path().join(info)).unwrap();
            let line = "empty,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n";
            fs::write(folder.path().join(info).join("RECORD"), line).unwrap();
        }
        assert!(verify(folder.path()).is_err(), "missing");
        fs::write(folder.path().join("empty"), "").unwrap();
        assert_eq!(verify(folder.path()).unwrap(), 3);
        fs::write(folder.path().join("empty"), "not").unwrap();
        assert_eq!(verify(folder.path()).unwrap_err().to_string(), "empty is damaged");
    }
}
