//! Images, built by buildah in a store of the test's own, and run as a container runtime runs them: a root of their own, their own
//! user, and as the first of their processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::eventually;
use crate::netns::Netns;
use crate::tools::Outcome;

/// What the RUN lines of our Dockerfile call, and what jobs of the tests do.
const PROGRAMS: [&str; 6] = ["sh", "groupadd", "useradd", "install", "cat", "sleep"];

/// A buildah, and what it has built. Dropped, all of it is removed.
pub struct Buildah {
    dir: tempfile::TempDir,
    program: PathBuf,
}

impl Buildah {
    /// The one that `cargo xtask setup --tools` brings, or why there is none.
    pub fn new() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("only root may change the root of a process".to_owned());
        }
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/buildah");
        let tree = tree.canonicalize().map_err(|_| "`cargo xtask setup --tools` has brought no buildah")?;
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("home/.config/containers");
        std::fs::create_dir_all(&config).unwrap();
        // Nothing is fetched, and so nothing is signed.
        std::fs::write(config.join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)
            .unwrap();
        let place = dir.path().display();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\nrunroot = \"{place}/run\"\ngraphroot = \"{place}/graph\"\n"
        );
        std::fs::write(dir.path().join("storage.conf"), storage).unwrap();
        let buildah = Self { dir, program: tree.join("usr/bin/buildah") };
        let tried = buildah.run(&["--version"]);
        if tried.code == 0 { Ok(buildah) } else { Err(format!("buildah does not start: {}", tried.stderr)) }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("HOME", self.dir.path().join("home"))
            .env("CONTAINERS_STORAGE_CONF", self.dir.path().join("storage.conf"))
            .env("BUILDAH_ISOLATION", "chroot")
            .env_remove("XDG_CONFIG_HOME")
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command().args(args))
    }

    /// Builds a target of our Dockerfile, in which `stage` has been carried out already and has left `muster` as /out/muster.
    pub fn build(&self, target: &str, stage: &str, muster: &Path, args: &[&str]) -> String {
        let context = self.dir.path().join(stage);
        std::fs::create_dir_all(context.join("out/data")).unwrap();
        std::fs::copy(muster, context.join("out/muster")).unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let tag = format!("localhost/{target}");
        let context = format!("{stage}={}", context.display());
        let build =
            ["build", "--layers=false", "--pull=never", "--format=docker", "--file=deploy/docker/Dockerfile"];
        let mut command = self.command();
        command.current_dir(root).args(build).args(["--target", target, "--tag", &tag]);
        Outcome::of(command.args(["--build-context", &context]).args(args).arg(".")).ok();
        tag
    }

    /// An image out of this machine's own programs and their libraries, in the place of one with Python, torch and CUDA.
    pub fn base(&self) -> String {
        let tree = self.dir.path().join("base");
        for folder in ["etc", "home", "proc", "dev", "tmp"] {
            std::fs::create_dir_all(tree.join(folder)).unwrap();
        }
        for folder in ["bin", "sbin", "lib", "lib64"] {
            std::fs::create_dir_all(tree.join("usr").join(folder)).unwrap();
            std::os::unix::fs::symlink(Path::new("usr").join(folder), tree.join(folder)).unwrap();
        }
        std::fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        std::fs::write(tree.join("etc/group"), "root:x:0:\n").unwrap();
        let script = "for program in \"$@\"; do path=$(command -v $program); echo $path; ldd $path; done";
        let programs = PROGRAMS.map(str::to_owned);
        let muster = crate::tools::binary("muster").display().to_string();
        let listed =
            Outcome::of(Command::new("sh").args(["-c", script, "sh"]).args(programs).arg(&muster)).ok();
        let paths = listed.split_whitespace().filter(|word| word.starts_with('/') && **word != muster);
        for path in paths {
            let place = tree.join(&path[1..]);
            std::fs::create_dir_all(place.parent().unwrap()).unwrap();
            std::fs::copy(path, place).unwrap();
        }
        let container = self.run(&["from", "scratch"]).ok();
        self.run(&["copy", container.trim(), &tree.display().to_string(), "/"]).ok();
        self.run(&["commit", container.trim(), "localhost/base"]).ok();
        "localhost/base".to_owned()
    }

    /// Bytes of an image's files.
    pub fn bytes(&self, image: &str) -> u64 {
        let listed = Outcome::of(Command::new("du").arg("-sb").arg(self.mount(image))).ok();
        listed.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// What an image says of how it is run.
    pub fn config(&self, image: &str) -> Value {
        self.run(&["inspect", "--type", "image", image]).json()[0]["Docker"]["config"].clone()
    }

    fn mount(&self, image: &str) -> PathBuf {
        let container = self.run(&["from", "--pull-never", image]).ok();
        PathBuf::from(self.run(&["mount", container.trim()]).ok().trim())
    }

    /// Starts a container, with these arguments after those of the image, on a host of a simulated network or on this machine's own.
    pub fn start(&self, image: &str, args: &[&str], host: Option<(&Netns, usize)>) -> Container {
        let (config, root) = (self.config(image), self.mount(image));
        let words = |name: &str| -> Vec<String> {
            let all = config[name].as_array().cloned().unwrap_or_default();
            all.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
        };
        let log = self.dir.path().join(format!("{}.log", image.replace('/', "-")));
        // What a runtime mounts, seen by this container alone.
        let script = "root=$0; user=$1; shift; mkdir -p $root/proc $root/dev; mount -t proc proc $root/proc; \
                      mount --rbind /dev $root/dev; exec chroot --userspec $user --groups= $root \"$@\"";
        let user = config["User"].as_str().unwrap().to_owned();
        let pairs = words("Env").into_iter();
        let mut environment: BTreeMap<String, String> = pairs
            .filter_map(|pair| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())))
            .collect();
        // The image's own, and then what the script calls.
        let own = environment.remove("PATH").into_iter().chain(std::env::var("PATH"));
        environment.insert("PATH".to_owned(), own.collect::<Vec<_>>().join(":"));
        let mut prefix = host.map_or_else(Vec::new, |(netns, host)| netns.prefix(host));
        prefix.push("env".to_owned());
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script])
            .arg(&root)
            .arg(&user);
        command.args(words("Entrypoint")).args(words("Cmd")).args(args).env_clear().envs(&environment);
        let file = std::fs::File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let outer = command.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let first = eventually("the container's first process", || {
            let listed = std::fs::read_to_string(&children).unwrap_or_default();
            let pid: i32 = listed.trim().parse().map_err(|_| listed)?;
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.trim() == "muster" {
                Ok(pid)
            } else {
                Err(name + &std::fs::read_to_string(&log).unwrap())
            }
        });
        Container { outer, first, root, user, environment, prefix, log }
    }
}

