//! What is brought works on a machine that has nothing but a minimal system, whatever else this one has.

use crate::cargo::deps_dir;
use crate::deps::Deps;
use crate::libraries::{bind, lacking};
use crate::machine;
use crate::optional::{DEBIAN, DEBOOTSTRAP};
use crate::tools::PATCHELF;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Everything that is brought and runs outside a build, and how it is asked whether it starts. What needs
/// a configuration even for that is started by its tests.
const PROGRAMS: [(&str, &[&[&str]]); 12] = [
    ("bin", &[&["buf", "--version"], &["grpcurl", "--version"], &["hadolint", "--version"]]),
    ("prometheus", &[&["usr/bin/prometheus", "--version"], &["usr/bin/promtool", "--version"]]),
    ("etcd", &[&["usr/bin/etcd", "--version"], &["usr/bin/etcdctl", "version"]]),
    ("ibstat", &[&["usr/sbin/ibstat", "-V"]]),
    ("iproute2", &[&["usr/bin/ip", "-V"]]),
    ("systemd", &[&["usr/bin/systemd-analyze", "--version"], &["usr/bin/systemd-tmpfiles", "--version"]]),
    ("slurm", &[&["usr/sbin/slurmctld-wlm", "-V"], &["usr/sbin/slurmd-wlm", "-V"]]),
    ("buildah", &[&["usr/bin/buildah", "--version"]]),
    ("debootstrap", &[&["usr/bin/wget", "--version"]]),
    ("lib", &[]),
    ("kubernetes-validate", &[]),
    ("protoc", &[&["bin/protoc", "--version"]]),
];

fn skip(what: &str, why: &str) {
    writeln!(std::io::stderr(), "SKIPPED: {what}: {why}").unwrap();
}

fn has_patchelf(what: &str) -> bool {
    let has = PATCHELF.part().is_there(&deps_dir()) && machine::on_path(Path::new("dpkg-query")).is_some();
    if !has {
        skip(what, "it needs Debian's dpkg, and patchelf, which `cargo xtask setup --tools` brings");
    }
    has
}

#[test]
fn each_folder_of_debian_programs_is_looked_at() {
    for debian in DEBIAN.iter().chain([&DEBOOTSTRAP]) {
        assert!(PROGRAMS.iter().any(|(folder, _)| *folder == debian.folder), "{}", debian.folder);
    }
}

#[test]
fn what_is_brought_has_all_its_libraries_with_it() {
    if !has_patchelf("the libraries of what is brought") {
        return;
    }
    for (folder, _) in PROGRAMS {
        let place = deps_dir().join(folder);
        if !place.is_dir() {
            skip(&format!("the libraries of {folder}"), "it is not in .deps");
            continue;
        }
        assert_eq!(lacking(&deps_dir().join("bin/patchelf"), &place).unwrap(), Vec::<String>::new());
    }
}

#[test]
fn what_is_brought_starts_in_an_empty_environment() {
    for (folder, commands) in PROGRAMS {
        for words in commands {
            let program = deps_dir().join(folder).join(words[0]);
            if !program.is_file() {
                skip(&format!("the start of {}", words[0]), "it is not in .deps");
                continue;
            }
            let mut command = Command::new(&program);
            let output = command.args(&words[1..]).env_clear().stdin(Stdio::null()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {said}", program.display());
        }
    }
}

/// Compiles a library that needs another one, and a program that needs the first, into a tree.
fn compile(tree: &Path) {
    for folder in ["usr/bin", "usr/lib/one", "usr/lib/two"] {
        fs::create_dir_all(tree.join(folder)).unwrap();
    }
    fs::write(tree.join("two.c"), "int two(void) { return 2; }").unwrap();
    fs::write(tree.join("one.c"), "int two(void); int one(void) { return two() - 1; }").unwrap();
    fs::write(tree.join("main.c"), "int one(void); int main(void) { return one() - 1; }").unwrap();
    for line in [
        "-shared -fPIC two.c -o usr/lib/two/libtwo.so.2 -Wl,-soname,libtwo.so.2",
        "-shared -fPIC one.c usr/lib/two/libtwo.so.2 -o usr/lib/one/libone.so.1 -Wl,-soname,libone.so.1",
        "main.c usr/lib/one/libone.so.1 -o usr/bin/main -Wl,--allow-shlib-undefined",
    ] {
        assert!(Command::new("cc").args(line.split(' ')).current_dir(tree).status().unwrap().success());
    }
}

#[test]
fn a_program_finds_the_libraries_that_came_with_it_and_one_that_did_not_come_is_named() {
    if !has_patchelf("the libraries of a program") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let deps = Deps::lock(folder.path()).unwrap();
    fs::copy(deps_dir().join("bin/patchelf"), deps.path("bin/patchelf")).unwrap();
    let tree = deps.path("tree");
    compile(&tree);
    let program = tree.join("usr/bin/main");
    let ends_well = |program: &Path| Command::new(program).env_clear().output().unwrap().status.success();
    assert!(!ends_well(&program), "nobody has told it where its libraries are");
    let place = deps.path("place");
    bind(&deps, &tree, &place).unwrap();
    assert!(ends_well(&program));

    fs::rename(&tree, &place).unwrap();
    let copy = deps.path("copy");
    fs::copy(place.join("usr/bin/main"), &copy).unwrap();
    assert!(ends_well(&copy), "a copy of the program finds them by their place");

    let moved = deps.path("moved");
    fs::rename(&place, &moved).unwrap();
    let program = moved.join("usr/bin/main");
    assert!(ends_well(&program), "it finds them wherever the tree is");

    fs::remove_file(moved.join("usr/lib/two/libtwo.so.2")).unwrap();
    let words = bind(&deps, &moved, &place).unwrap_err().to_string();
    assert!(words.ends_with("usr/lib/one/libone.so.1 needs libtwo.so.2"), "{words}");
}
