//! torch's own tests of its launcher, with `muster run` in torchrun's place.

use std::process::Command;

use muster_tests::{Outcome, Place, binary, brought, skip, torch_python};

/// How often a test is tried: its ranks end without ending their process group, which torch's
/// threads survive now and then, and abort. Under torchrun as well.
const TRIES: u32 = 3;

/// Tests that do not apply; `tests/torch/launcher.py` says why.
const PASSED_OVER: usize = 5;

#[test]
fn the_launcher_passes_torch_s_own_tests() {
    const WHAT: &str = "torch's own tests of its launcher";
    let Some(python) = torch_python() else {
        return skip(WHAT, "there is no Python with torch; `cargo xtask test --python` brings one");
    };
    let Some(tests) = brought("torch-tests/test/distributed/launcher/test_run.py") else {
        return skip(WHAT, "they are not here; `cargo xtask setup --tools` brings them from Debian's source");
    };
    let place = Place::new();
    let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/torch/launcher.py");
    let dirs = [python.parent().unwrap().into(), "/usr/bin".into(), "/bin".into()];
    let path = std::env::join_paths(dirs as [std::path::PathBuf; 3]).unwrap();
    let mut names: Vec<String> = Vec::new();
    let mut passed = 0;
    for attempt in 1..=TRIES {
        let mut command = Command::new(&python);
        command.arg(driver).arg(binary("muster")).arg(tests.parent().unwrap()).args(&names);
        command.current_dir(place.path("")).env("PATH", &path).env("TMPDIR", place.path("tmp"));
        let outcome = Outcome::of(&mut command);
        let results: Vec<Vec<&str>> = (outcome.stdout.lines())
            .filter_map(|line| line.split_once("RESULT ").map(|(_, words)| words.splitn(2, ' ').collect()))
            .collect();
        let count = |result: &str| results.iter().filter(|words| words[0] == result).count();
        passed += count("ok");
        if attempt == 1 {
            assert_eq!(count("passed-over"), PASSED_OVER, "{outcome:?}");
        }
        let failed: Vec<&str> =
            results.iter().filter(|words| words[0] == "FAILED").map(|words| words[1]).collect();
        if failed.is_empty() {
            assert_eq!(outcome.code, 0, "{outcome:?}");
            break;
        }
        assert!(attempt < TRIES, "{failed:#?}: {outcome:?}");
        names = failed.iter().map(|name| name.split(':').next().unwrap().to_owned()).collect();
    }
    assert!(passed >= 21, "{passed} tests");
    place.nothing_is_left();
}
