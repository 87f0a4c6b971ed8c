//! Real images to train on: Fashion-MNIST out of Debian's archive, or, where there is no apt,
//! scikit-learn's handwritten digits from PyPI.

use crate::deps::{Deps, Part, remove};
use crate::digits;
use crate::fetch::Pin;
use crate::pypi::{self, Release};
use crate::{apt, sha256};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// The names that MNIST gave to such files, and the hashes of Fashion-MNIST's.
const FASHION_MNIST: [(&str, &str); 4] = [
    ("train-images-idx3-ubyte.gz", "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"),
    ("train-labels-idx1-ubyte.gz", "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"),
    ("t10k-images-idx3-ubyte.gz", "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"),
    ("t10k-labels-idx1-ubyte.gz", "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"),
];

const PACKAGE: &str = "dataset-fashion-mnist";

const SCIKIT_LEARN: Release = Release {
    project: "scikit-learn",
    file: "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    pin: Pin { bytes: 9_715_424, sha256: "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d" },
};

/// Fashion-MNIST as a part of the set-up.
pub fn fashion_mnist() -> Part {
    Part {
        name: "Fashion-MNIST",
        stamp: "data/fashion-mnist/.stamp",
        fingerprint: FASHION_MNIST.map(|(_, hash)| hash).join(" "),
        files: &[
            "data/fashion-mnist/train-images-idx3-ubyte.gz",
            "data/fashion-mnist/t10k-labels-idx1-ubyte.gz",
        ],
    }
}

/// The digits as a part of the set-up.
pub fn digits() -> Part {
    Part {
        name: "digits (scikit-learn)",
        stamp: "data/digits/.stamp",
        fingerprint: SCIKIT_LEARN.pin.sha256.into(),
        files: &["data/digits/train-images-idx3-ubyte.gz", "data/digits/t10k-labels-idx1-ubyte.gz"],
    }
}

/// Takes the four files if they are there, else unpacks Debian's package without installing it.
pub fn bring_fashion_mnist(deps: &Deps) -> Result<String> {
    let place = deps.path("data/fashion-mnist");
    if verify(&place).is_ok() {
        return Ok("was there already; its four files have the right hashes".into());
    }
    let tree = apt::unpacked(deps, &[PACKAGE])?;
    let staged = deps.path("staging/fashion-mnist");
    fs::create_dir_all(&staged)?;
    for (name, _) in FASHION_MNIST {
        let unpacked = tree.join("usr/share/datasets/fashion-mnist").join(name);
        fs::copy(&unpacked, staged.join(name)).with_context(|| format!("the package holds no {name}"))?;
    }
    verify(&staged)?;
    deps.place(&staged, "data/fashion-mnist")?;
    Ok(format!("from Debian's package {PACKAGE}"))
}

/// Makes idx files of the digits, for a machine whose reason to do without Fashion-MNIST is told.
pub fn bring_digits(deps: &Deps) -> Result<String> {
    let wheel = SCIKIT_LEARN.download(deps)?;
    let csv = deps.path("staging/digits.csv.gz");
    pypi::unpack_member(&wheel, "sklearn/datasets/data/digits.csv.gz", &csv)?;
    let staged = deps.path("staging/digits");
    fs::create_dir_all(&staged)?;
    digits::convert(&csv, &staged)?;
    deps.place(&staged, "data/digits")?;
    remove(&wheel)?;
    Ok("1797 real 8x8 images from scikit-learn's wheel".into())
}

fn verify(folder: &Path) -> Result<()> {
    for (name, hash) in FASHION_MNIST {
        if sha256::hex(&sha256::of_file(&folder.join(name))?) != hash {
            bail!("{name} is not the file whose hash is pinned");
        }
    }
    Ok(())
}
