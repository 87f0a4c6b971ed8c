//! What some tests need and not every machine can get: without it they are skipped, and say so. Most of it
//! are programs out of Debian's packages; apt checks what it downloads.

use crate::deps::{Deps, Part};
use crate::{apt, containers};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// How a part is brought; returns where it came from, in words.
pub type Bring = Box<dyn Fn(&Deps) -> Result<String>>;

/// A part that is not there on every machine.
pub struct Optional {
    /// What it is.
    pub part: Part,
    /// How it is brought.
    pub bring: Bring,
    /// The tests that are skipped without it.
    pub serves: &'static str,
}

/// Returns all of that kind, for this folder.
pub fn all(deps: &Path) -> Vec<Optional> {
    let debian = DEBIAN.iter().chain([&DEBOOTSTRAP]);
    let mut all: Vec<Optional> = debian.map(|programs| programs.optional(deps)).collect();
    all.extend(containers::optional());
    all.push(faketime());
    all.push(torch_tests());
    all
}

/// Programs of Debian, as they lie in a folder of `.deps` that stands for the root of the system.
pub struct Debian {
    name: &'static str,
    /// The folder.
    pub folder: &'static str,
    stamp: &'static str,
    packages: &'static [&'static str],
    files: &'static [&'static str],
    serves: &'static str,
}

/// Those that tests call.
pub const DEBIAN: [Debian; 7] = [
    Debian {
        name: "Prometheus",
        folder: "prometheus",
        stamp: "prometheus/.stamp",
        packages: &["prometheus"],
        files: &["prometheus/usr/bin/prometheus", "prometheus/usr/bin/promtool"],
        serves: "tests of metrics and alerts",
    },
    Debian {
        name: "etcd",
        folder: "etcd",
        stamp: "etcd/.stamp",
        packages: &["etcd-client", "etcd-server"],
        files: &["etcd/usr/bin/etcd", "etcd/usr/bin/etcdctl"],
        serves: "tests with several coordinators",
    },
    Debian {
        name: "ibstat",
        folder: "ibstat",
        stamp: "ibstat/.stamp",
        packages: &["infiniband-diags"],
        files: &["ibstat/usr/sbin/ibstat"],
        serves: "tests beside ibstat",
    },
    Debian {
        name: "iproute2",
        folder: "iproute2",
        stamp: "iproute2/.stamp",
        // One of its plug-ins needs a library that the package only recommends.
        packages: &["iproute2", "libatm1"],
        files: &["iproute2/usr/bin/ip"],
        serves: "tests with hosts in network namespaces",
    },
    Debian {
        name: "systemd's tools",
        folder: "systemd",
        stamp: "systemd/.stamp",
        packages: &["systemd"],
        files: &["systemd/usr/bin/systemd-analyze", "systemd/usr/bin/systemd-sysusers"],
        serves: "tests of the systemd units",
    },
    Debian {
        name: "Slurm",
        folder: "slurm",
        stamp: "slurm/.stamp",
        packages: &["slurm-client", "slurm-wlm-basic-plugins", "slurmctld", "slurmd"],
        files: &["slurm/usr/sbin/slurmctld-wlm", "slurm/usr/sbin/slurmd-wlm", "slurm/usr/bin/srun"],
        serves: "tests under Slurm",
    },
    Debian {
        name: "buildah",
        folder: "buildah",
        stamp: "buildah/.stamp",
        packages: &["buildah"],
        files: &["buildah/usr/bin/buildah"],
        serves: "tests of the container images",
    },
];

/// What makes a bare root, for `cargo xtask bare`.
pub const DEBOOTSTRAP: Debian = Debian {
    name: "debootstrap",
    folder: "debootstrap",
    stamp: "debootstrap/.stamp",
    packages: &["debootstrap"],
    files: &["debootstrap/usr/sbin/debootstrap", "debootstrap/usr/bin/wget"],
    serves: "runs in a bare root",
};

impl Debian {
    /// Returns the part of the set-up that this is. Its programs know where they lie, so a folder that was
    /// moved has them brought once more.
    pub fn optional(&self, deps: &Path) -> Optional {
        let Self { name, folder, stamp, packages, files, serves } = *self;
        let fingerprint = format!("{} with all that they need, for {}", packages.join(" "), deps.display());
        let bring = move |deps: &Deps| {
            apt::programs(deps, packages, folder)?;
            Ok("from Debian's packages".to_owned())
        };
        Optional { part: Part { name, stamp, fingerprint, files }, bring: Box::new(bring), serves }
    }
}

/// The library that sets a process's clock. It needs nothing but the C library.
fn faketime() -> Optional {
    let part = Part {
        name: "libfaketime",
        stamp: "lib/.libfaketime",
        fingerprint: "libfaketime as Debian packages it".into(),
        files: &["lib/libfaketimeMT.so.1"],
    };
    Optional { part, bring: Box::new(bring_faketime), serves: "tests that set clocks" }
}

fn bring_faketime(deps: &Deps) -> Result<String> {
    let tree = apt::unpacked(deps, &["libfaketime"])?;
    let library = "faketime/libfaketimeMT.so.1";
    let folders = fs::read_dir(tree.join("usr/lib"))?.collect::<std::io::Result<Vec<_>>>()?;
    let found = folders.iter().map(|folder| folder.path().join(library)).find(|path| path.is_file());
    fs::create_dir_all(deps.path("lib"))?;
    deps.place(&found.context("the package holds no library")?, "lib/libfaketimeMT.so.1")?;
    Ok("from Debian's package libfaketime".into())
}

/// torch's own tests of its launcher and its agents, which are in no package that can be installed.
fn torch_tests() -> Optional {
    let part = Part {
        name: "torch's tests",
        stamp: "torch-tests/.stamp",
        fingerprint: format!("launcher and agents, from Debian {TORCH_TESTS_RELEASE}"),
        files: &["torch-tests/test/distributed/launcher/test_run.py"],
    };
    let serves = "torch's own tests of its launcher and its agents";
    Optional { part, bring: Box::new(bring_torch_tests), serves }
}

/// The release whose torch is nearest to the one of `python.rs`.
const TORCH_TESTS_RELEASE: &str = "trixie";

fn bring_torch_tests(deps: &Deps) -> Result<String> {
    let folders = ["test/distributed/launcher", "test/distributed/elastic/agent"];
    let tree = apt::source(deps, TORCH_TESTS_RELEASE, "pytorch", &folders)?;
    deps.place(&tree, "torch-tests")?;
    Ok("from Debian's source package pytorch".into())
}
