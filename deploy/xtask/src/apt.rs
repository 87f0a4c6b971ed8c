//! Packages of Debian's archive, unpacked without being installed. It needs no root, and neither a
//! package index of this machine nor one that is up to date.

use crate::deps::{Deps, remove};
use crate::{libraries, machine, minimal};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Brings packages and unpacks them, without what they need; returns the folder that stands for the
/// root of the system.
pub fn unpacked(deps: &Deps, packages: &[&str]) -> Result<PathBuf> {
    let packages: Vec<String> = packages.iter().map(|name| (*name).to_owned()).collect();
    Apt::new(deps)?.with_index(|apt| apt.unpack(&packages))
}

/// Brings programs: their packages with all that these need beyond a minimal system, each program and
/// library bound to the libraries that came with it. They lie in `folder` then.
pub fn programs(deps: &Deps, packages: &[&str], folder: &str) -> Result<()> {
    let tree = Apt::new(deps)?.with_index(|apt| apt.unpack(&apt.closure(packages)?))?;
    libraries::bind(deps, &tree, &deps.path(folder))?;
    deps.place(&tree, folder)
}

/// Brings what a source package of another release has below some of its folders, as its authors
/// wrote it; returns the folder that stands for the root of the source.
pub fn source(deps: &Deps, release: &str, package: &str, below: &[&str]) -> Result<PathBuf> {
    let mut apt = Apt::new(deps)?;
    apt.index = deps.path("staging/apt-source-index");
    apt.sources = Some(apt.index.join("sources.d"));
    fs::create_dir_all(apt.index.join("lists/partial"))?;
    fs::create_dir_all(apt.index.join("cache/archives/partial"))?;
    let folder = apt.index.join("sources.d");
    fs::create_dir_all(&folder)?;
    let archive = Apt::archive()?;
    let words = format!(
        "Types: deb-src\nURIs: {archive}\nSuites: {release}\nComponents: main\nSigned-By: {KEYRING}\n"
    );
    fs::write(folder.join("source.sources"), words)?;
    apt.run(&["update"]).context("apt-get could not fetch the index of sources")?;
    apt.run(&["source", "--download-only", package])
        .with_context(|| format!("apt-get has no source of {package}"))?;
    let entries = fs::read_dir(&apt.work)?.collect::<std::io::Result<Vec<_>>>()?;
    let is_original = |path: &PathBuf| path.to_string_lossy().contains(".orig.tar.");
    let original = entries.iter().map(fs::DirEntry::path).find(is_original);
    let original = original.context("the source package holds no original")?;
    let tree = apt.work.join("tree");
    fs::create_dir_all(&tree)?;
    let mut unpack = Command::new("tar");
    unpack.arg("-xf").arg(&original).arg("-C").arg(&tree).args(["--strip-components=1", "--wildcards"]);
    quiet(unpack.args(below.iter().map(|folder| format!("*/{folder}/*"))))?;
    Ok(tree)
}

/// The keys of Debian's archive, where Debian has them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt-get, which downloads to a folder of its own.
struct Apt {
    work: PathBuf,
    /// The package index that this set-up has fetched, where the machine's own will not do.
    index: PathBuf,
    /// Where it finds what to fetch, if not where the machine's own does.
    sources: Option<PathBuf>,
}

impl Apt {
    fn new(deps: &Deps) -> Result<Self> {
        if machine::on_path(Path::new("apt-get")).is_none() {
            bail!("there is no apt-get here");
        }
        let (work, index) = (deps.path("staging/apt"), deps.path("staging/apt-index"));
        let apt = Self { work, index, sources: None };
        apt.clear()?;
        Ok(apt)
    }

    /// Empties the folder: what earlier packages have left there is not to be taken for these.
    fn clear(&self) -> Result<()> {
        remove(&self.work)?;
        fs::create_dir_all(&self.work).context("failed to create a folder for packages")
    }

