//! Checkpoints as a training program uses them, on a real file system.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use muster_checkpoint::{Checkpoints, Owner, Part, latest};

fn owner(job: &str, generation: u64) -> Owner {
    Owner { job: job.to_owned(), generation }
}

fn part(name: &str, data: &[u8]) -> Part {
    Part { name: name.to_owned(), kind: "bytes".to_owned(), shape: vec![], data: data.to_vec() }
}

fn steps(dir: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_found_and_the_last_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("made/for/it");
    assert_eq!(latest(&dir).unwrap().checkpoint, None, "nothing is there yet");
    let checkpoints = Checkpoints::open(&dir, owner("a", 1), 2).unwrap();
    let parts = [part("conv.weight", &[1, 2, 3]), part("../odd name\n", &[]), part("position", b"{}")];
    for step in [9, 10, 1000] {
        checkpoints.save(step, 8, &parts).unwrap();
    }
    assert_eq!(steps(&dir), ["step-00000010", "step-00001000"]);
    let found = latest(&dir).unwrap();
    let checkpoint = found.checkpoint.unwrap();
    assert_eq!((checkpoint.step, checkpoint.world_size, checkpoint.generation), (1000, 8, 1));
    assert_eq!((&checkpoint.parts[..], &found.skipped[..]), (&parts[..], &[][..]));
    let twice = checkpoints.save(1001, 8, &[part("x", &[]), part("x", &[])]).unwrap_err();
    assert_eq!(twice.to_string(), "the checkpoint has two parts named \"x\"");
}

#[test]
fn an_earlier_generation_is_refused_and_a_later_one_or_another_job_is_not() {
    // Who holds it, who comes, whether it may.
    let table = [
        (("a", 1), ("a", 2), true),
        (("a", 2), ("a", 1), false),
        (("a", 2), ("a", 2), true),
        (("a", 7), ("b", 1), true),
        (("", 0), ("", 0), true),
    ];
    for ((job, generation), (next_job, next_generation), may) in table {
        let dir = tempfile::tempdir().unwrap();
        let first = Checkpoints::open(dir.path(), owner(job, generation), 3).unwrap();
        first.save(1, 1, &[part("x", b"first")]).unwrap();
        let second = Checkpoints::open(dir.path(), owner(next_job, next_generation), 3);
        let refusal = match second {
            Ok(second) => {
                // Its steps count from here on, whatever their numbers.
                second.save(1, 1, &[part("x", b"second")]).unwrap();
                first.save(2, 1, &[part("x", b"zombie")]).unwrap_err()
            }
            Err(refusal) => {
                first.save(2, 1, &[part("x", b"second")]).unwrap();
                refusal
            }
        };
        assert!(refusal.is_superseded(), "{refusal}");
        assert!(refusal.to_string().contains("has taken it over"), "{refusal}");
        let newest = latest(dir.path()).unwrap().checkpoint.unwrap();
        assert_eq!(newest.part("x").unwrap().data, b"second");
        assert_eq!(newest.generation, if may { next_generation } else { generation });
    }
}

type Damage<'a> = &'a dyn Fn(&Path);

#[test]
fn half_and_damaged_ones_are_passed_over_with_the_reason() {
    let cut = |path: &Path, by: u64| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - by).unwrap();
    };
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let table: [(Damage<'_>, &str); 7] = [
        (&|dir| std::fs::remove_file(dir.join("manifest")).unwrap(), "it has no manifest"),
        (&|dir| std::fs::write(dir.join("manifest"), "").unwrap(), "its manifest is cut short"),
        (&|dir| cut(&dir.join("manifest"), 3), "its manifest is damaged or cut short"),
        (&|dir| flip(&dir.join("manifest")), "its manifest is damaged or cut short"),
        (&|dir| cut(&dir.join("data"), 1), "its data end before x"),
        (&|dir| flip(&dir.join("data")), "x is damaged"),
        (&|dir| std::fs::remove_file(dir.join("data")).unwrap(), "its data cannot be read"),
    ];
    for (damage, expected) in table {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path(), owner("a", 1), 9).unwrap();
        checkpoints.save(1, 1, &[part("x", &[7; 100])]).unwrap();
        checkpoints.save(2, 1, &[part("x", &[8; 100])]).unwrap();
        damage(&dir.path().join("step-00000002"));
        let found = latest(dir.path()).unwrap();
        assert_eq!(found.checkpoint.unwrap().step, 1, "{expected}");
        assert_eq!(found.skipped.len(), 1);
        assert!(found.skipped[0].to_string().contains(expected), "{}", found.skipped[0]);
        // The step comes again, and takes its place.
        let again = Checkpoints::open(dir.path(), owner("a", 2), 9).unwrap();
        again.save(2, 1, &[part("x", &[9; 100])]).unwrap();
        let found = latest(dir.path()).unwrap();
        assert_eq!((found.checkpoint.unwrap().parts[0].data[0], found.skipped.len()), (9, 0), "{expected}");
    }
}

/// Undoes a mount.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    let mount = tempfile::tempdir().unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", "size=1m", "muster-test"];
    let mounted = Command::new("mount").args(tmpfs).arg(mount.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        // Past the test runner's capture, so that it is seen.
        writeln!(std::io::stderr(), "SKIPPED: a full disk: a tmpfs cannot be mounted here").ok();
        return;
    }
    let _unmount = Unmount(mount.path().to_owned());
    let dir = mount.path().join("checkpoints");
    let parts = |step: u8| [part("x", &vec![step; 300_000])];
    let checkpoints = Checkpoints::open(&dir, owner("a", 1), 9).unwrap();
    let saved: Vec<bool> =
        (1..=5).map(|step| checkpoints.save(step.into(), 1, &parts(step)).is_ok()).collect();
    assert_eq!(saved, [true, true, true, false, false]);
    assert!(checkpoints.save(6, 1, &parts(6)).unwrap_err().is_full());
    let found = latest(&dir).unwrap();
    assert_eq!((found.checkpoint.unwrap().step, found.skipped.len()), (3, 0));
    // A later start finds the disk as full, and goes on as soon as there is room.
    let later = Checkpoints::open(&dir, owner("a", 2), 9).unwrap();
    assert!(later.save(7, 1, &parts(7)).unwrap_err().is_full());
    std::fs::remove_dir_all(dir.join("step-00000001")).unwrap();
    later.save(8, 1, &parts(8)).unwrap();
    assert_eq!(latest(&dir).unwrap().checkpoint.unwrap().step, 8);
}
