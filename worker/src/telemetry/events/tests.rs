//! Tests of the whole way from event files to points.

use std::fs::{self, File};
use std::io::Write;

use super::message::encoded;
use super::record::framed;
use super::*;
use crate::telemetry::output::LOOK_BYTES_MAX;
use crate::telemetry::source::Changes;
use crate::telemetry::tests::points;

const NAME_OF_0: &str = "events.out.tfevents.1760000000.vm.10.0";

struct World {
    dir: tempfile::TempDir,
    events: Events,
    buffer: Vec<u8>,
}

impl World {
    /// Two ranks, the processes 10 and 11, and files that were there before them.
    fn new(before: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        for name in before {
            let path = runs.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, event(1, &[("old", 1.0)])).unwrap();
        }
        let sources = (0..2).map(|rank| {
            let log_dir = dir.path().join(rank.to_string());
            fs::create_dir_all(&log_dir).unwrap();
            Source::open(Rank(rank), &log_dir, Changes::default()).unwrap()
        });
        let owners = Owners {
            ranks: [(10, Rank(0)), (11, Rank(1))].into(),
            host: "vm".into(),
            parent: |pid| (pid == 20).then_some(0),
            shim: 5,
        };
        let events = Events::new(EventDir::before(runs, None).unwrap(), owners, sources);
        Self { dir, events, buffer: vec![0; LOOK_BYTES_MAX] }
    }

    fn append(&self, name: &str, bytes: &[u8]) {
        let path = self.dir.path().join("runs").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::options().create(true).append(true).open(path).unwrap().write_all(bytes).unwrap();
    }

    fn look(&mut self) {
        while self.events.look(&mut self.buffer) {}
    }

    /// The points of a rank as text, once it has ended.
    fn ended(&mut self, rank: u32) -> Vec<String> {
        self.look();
        self.events.finish(Rank(rank));
        self.points(rank)
    }

    fn points(&self, rank: u32) -> Vec<String> {
        let shown = |(step, values): (u64, BTreeMap<String, f64>)| format!("{step} {values:?}");
        points(&self.dir.path().join(rank.to_string())).into_iter().map(shown).collect()
    }
}

fn event(step: i64, values: &[(&str, f32)]) -> Vec<u8> {
    framed(&encoded(step, values))
}

#[test]
fn scalars_of_one_step_are_one_point_in_whatever_pieces_they_come() {
    let bytes = [
        event(1, &[("loss", 0.5)]),
        event(1, &[("lr", 0.1)]),
        event(2, &[("loss", f32::NAN)]),
        event(3, &[("loss", 0.25), ("loss", 0.125)]),
        event(0, &[]),
        event(4, &[("loss", 0.0)]),
    ]
    .concat();
    let expected = [
        r#"1 {"loss": 0.5, "lr": 0.1}"#,
        r#"2 {"loss": NaN}"#,
        r#"3 {"loss": 0.25}"#,
        r#"3 {"loss": 0.125}"#,
        r#"4 {"loss": 0.0}"#,
    ];
    for cut in 0..bytes.len() {
        let mut world = World::new(&[]);
        world.append(NAME_OF_0, &bytes[..cut]);
        world.events.look(&mut world.buffer);
        world.append(NAME_OF_0, &bytes[cut..]);
        assert_eq!(world.ended(0), expected, "cut at {cut}");
    }
}

