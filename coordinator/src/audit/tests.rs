//! The file as a whole.

use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use super::*;

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn record(reason: &str) -> Record {
    Record { who: "token:ci".to_owned(), role: "viewer", reason: reason.to_owned(), ..Record::default() }
}

#[tokio::test]
async fn each_record_is_a_line_that_its_owner_alone_reads() {
    let dir = tempfile::tempdir().unwrap();
    let audit = Audit::start(Some(dir.path()));
    let hostile = "x\n{\"who\":\"root\"}\u{2028}\u{9b}";
    audit.changed(Record { object: Some("job:a".to_owned()), ..record(hostile) }, Code::Ok);
    let peer = Some(IpAddr::from([10, 0, 0, 1]));
    for _ in 0..100 {
        audit.refused(record("no"), Code::PermissionDenied, peer);
    }
    audit.close().await;
    audit.changed(record("too late"), Code::Ok);
    let path = dir.path().join(NAME);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains(['\u{2028}', '\u{9b}']), "{text:?}");
    let lines = lines(&path);
    assert_eq!((&lines[0]["object"], &lines[0]["outcome"]), (&"job:a".into(), &"Ok".into()));
    assert_eq!(lines[0]["reason"], hostile);
    assert!(lines[0]["time"].as_str().unwrap().starts_with("20"), "{}", lines[0]);
    let last = lines.last().unwrap();
    assert_eq!((&last["from"], &last["more"]), (&"10.0.0.1".into(), &80.into()), "{last}");
    assert_eq!(lines.len(), 1 + 20 + 1);
}

#[tokio::test]
async fn what_cannot_be_written_is_counted_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody can write a directory.
    let path = dir.path().join(NAME);
    std::fs::create_dir(&path).unwrap();
    let audit = Audit::start(Some(dir.path()));
    for _ in 0..3 {
        audit.changed(record(""), Code::Ok);
    }
    while audit.shared.lost.load(Ordering::Relaxed) < 3 {
        tokio::task::yield_now().await;
    }
    std::fs::remove_dir(&path).unwrap();
    audit.changed(record("after"), Code::Ok);
    audit.close().await;
    let lines = lines(&path);
    let lost = lines.iter().find(|line| line["outcome"] == "Lost").unwrap();
    assert_eq!(lost["more"], 3, "{lines:?}");
    assert!(lines.iter().any(|line| line["reason"] == "after"), "{lines:?}");
}

#[test]
fn the_file_has_a_bound_and_keeps_a_few_older_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let mut file = File::new(path.clone()).with_bytes_max(1000);
    for number in 0..1000 {
        file.write(&record(&number.to_string())).unwrap();
    }
    let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3"]);
    assert_eq!(lines(&path).last().unwrap()["reason"], "999");
    // A line that was cut off does not take the next one with it.
    std::fs::write(&path, "{\"who\":").unwrap();
    File::new(path.clone()).write(&record("whole")).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("{\"who\":\n{") && text.ends_with("}\n"), "{text}");
}