    /// Tries with the machine's package index, and with one fetched for this set-up where that is absent
    /// or too old.
    fn with_index<T>(&self, act: impl Fn(&Self) -> Result<T>) -> Result<T> {
        if !self.index.is_dir() {
            if let Ok(done) = act(self) {
                return Ok(done);
            }
            self.clear()?;
            fs::create_dir_all(self.index.join("lists/partial"))?;
            fs::create_dir_all(self.index.join("cache/archives/partial"))?;
            self.run(&["update"]).context("apt-get could not fetch its package index")?;
        }
        act(self)
    }

    /// Returns the packages and all that they need, less what a minimal system has: by apt's own
    /// resolver, as if nothing were installed.
    fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let nothing = self.work.join("nothing-is-installed");
        fs::write(&nothing, "")?;
        let status = format!("Dir::State::status={}", nothing.display());
        let simulate = ["-o", &status, "--simulate", "--no-install-recommends", "install"];
        let listed = self.run(&[&simulate, packages].concat())?;
        let minimal = minimal::packages()?;
        let names = listed.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
        Ok(names.filter(|name| !minimal.contains(*name)).map(str::to_owned).collect())
    }

    fn unpack(&self, packages: &[String]) -> Result<PathBuf> {
        let names: Vec<&str> = packages.iter().map(String::as_str).collect();
        self.run(&[&["download"], &names[..]].concat())
            .with_context(|| format!("apt-get has no {}", packages.join(", ")))?;
        let entries = fs::read_dir(&self.work)?.collect::<std::io::Result<Vec<_>>>()?;
        let paths = entries.iter().map(fs::DirEntry::path);
        let archives: Vec<_> =
            paths.filter(|path| path.extension().is_some_and(|ext| ext == "deb")).collect();
        if archives.len() != packages.len() {
            bail!("apt-get downloaded {} of {} packages", archives.len(), packages.len());
        }
        let tree = self.work.join("tree");
        for archive in archives {
            let mut unpack = Command::new("dpkg");
            quiet(unpack.arg("-x").arg(&archive).arg(&tree))
                .with_context(|| format!("failed to unpack {}", archive.display()))?;
        }
        merge_usr(&tree)?;
        Ok(tree)
    }

    /// Returns where the machine's own packages come from: the archive that it is nearest to.
    fn archive() -> Result<String> {
        let format = ["indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(SUITE) $(REPO_URI)"];
        let mut targets = Command::new("apt-get");
        let listed = quiet(targets.args(format))?;
        let is_main = |words: &[&str]| words.len() == 4 && words[..2] == ["Debian", "main"];
        let plain = |suite: &str| !suite.contains('-');
        let mut lines = listed.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let found = lines.find(|words| is_main(words) && plain(words[2]));
        Ok(found.context("this machine's packages are not Debian's")?[3].to_owned())
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let mut apt = Command::new("apt-get");
        apt.current_dir(&self.work).env("LC_ALL", "C").args(["-qq", "-o", "APT::Sandbox::User="]);
        if self.index.is_dir() {
            apt.arg("-o").arg(format!("Dir::State::lists={}/", self.index.join("lists").display()));
            apt.arg("-o").arg(format!("Dir::Cache={}/", self.index.join("cache").display()));
        }
        if let Some(sources) = &self.sources {
            apt.args(["-o", "Dir::Etc::SourceList=/dev/null"]);
            apt.arg("-o").arg(format!("Dir::Etc::SourceParts={}", sources.display()));
        }
        quiet(apt.args(args))
    }
}

/// Moves what lies in /bin, /sbin and /lib below /usr, where newer packages have it.
fn merge_usr(tree: &Path) -> Result<()> {
    for folder in ["bin", "sbin", "lib", "lib64"] {
        let old = tree.join(folder);
        if old.is_dir() {
            let place = tree.join("usr").join(folder);
            fs::create_dir_all(&place)?;
            // Links are as good as copies: nothing of the old folder is left.
            quiet(Command::new("cp").args(["-a", "--link", "--"]).args([&old.join("."), &place]))
                .with_context(|| format!("failed to move {}", old.display()))?;
            remove(&old)?;
        }
    }
    Ok(())
}

/// Runs a command whose words matter only if it fails; returns its output.
fn quiet(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to start {name}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{}", words.lines().last().unwrap_or("it failed without a word").trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
