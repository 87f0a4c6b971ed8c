//! `cargo xtask bare`: runs a command in a root that has only what README asks for, so that what passes
//! there needs nothing that somebody once installed by hand. The root is a minimal Debian below `target`,
//! its package index is absent, and the checkout in it is a clone of HEAD.

use crate::cargo;
use crate::deps::remove;
use crate::optional::DEBOOTSTRAP;
use crate::setup;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What README asks for, beside Rust and what a minimal Debian has. Certificates are for registries.
const PACKAGES: &str = "g++,git,python3,python3-pip,python3-venv,ca-certificates";
/// The user that `--user` makes.
const USER: &str = "dev";
/// Its number, and its group's: any that minimal systems do not use.
const USER_ID: u32 = 1000;
/// Where a root that is whole says what it was made of.
const STAMP: &str = "made-of";
/// Variables that tell programs how this machine reaches its registries, or how tests run; beginnings and
/// ends of names.
const KEPT_BEGINNINGS: [&str; 4] = ["SSL_CERT_", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_"];
const KEPT_ENDS: [&str; 6] = ["_proxy", "_PROXY", "_CA_BUNDLE", "_INDEX_URL", "_TRUSTED_HOST", "_TIMEOUT"];
const KEPT: [&str; 5] = ["CI", "LANG", "TERM", "RUST_BACKTRACE", "PIP_CERT"];
/// Files that do so, as far as they are there.
const SETTINGS: [&str; 4] = ["/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs"];

const SCRIPT: &str = include_str!("bare.sh");

#[derive(Args)]
pub struct Options {
    /// Run as a user who is not root
    #[arg(long)]
    user: bool,
    /// Make the root once more; otherwise it keeps what earlier runs have left there
    #[arg(long)]
    fresh: bool,
    /// Run the command here where no root can be made, and say so
    #[arg(long)]
    or_here: bool,
    /// The command, as for a shell
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// Makes the root if it is not there, and becomes the command in it.
pub fn run(options: &Options) -> Result<()> {
    let words = options.command.join(" ");
    match prepare(options) {
        Ok(root) => enter(&root, options.user, &words),
        Err(error) if options.or_here => {
            eprintln!("SKIPPED: the bare root ({error:#}); running on this machine as it is: {words}");
            cargo::become_command(cargo::command(&["bash", "-c"]).arg(words), &[])
        }
        Err(error) => Err(error).context("no bare root can be made here"),
    }
}

/// Returns the root, whole.
fn prepare(options: &Options) -> Result<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        bail!("only root can change to another root");
    }
    let mut unshare = Command::new("unshare");
    let output = unshare.args(["--mount", "true"]).output().context("failed to start unshare")?;
    if !output.status.success() {
        bail!("this machine lets us mount nothing: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let home = cargo::target_dir().join("bare");
    let root = home.join("root");
    let codename = codename()?;
    let made_of = format!("{codename} {PACKAGES}\n");
    let is_whole = fs::read_to_string(home.join(STAMP)).is_ok_and(|stamp| stamp == made_of);
    if options.fresh || !is_whole {
        make(&home, &root, &codename)?;
        fs::write(home.join(STAMP), made_of)?;
    }
    Ok(root)
}

#[expect(clippy::disallowed_methods, reason = "a duration shown to a person")]
fn make(home: &Path, root: &Path, codename: &str) -> Result<()> {
    let began = std::time::Instant::now();
    let deps = cargo::deps_dir();
    setup::bring_debian(&deps, &DEBOOTSTRAP)?;
    let tree = deps.join(DEBOOTSTRAP.folder);
    fs::create_dir_all(home)?;
    let old = home.join("old");
    remove(&home.join(STAMP))?;
    if root.is_dir() {
        fs::rename(root, &old)?;
    }
    remove(&old)?;
    eprintln!("bare: making a root of {codename} in {}", root.display());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = [tree.join("usr/bin")].into_iter().chain(std::env::split_paths(&path));
    let log = home.join("debootstrap.log");
    let output = fs::File::create(&log).context("failed to create the log of debootstrap")?;
    let (mirror, components) = archive(codename)?;
    let mut debootstrap = Command::new(tree.join("usr/sbin/debootstrap"));
    debootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}")]);
    debootstrap.arg(format!("--components={components}")).arg(codename).arg(root).arg(mirror);
    debootstrap.env("PATH", std::env::join_paths(path)?);
    debootstrap.env("DEBOOTSTRAP_DIR", tree.join("usr/share/debootstrap"));
    debootstrap.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    if let Err(error) = cargo::run(&mut debootstrap) {
        let words = fs::read_to_string(&log).unwrap_or_default();
        bail!("{error:#}: {}; more in {}", words.lines().last().unwrap_or_default(), log.display());
    }
    // A machine whose package index was never updated.
    remove(&root.join("var/lib/apt/lists"))?;
    fs::create_dir_all(root.join("var/lib/apt/lists/partial"))?;
    chroot(root, &["useradd", "--create-home", "--uid", &USER_ID.to_string(), "--user-group", USER])?;
    for home in ["root", &format!("home/{USER}")] {
        // The bundle is root's.
        fs::write(root.join(home).join(".gitconfig"), "[safe]\n\tdirectory = *\n")?;
    }
    eprintln!("bare: the root is made ({:.0} s)", began.elapsed().as_secs_f64());
    Ok(())
}

/// Becomes the command in the root.
fn enter(root: &Path, user: bool, words: &str) -> Result<()> {
    settings(root)?;
    let bundle = root.join("checkout.bundle");
    let mut git = cargo::command(&["git", "bundle", "create", "--quiet"]);
    cargo::run(git.arg(&bundle).arg("HEAD")).context("failed to bundle the checkout")?;
    let changed = cargo::command(&["git", "status", "--porcelain"]).output()?.stdout;
    if !changed.is_empty() {
        eprintln!("bare: changes that are not committed are not in the root");
    }
    let owner = format!("--userspec={USER_ID}:{USER_ID} --groups={USER_ID}");
    let (owner, home) = if user { (owner, format!("/home/{USER}")) } else { (String::new(), "/root".into()) };
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private", "bash", "-c", SCRIPT, "bare"]).args(kept());
    unshare.env("ROOT", root).env("RUST", toolchain()?).env("CMD", words);
    unshare.env("CHANGE_USER", owner).env("HOME_INSIDE", home);
    eprintln!("bare: {words}");
    cargo::become_command(&mut unshare, &[])
}

/// Copies how this machine reaches its registries.
fn settings(root: &Path) -> Result<()> {
    for path in SETTINGS.iter().map(Path::new).filter(|path| path.exists()) {
        let place = root.join(path.strip_prefix("/")?);
        remove(&place)?;
        // A link that leads nowhere is no use to anybody, here or there.
        if let Err(error) = copy(path, &place) {
            eprintln!("bare: not all of {} was copied: {error:#}", path.display());
        }
    }
    let proxies = Command::new("apt-config").args(["dump", "Acquire"]).output().context("no apt-config")?;
    let lines = String::from_utf8_lossy(&proxies.stdout);
    let lines = lines.lines().filter(|line| line.contains("::Proxy") || line.contains("::CaInfo"));
    fs::write(root.join("etc/apt/apt.conf.d/90host"), lines.collect::<Vec<_>>().join("\n") + "\n")?;
    let homes = [PathBuf::from("root"), Path::new("home").join(USER)];
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let config = cargo_home.map(|home| home.join("config.toml")).filter(|config| config.is_file());
    if let Some(config) = config {
        for home in homes {
            copy(&config, &root.join(home).join(".cargo/config.toml"))?;
        }
    }
    Ok(())
}

/// Copies a file or a folder, following its links: what they lead to is not in the root.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a path without a folder")?)?;
    cargo::run(Command::new("cp").args(["-rL", "--"]).args([from, to]))
}

