//! Clients that torch's never are, and those that torch's are on a bad day.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use muster_tcpstore::{Limits, MAGIC, Request, Server};

use crate::raw::{Raw, key};
use crate::{eventually, store};

#[test]
fn whoever_breaks_the_protocol_is_disconnected_and_nobody_else_notices() {
    let store = store(Limits::default());
    let mut other = Raw::connect(store.address());
    let validation = [&[0][..], &MAGIC.to_le_bytes()].concat();
    let long = |query: u8, length: u64| [&validation[..], &[query], &length.to_le_bytes()].concat();
    let tricks = [
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
        vec![0, 1, 2, 3, 4],
        vec![22, 3, 1, 0, 200],
        [&validation[..], &[77]].concat(),
        [&validation[..], &validation[..]].concat(),
        long(3, u64::MAX),
        long(1, 9000),
        long(6, u64::MAX),
        long(11, 1 << 40),
        [&long(1, 1)[..], b"k", &(1_u64 << 50).to_le_bytes()].concat(),
    ];
    for (number, trick) in tricks.iter().enumerate() {
        let mut raw = Raw::silent(store.address());
        raw.0.write_all(trick).unwrap();
        assert!(raw.is_closed(), "trick {number}");
        assert!(store.observe().held_bytes < 10_000);
    }
    eventually("all refusals are counted", || store.observe().refused == tricks.len() as u64);
    other.send(&[Request::Add(key("/n"), 1)]);
    assert_eq!(other.number(), 1);
}

#[test]
fn a_session_that_ends_anywhere_leaves_nothing_behind() {
    let store = store(Limits::default());
    let mut session = Vec::new();
    for request in [
        Request::Validate(MAGIC),
        Request::Ping(1),
        Request::Set(key("/a"), b"value".to_vec()),
        Request::Get(key("/a")),
        Request::Wait(vec![key("/never"), key("/a")]),
        Request::CancelWait,
        Request::Delete(key("/a")),
    ] {
        request.encode(&mut session);
    }
    for cut in 0..session.len() {
        Raw::silent(store.address()).0.write_all(&session[..cut]).unwrap();
    }
    eventually("the end of all connections", || store.observe().clients.is_empty());
    let mut raw = Raw::connect(store.address());
    raw.send(&[Request::Delete(key("/a"))]);
    raw.number();
    assert_eq!(store.observe().keys, 0);
    drop(raw);
    eventually("nothing is held", || store.observe().held_bytes == 0);
}

#[test]
fn requests_may_come_byte_by_byte_and_all_at_once() {
    let store = store(Limits::default());
    let mut raw = Raw::connect(store.address());
    let requests: Vec<Request> = (0..200).map(|_| Request::Add(key("/n"), 1)).collect();
    raw.send(&requests);
    for n in 1..=200 {
        assert_eq!(raw.number(), n);
    }
    let mut bytes = Vec::new();
    Request::MultiGet(vec![key("/n"), key("/none")]).encode(&mut bytes);
    for byte in bytes {
        raw.0.write_all(&[byte]).unwrap();
    }
    assert_eq!((raw.value(), raw.value()), (b"200".to_vec(), vec![]));
}

#[test]
fn values_beyond_torchs_limit_go_through_and_those_beyond_ours_do_not() {
    let limits = Limits { value_bytes_max: 20 << 20, ..Limits::default() };
    let store = store(limits);
    let big: Vec<u8> = (0..10_u32 << 20).map(|n| (n * 7) as u8).collect();
    let mut raw = Raw::connect(store.address());
    raw.send(&[Request::Set(key("/big"), big.clone()), Request::Get(key("/big"))]);
    assert!(raw.value() == big);
    let mut other = Raw::connect(store.address());
    let mut bytes = Vec::new();
    Request::Set(key("/bigger"), vec![0; (20 << 20) + 1]).encode(&mut bytes);
    // It may be cut off while it sends.
    other.0.write_all(&bytes).ok();
    assert!(other.is_closed());
    raw.send(&[Request::NumKeys]);
    assert_eq!(raw.number(), 1);
}

#[test]
fn who_takes_no_replies_is_not_read_from_and_holds_little() {
    // Room for the value, and for the request that brings it.
    let limits = Limits { held_bytes_max: 9 << 20, ..Limits::default() };
    let store = store(limits);
    let mut raw = Raw::connect(store.address());
    raw.send(&[Request::Set(key("/v"), vec![7; 4 << 20]), Request::NumKeys]);
    assert_eq!(raw.number(), 1);
    eventually("the request is let go", || store.observe().held_bytes < 5 << 20);
    let mut deaf = Raw::connect(store.address());
    deaf.0.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut request = Vec::new();
    Request::Get(key("/v")).encode(&mut request);
    let flood = request.repeat(1000);
    let mut written = 0;
    // Until nothing more is taken from it.
    while let Ok(length) = deaf.0.write(&flood) {
        written += length;
        assert!(written < 100 << 20, "the store reads on");
    }
    assert!(store.observe().held_bytes < 5 << 20);
    raw.send(&[Request::Add(key("/n"), 1)]);
    assert_eq!(raw.number(), 1);
    // Once it reads, it goes on where it was.
    for _ in 0..10 {
        assert_eq!(deaf.value().len(), 4 << 20);
    }
}

#[test]
fn a_small_request_for_a_giant_reply_is_refused() {
    let limits = Limits { held_bytes_max: 4 << 20, ..Limits::default() };
    let store = store(limits);
    let mut raw = Raw::connect(store.address());
    raw.send(&[Request::Set(key("/v"), vec![7; 8 << 10]), Request::MultiGet(vec![key("/v"); 100_000])]);
    assert!(raw.is_closed());
    eventually("the reply is given up", || store.observe().held_bytes < 20 << 10);
}

#[test]
fn who_says_nothing_is_disconnected_and_who_comes_when_it_is_full_too() {
    let limits =
        Limits { handshake_max: Duration::from_millis(200), connections_max: 3, ..Limits::default() };
    let store = store(limits);
    assert!(Raw::silent(store.address()).is_closed());
    let mut all: Vec<Raw> = (0..3).map(|_| Raw::connect(store.address())).collect();
    assert!(Raw::silent(store.address()).is_closed());
    assert_eq!(store.observe().refused, 2);
    // Those who validated stay, however little they say.
    std::thread::sleep(Duration::from_millis(300));
    for raw in &mut all {
        raw.send(&[Request::NumKeys]);
        assert_eq!(raw.number(), 0);
    }
    all.pop();
    eventually("the place is free", || store.observe().clients.len() == 2);
    Raw::connect(store.address());
}

#[test]
fn a_store_listens_at_its_address_alone_and_ends_when_it_is_dropped() {
    let server = Server::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Limits::default()).unwrap();
    let address = server.address();
    // A client may be first: it is served once the store starts.
    let mut early = Raw::silent(address);
    early.send(&[Request::Validate(MAGIC), Request::NumKeys]);
    let taken = Server::bind(address, Limits::default()).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    let store = server.start().unwrap();
    assert_eq!(early.number(), 0);
    assert!(std::net::TcpStream::connect((Ipv4Addr::new(127, 0, 0, 2), address.port())).is_err());
    drop(store);
    assert_eq!(early.0.read(&mut [0]).unwrap_or(0), 0);
    assert!(std::net::TcpStream::connect(address).is_err());
    // The port can be taken again at once.
    Server::bind(address, Limits::default()).unwrap();
}
