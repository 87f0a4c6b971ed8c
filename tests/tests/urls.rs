//! URLs and addresses as people write them; and those with a password, which are refused and shown
//! nowhere.

use std::process::Command;

use muster_tests::{Daemon, Outcome, address_of, binary, eventually, skip};

/// What must not be seen.
const SECRET: &str = "heim";

#[test]
fn a_password_in_a_url_is_refused_and_shown_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let calls = "names no user and no password";
    let (token, etcd) = ("--token-file", "--etcd-password-file");
    let table: [(&[&str], &str, &str); 14] = [
        (&["coordinator", "--store", "etcd://root:geheim@127.0.0.1:1"], "", etcd),
        (&["coordinator", "--store=http://root:ge/heim@127.0.0.1:1"], "", "begins with etcd://"),
        (&["coordinator", "--store", "etcd://a:1,root:geheim@127.0.0.1:1/x"], "", etcd),
        (&["coordinator", "--store", "etcd://127.0.0.1:1", "--advertise", "http://u:geheim@h:1"], "", calls),
        (&["store", "export", "--store", "etcd://geheim@127.0.0.1:1", "x"], "", etcd),
        (&["jobs", "--coordinator", "http://u:geheim@127.0.0.1:1"], "", token),
        // A comma in it makes two URLs of one.
        (&["jobs", "--coordinator", "http://u:geheim,heim@127.0.0.1:1"], "", token),
        (&["jobs"], "https://u:geheim@127.0.0.1:1", token),
        (&["healthcheck"], "https://u:geheim@127.0.0.1:1", token),
        (&["doctor"], "https://u:geheim@127.0.0.1:1", token),
        (&["worker", "--name", "n1"], "http://u:geheim@127.0.0.1:1", token),
        (&["run", "--rdzv-backend", "muster", "--rdzv-endpoint", "https://u:geheim@h:1", "x.py"], "", calls),
        (
            &["run", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "u:geheim@h:1", "x"],
            "",
            calls,
        ),
        (&["nodes", "--coordinator", "u:geheim@127.0.0.1:x y"], "", token),
    ];
    for (words, variable, expected) in table {
        let mut command = Command::new(binary("muster"));
        command.args(words).current_dir(dir.path()).env("RUST_LOG", "trace");
        if !variable.is_empty() {
            command.env("MUSTER_COORDINATOR", variable);
        }
        let refused = Outcome::of(&mut command);
        assert!([1, 2].contains(&refused.code), "{words:?}: {refused:?}");
        assert!(refused.stderr.contains(expected), "{words:?}: {refused:?}");
        let shown = format!("{}{}", refused.stdout, refused.stderr);
        assert!(!shown.contains(SECRET), "{words:?}: {shown}");
    }
}

#[test]
fn urls_and_addresses_are_read_as_people_write_them() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return skip("URLs of IPv6", "this machine has no IPv6");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let data_dir = path("coordinator");
    let args = ["coordinator", "--listen", " [::1]:0 ", "--http-listen", " [::1]:0", "--data-dir", &data_dir];
    let coordinator = Daemon::start(dir.path(), "coordinator", &args);
    let at = address_of(&coordinator);
    assert!(at.starts_with("[::1]:"), "{at}");
    let (url, data_dir) = (format!(" http://{at}/ ,"), path("n1"));
    let args = ["worker", "--coordinator", &url, "--name", "n1", "--data-dir", &data_dir];
    let _worker = Daemon::start(dir.path(), "n1", &args);
    let call = |urls: &str, words: &[&str]| {
        Outcome::of(Command::new(binary("muster")).args(words).env("MUSTER_COORDINATOR", urls))
    };
    for urls in [
        format!("http://{at}"),
        format!(" http://{at}/"),
        format!("http://{at}// , "),
        format!("http://127.0.0.1:1/, HTTP://{at}/ "),
    ] {
        eventually("the node", || {
            let listed = call(&urls, &["nodes"]);
            if listed.stdout.contains("n1") && listed.stdout.contains("::1") { Ok(()) } else { Err(listed) }
        });
    }
    let refused = call(" , ", &["nodes"]);
    assert!(refused.code == 2 && refused.stderr.contains("no coordinator is named"), "{refused:?}");
    for wrong in ["::1:7070", "localhost:7070", "[::1]", ":7070"] {
        let refused = call("", &["coordinator", "--listen", wrong]);
        let words = "not an IP address and a port, such as 127.0.0.1:7070 or [::]:7070";
        assert!(refused.code == 2 && refused.stderr.contains(words), "{wrong}: {refused:?}");
    }
    // Ranks at an address of IPv6.
    let url = format!("http://{at}");
    let script = "exec 3<>/dev/tcp/$MASTER_ADDR/$MASTER_PORT && echo reached $MASTER_ADDR";
    let id = call(&url, &["submit", "--nproc-per-node", "2", "--", "bash", "-c", script]).ok();
    eventually("the ranks' words", || {
        let said = call(&url, &["logs", id.trim()]);
        if said.stdout.matches("reached ::1").count() == 2 { Ok(()) } else { Err(said) }
    });
}