fn kept() -> Vec<OsString> {
    let is_kept = |name: &str| {
        KEPT.contains(&name)
            || KEPT_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
            || KEPT_ENDS.iter().any(|end| name.ends_with(end))
    };
    let pair = |(name, value): (OsString, OsString)| {
        let pair = is_kept(name.to_str()?).then_some([name, value]);
        pair.map(|pair| pair.join(&OsString::from("=")))
    };
    std::env::vars_os().filter_map(pair).collect()
}

/// Returns the folder of the Rust that this runs with.
fn toolchain() -> Result<PathBuf> {
    let output =
        cargo::command(&["rustc", "--print", "sysroot"]).output().context("failed to start rustc")?;
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if folder == Path::new("/usr") {
        bail!("this machine's Rust is part of its system; a bare root needs one of rustup's");
    }
    Ok(folder)
}

fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("this machine does not say what it is")?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("this system has no code name")?.trim_matches('"').to_owned())
}

/// Returns the archive from which this machine gets its packages, and the parts of it.
fn archive(codename: &str) -> Result<(String, String)> {
    let format = "$(CODENAME) $(REPO_URI) $(COMPONENT)";
    let mut apt = Command::new("apt-get");
    apt.args(["indextargets", "--format", format, "Created-By: Packages"]);
    let output = apt.output().context("failed to start apt-get")?;
    let found = archive_of(codename, &String::from_utf8_lossy(&output.stdout));
    found.with_context(|| format!("apt's sources name no archive of {codename}"))
}

/// Reads lines of a code name, an archive and a part of it; the first archive that has `main` counts.
fn archive_of(codename: &str, listed: &str) -> Option<(String, String)> {
    let fields = listed.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let ours: Vec<(&str, &str)> = fields
        .filter_map(|fields| match fields[..] {
            [name, archive, component] if name == codename => Some((archive, component)),
            _ => None,
        })
        .collect();
    let mirror = ours.iter().find(|(_, component)| *component == "main")?.0;
    let parts: Vec<&str> =
        ours.iter().filter(|(archive, _)| *archive == mirror).map(|(_, component)| *component).collect();
    Some((mirror.to_owned(), parts.join(",")))
}

fn chroot(root: &Path, words: &[&str]) -> Result<()> {
    cargo::run(Command::new("chroot").arg(root).args(words).stdin(Stdio::null()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_of_this_system_is_taken_with_all_its_parts() {
        let listed = "noble-security http://b/ main\n\
                      noble http://a/ universe\n\
                      noble http://a/ main\n\
                      noble http://c/ main\n";
        let found = archive_of("noble", listed);
        assert_eq!(found, Some(("http://a/".to_owned(), "universe,main".to_owned())));
        assert_eq!(archive_of("bookworm", listed), None);
    }
}
