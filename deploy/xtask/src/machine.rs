//! What the machine itself must have before anything is downloaded: each lack is told in one sentence
//! with the command that mends it. Rust's version is cargo's to check: it has built this program.

use crate::deps::Deps;
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The glibc that torch's wheel is built for.
const GLIBC_MIN: (u32, u32) = (2, 28);
/// libtorch's wheels and what is unpacked of them, the build's own files, and some air.
const FREE_BYTES_MIN: u64 = 5_000_000_000;
/// What the stamp of a checked machine lies in.
const STAMP: &str = ".machine";

const PROGRAM: &str = "#include <optional>\n#include <string_view>\n\
    int main() { std::optional<std::string_view> word{\"c++17\"}; return word->size() == 5 ? 0 : 1; }\n";

/// The tools that were checked, so that the next run need not compile again. None: one of them is absent.
pub fn fingerprint() -> Option<String> {
    let [cxx, python] = [cxx(), "python3".into()].map(|tool| on_path(&tool));
    Some(format!("{} {}", cxx?.display(), python?.display()))
}

/// Whether this machine has passed before, with the same tools.
pub fn is_checked(deps: &Path) -> bool {
    let stamp = std::fs::read_to_string(deps.join(STAMP));
    fingerprint().is_some_and(|now| stamp.is_ok_and(|then| then == now))
}

/// Checks it all, and remembers that it passed.
pub fn check(deps: &Deps) -> Result<()> {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    if (os, arch) != ("linux", "x86_64") {
        bail!("this is {os} on {arch}, but the pinned libtorch is for Linux on x86_64 only");
    }
    glibc()?;
    compiler(deps)?;
    python()?;
    std::fs::write(deps.path(STAMP), fingerprint().context("the tools vanished")?)?;
    Ok(())
}

/// Checks for what the tests call and a build does not.
pub fn git() -> Result<()> {
    if on_path(Path::new("git")).is_none() {
        bail!("git is missing, with which the tests look at the checkout: {}", mend("git", "git", "git"));
    }
    Ok(())
}

/// Checks that the disk of `deps` has room for libtorch and a build.
pub fn disk(deps: &Deps) -> Result<()> {
    let disk = nix::sys::statvfs::statvfs(&deps.dir).context("failed to ask for the free disk space")?;
    let free = disk.blocks_available() * disk.fragment_size();
    if free < FREE_BYTES_MIN {
        let (free, need) = (free as f64 / 1e9, FREE_BYTES_MIN / 1_000_000_000);
        bail!("{} has {free:.1} GB free, but {need} GB are needed: make room there", deps.dir.display());
    }
    Ok(())
}

fn glibc() -> Result<()> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().context("failed to run getconf")?;
    let words = String::from_utf8_lossy(&output.stdout);
    let Some(version) = parse_glibc(&words) else {
        bail!("this system's C library is not glibc, but the pinned libtorch needs glibc 2.28 or newer");
    };
    if version < GLIBC_MIN {
        bail!(
            "glibc is {}.{}, but the pinned libtorch needs 2.28 or newer: update the system",
            version.0,
            version.1
        );
    }
    Ok(())
}

fn parse_glibc(words: &str) -> Option<(u32, u32)> {
    let (major, minor) = words.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
}

fn compiler(deps: &Deps) -> Result<()> {
    let mend = mend("g++", "gcc-c++", "gcc");
    let cxx = cxx();
    let source = deps.path("staging/check.cc");
    std::fs::write(&source, PROGRAM)?;
    let compiled = Command::new(&cxx)
        .args(["-std=c++17", "-o"])
        .args([&deps.path("staging/check"), &source])
        .stderr(Stdio::inherit())
        .status();
    match compiled {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => bail!("{} cannot compile a small C++17 program: {mend}", cxx.display()),
        Err(_) => bail!("a C++ compiler is missing (looked for {}): {mend}", cxx.display()),
    }
}

fn python() -> Result<()> {
    let supported = "import sys; sys.exit(sys.version_info < (3, 8))";
    let ended = |args: &[&str]| Command::new("python3").args(args).stdin(Stdio::null()).output();
    match ended(&["-c", supported]) {
        Err(_) => bail!("python3 is missing: {}", mend("python3 python3-pip", "python3-pip", "python-pip")),
        Ok(output) if !output.status.success() => bail!("python3 is older than 3.8: install a newer one"),
        Ok(_) => {}
    }
    if !ended(&["-m", "pip", "--version"])?.status.success() {
        bail!("pip is missing: {}", mend("python3-pip", "python3-pip", "python-pip"));
    }
    Ok(())
}

/// The compiler that the `cc` crate takes when it builds torch-sys.
fn cxx() -> PathBuf {
    std::env::var_os("CXX").unwrap_or_else(|| OsString::from("c++")).into()
}

/// Where a program is found, as a shell would find it.
pub fn on_path(tool: &Path) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(tool)).find(|path| path.is_file())
}

/// The command that installs a package, under the name it has where this system gets its packages.
fn mend(debian: &str, fedora: &str, arch: &str) -> String {
    let has = |tool: &str| on_path(Path::new(tool)).is_some();
    if has("apt-get") {
        format!("run `sudo apt-get install {debian}`")
    } else if has("dnf") {
        format!("run `sudo dnf install {fedora}`")
    } else if has("pacman") {
        format!("run `sudo pacman -S {arch}`")
    } else {
        format!("install it (Debian calls it {debian})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_glibc() {
        assert_eq!(parse_glibc("glibc 2.36\n"), Some((2, 36)));
        assert_eq!(parse_glibc("glibc 2.28.9000\n"), Some((2, 28)));
        assert_eq!(parse_glibc("undefined\n"), None);
        assert!((2, 36) >= GLIBC_MIN && (2, 17) < GLIBC_MIN);
    }
}
