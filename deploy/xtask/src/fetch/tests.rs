//! Downloads from a server that cuts, lies and ignores ranges, through the same Python as in use.

use super::*;
use crate::pypi;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const CONTENT: &[u8] = b"the quick brown fox jumps over the lazy dog";
const PIN: Pin =
    Pin { bytes: 43, sha256: "05c6e08f1d9fdafa03147fcb8f82f124c76d2f70e3d989dc8aadb5e7d7450bec" };

/// How the server treats one request; requests after the last are served whole.
#[derive(Clone, Copy)]
enum Reply {
    /// Honours the range, but closes the connection after so many bytes.
    CutAfter(usize),
    /// Answers 200 with the whole file, whatever range was asked for.
    IgnoreRange,
    /// Answers 503.
    Unavailable,
}

struct Server {
    url: String,
    ranges: Arc<Mutex<Vec<Option<usize>>>>,
}

/// Serves `content`; its thread ends with the test's process.
fn serve(content: &'static [u8], replies: &[Reply]) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/file", listener.local_addr().unwrap());
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let (seen, replies) = (ranges.clone(), replies.to_vec());
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let asked = range_of(&connection);
            let reply = replies.get(seen.lock().unwrap().len()).copied();
            seen.lock().unwrap().push(asked);
            let _ = answer(connection, content, asked, reply);
        }
    });
    Server { url, ranges }
}

fn range_of(connection: &TcpStream) -> Option<usize> {
    let lines = BufReader::new(connection).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let lines: Vec<String> = lines.collect();
    let range = lines.iter().find_map(|line| line.strip_prefix("Range: bytes="))?;
    range.trim_end_matches('-').parse().ok()
}

fn answer(
    mut to: TcpStream,
    content: &[u8],
    asked: Option<usize>,
    reply: Option<Reply>,
) -> std::io::Result<()> {
    if let Some(Reply::Unavailable) = reply {
        return write!(to, "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let start = if let Some(Reply::IgnoreRange) = reply { 0 } else { asked.unwrap_or(0) };
    let rest = &content[start..];
    let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
    let (length, last, full) = (rest.len(), content.len() - 1, content.len());
    write!(to, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n")?;
    write!(to, "Content-Range: bytes {start}-{last}/{full}\r\n\r\n")?;
    let sent = if let Some(Reply::CutAfter(bytes)) = reply { bytes.min(length) } else { length };
    to.write_all(&rest[..sent])
}

/// Downloads into a fresh folder that may hold a part file already; gives the result and the ranges asked for.
fn check(
    content: &'static [u8],
    replies: &[Reply],
    part: Option<&[u8]>,
) -> (Result<()>, Vec<Option<usize>>, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    if let Some(part) = part {
        fs::write(folder.path().join("file.part"), part).unwrap();
    }
    let server = serve(content, replies);
    let result = get(&server, &folder);
    let ranges = server.ranges.lock().unwrap().clone();
    (result, ranges, folder)
}

fn get(server: &Server, folder: &TempDir) -> Result<()> {
    let open = |offset| pypi::get(&server.url, offset);
    let path = folder.path().join("file");
    download(&open, PIN, &path, &ProgressBar::hidden(), Duration::from_millis(1))
}

fn whole(folder: &TempDir) {
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), CONTENT);
    assert!(!folder.path().join("file.part").exists());
}

#[test]
fn a_cut_connection_is_resumed_where_it_was_cut() {
    let (result, ranges, folder) = check(CONTENT, &[Reply::CutAfter(10), Reply::CutAfter(5)], None);
    result.unwrap();
    whole(&folder);
    assert_eq!(ranges, [None, Some(10), Some(15)]);
}

#[test]
fn the_part_of_a_killed_run_is_gone_on_with() {
    let (result, ranges, folder) = check(CONTENT, &[], Some(&CONTENT[..20]));
    result.unwrap();
    whole(&folder);
    assert_eq!(ranges, [Some(20)]);
}

#[test]
fn a_second_run_asks_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(CONTENT, &[]);
    get(&server, &folder).unwrap();
    get(&server, &folder).unwrap();
    assert_eq!(server.ranges.lock().unwrap().len(), 1);
}

#[test]
fn a_part_longer_than_the_file_is_begun_again() {
    let (result, ranges, folder) = check(CONTENT, &[], Some(&[b'x'; 99]));
    result.unwrap();
    whole(&folder);
    assert_eq!(ranges, [None]);
}

#[test]
fn a_damaged_part_costs_one_download_from_the_start() {
    let (result, ranges, folder) = check(CONTENT, &[], Some(b"damaged"));
    result.unwrap();
    whole(&folder);
    assert_eq!(ranges, [Some(7), None]);
}

#[test]
fn a_server_without_ranges_is_read_from_the_start() {
    let (result, ranges, folder) = check(CONTENT, &[Reply::CutAfter(10), Reply::IgnoreRange], None);
    result.unwrap();
    whole(&folder);
    assert_eq!(ranges, [None, Some(10)]);
}

#[test]
fn a_wrong_hash_is_refused_and_nothing_is_kept() {
    let (result, ranges, folder) = check(b"the quick brown fox jumps over the lazy cat", &[], None);
    let words = result.unwrap_err().to_string();
    assert!(words.contains("not the pinned 05c6e08f"), "{words}");
    assert_eq!(ranges.len(), 1);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_longer_file_is_refused() {
    let (result, _, folder) = check(b"the quick brown fox jumps over the lazy dog, twice", &[], None);
    assert!(result.unwrap_err().to_string().contains("longer than the pinned 43 bytes"));
    assert!(!folder.path().join("file").exists());
}

#[test]
fn a_busy_server_is_asked_again_but_not_for_ever() {
    let (result, ranges, folder) = check(CONTENT, &[Reply::Unavailable], None);
    result.unwrap();
    whole(&folder);
    assert_eq!(ranges, [None, None]);
    let (result, ranges, _) = check(CONTENT, &[Reply::Unavailable; 9], None);
    let words = format!("{:#}", result.unwrap_err());
    assert!(words.contains("gave up after 5 attempts: the server answered 503 Busy"), "{words}");
    assert_eq!(ranges.len(), 5);
}