#[test]
fn the_last_step_is_told_once_nothing_more_comes() {
    let mut world = World::new(&[]);
    world.append(NAME_OF_0, &event(1, &[("loss", 0.5)]));
    world.look();
    assert!(world.points(0).is_empty(), "it may go on");
    world.look();
    assert_eq!(world.points(0), [r#"1 {"loss": 0.5}"#]);
}

#[test]
fn each_rank_has_its_own_files_and_those_of_others_are_nobodys() {
    let old = "events.out.tfevents.1750000000.vm.10.0";
    let mut world = World::new(&[old, "earlier/events.out.tfevents.1.vm.11.0"]);
    let loss = |value| event(1, &[("loss", value)]);
    // A writer of an earlier generation that lives on, and jobs of others on this host and another.
    world.append(old, &loss(9.0));
    world.append("other/events.out.tfevents.1760000000.vm.20.0", &loss(9.0));
    world.append("other/events.out.tfevents.1760000000.gpu-7.10.0", &loss(9.0));
    world.append("events.out", &loss(9.0));
    world.append(".hidden/events.out.tfevents.1760000000.vm.10.0", &loss(9.0));
    std::os::unix::fs::symlink("/", world.dir.path().join("runs/link")).unwrap();
    world.look();
    world.append("a/events.out.tfevents.1760000000.vm.11.0", &loss(2.0));
    world.append("b/events.out.tfevents.1760000000.vm.10.0", &loss(1.0));
    world.append("b/loss_train/events.out.tfevents.1760000001.vm.10.1", &loss(0.5));
    world.append("c/events.out.tfevents.1760000001.vm.10.2", &loss(0.25));
    world.append("b/events.out.tfevents.1760000002.vm.99.0", &event(2, &[("loss", 0.125)]));
    assert_eq!(world.ended(1), [r#"1 {"loss": 2.0}"#]);
    let mut found = world.ended(0);
    found.sort();
    let expected = [
        r#"1 {"c/loss": 0.25}"#,
        r#"1 {"loss": 1.0}"#,
        r#"1 {"loss_train/loss": 0.5}"#,
        r#"2 {"loss": 0.125}"#,
    ];
    assert_eq!(found, expected);
}

#[test]
fn the_first_directory_gives_no_name() {
    let table = [
        ("/r/x", "/r/x", ""),
        ("/r/x", "/r/x/loss_a", "loss_a/"),
        ("/r/fit/train", "/r/fit/validation", "validation/"),
        ("/r/x/y", "/r/x", "x/"),
        ("/r/x/y", "/r/z", "z/"),
    ];
    for (first, dir, expected) in table {
        assert_eq!(prefix(Path::new(first), Path::new(dir)), expected, "{dir}");
    }
}

#[test]
fn damage_ends_one_file_and_what_is_large_or_no_event_is_passed_over() {
    let mut world = World::new(&[]);
    let good = |step| event(step, &[("loss", 0.5)]);
    let image = framed(&vec![0x7f; 3 << 20]);
    world.append(NAME_OF_0, &[good(1), image, framed(b"\xff\xff\xff"), good(2)].concat());
    let mut bad = good(4);
    let last = bad.len() - 1;
    bad[last] ^= 1;
    let second = "b/events.out.tfevents.1760000000.vm.10.1";
    world.append(second, &[good(3), bad, good(5)].concat());
    for _ in 0..10 {
        world.look();
    }
    world.append(second, &good(6));
    world.append(NAME_OF_0, &good(7));
    let found = world.ended(0);
    let steps: Vec<_> = found.iter().map(|point| point.split(' ').next().unwrap()).collect();
    assert_eq!(steps, ["1", "2", "3", "7"]);
}

#[test]
fn what_is_seen_damaged_for_a_moment_is_read_when_it_is_there() {
    let mut world = World::new(&[]);
    let (first, second) = (event(1, &[("loss", 0.5)]), event(2, &[("loss", 0.25)]));
    world.append(NAME_OF_0, &[&first[..], &vec![0; second.len()]].concat());
    world.look();
    world.look();
    let path = world.dir.path().join("runs").join(NAME_OF_0);
    fs::write(path, [first, second].concat()).unwrap();
    assert_eq!(world.ended(0).len(), 2);
}

#[test]
fn bounds_hold_whatever_a_program_writes() {
    let mut world = World::new(&[]);
    let names: Vec<String> = (0..2000).map(|tag| format!("{}é{tag}", "x".repeat(200))).collect();
    let values: Vec<(&str, f32)> = names.iter().map(|name| (name.as_str(), 1.0)).collect();
    for part in values.chunks(100) {
        world.append(NAME_OF_0, &event(1, part));
    }
    for file in 0..300 {
        world.append(
            &format!("d/events.out.tfevents.1760000000.vm.11.{file}"),
            &event(file, &[("loss", 1.0)]),
        );
    }
    world.ended(0);
    let found = points(&world.dir.path().join("0"));
    assert!(found.iter().all(|(_, values)| values.len() <= 64));
    assert!(found.iter().all(|(_, values)| values.keys().all(|name| name.len() <= 128)));
    assert_eq!(found.iter().map(|(_, values)| values.len()).sum::<usize>(), 1000);
    assert_eq!(world.ended(1).len(), FILES_MAX - 1);
}

#[test]
fn a_directory_with_too_much_in_it_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    assert!(EventDir::before(dir.path().join("not/there/yet"), None).is_some());
    for number in 0..=ENTRIES_MAX {
        File::create(dir.path().join(number.to_string())).unwrap();
    }
    assert!(EventDir::before(dir.path().to_owned(), None).is_none());
    let file = dir.path().join("0");
    assert!(EventDir::before(file, None).is_none());
}