/// A container that runs. Dropped, all of its processes are killed.
pub struct Container {
    outer: Child,
    /// Its process 1, as it is numbered outside.
    pub first: i32,
    root: PathBuf,
    user: String,
    environment: BTreeMap<String, String>,
    prefix: Vec<String>,
    log: PathBuf,
}

impl Container {
    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Runs a program of the image beside it, as `docker exec` and probes do.
    pub fn exec(&self, words: &[&str]) -> Outcome {
        let mut command = Command::new(&self.prefix[0]);
        command.args(&self.prefix[1..]).arg("chroot");
        command.args(["--userspec", &self.user, "--groups="]).arg(&self.root).args(words);
        Outcome::of(command.env_clear().envs(&self.environment))
    }

    /// Stops it as runtimes do, and gives its exit code.
    pub fn stop(mut self) -> Option<i32> {
        let first = nix::unistd::Pid::from_raw(self.first);
        nix::sys::signal::kill(first, nix::sys::signal::Signal::SIGTERM).unwrap();
        eventually("the container's end", || {
            let ended = self.outer.try_wait().unwrap();
            ended.map(|status| status.code()).ok_or_else(|| self.log())
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // The kernel kills the rest of a namespace with its first process.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.first), nix::sys::signal::Signal::SIGKILL)
            .ok();
        self.outer.kill().ok();
        self.outer.wait().ok();
    }
}
