//! Scripts of requests by several clients, and what each is answered.

use super::*;

const NOW: Duration = Duration::from_secs(5);

struct Bench {
    store: Store,
    budget: Budget,
}

impl Bench {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let budget = Budget::new(limits.held_bytes_max);
        Self { store: Store::new(limits, budget.clone()), budget }
    }

    /// What is said to whom, in words.
    fn ask(&mut self, client: u64, request: Request) -> Result<String, Refusal> {
        let mut replies = Replies::new();
        self.store.step(NOW, Client(client), request, &mut replies)?;
        let words = replies.iter().map(|(client, reply)| format!("{}:{}", client.0, words(reply)));
        Ok(words.collect::<Vec<_>>().join(" "))
    }

    #[track_caller]
    fn check(&mut self, client: u64, request: Request, expected: &str) {
        assert_eq!(self.ask(client, request).unwrap(), expected);
    }
}

fn words(reply: &Reply) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match reply {
        Reply::Ready(ready) => ready.to_string(),
        Reply::StopWaiting => "stop".into(),
        Reply::WaitCanceled => "cancelled".into(),
        Reply::Pong(number) => format!("pong {number}"),
        Reply::Number(number) => number.to_string(),
        Reply::Values(values) => {
            let values = values.iter().map(|value| value.as_deref().map_or("-".into(), text));
            format!("[{}]", values.collect::<Vec<_>>().join(","))
        }
        Reply::Compared(Ok(value)) => text(value),
        Reply::Compared(Err(expected)) => format!("{}?", text(expected)),
        Reply::Popped(count, value) => format!("{count} {}", value.as_deref().map_or("-".into(), text)),
        Reply::Keys(keys) => {
            let mut keys: Vec<String> = keys.iter().map(|key| text(key)).collect();
            keys.sort();
            keys.join(",")
        }
    }
}

fn key(text: &str) -> Key {
    Key::from(text.as_bytes())
}

fn keys(text: &str) -> Vec<Key> {
    text.split_whitespace().map(key).collect()
}

fn set(name: &str, value: &str) -> Request {
    Request::Set(key(name), value.into())
}

fn push(name: &str, value: &str) -> Request {
    Request::QueuePush(key(name), value.into())
}

fn compare_set(name: &str, expected: &str, desired: &str) -> Request {
    Request::CompareSet(key(name), expected.into(), desired.into())
}

#[test]
fn values_are_set_read_compared_counted_and_removed() {
    let mut bench = Bench::new();
    bench.check(1, set("a", "1"), "");
    bench.check(2, Request::Get(key("a")), "2:[1]");
    bench.check(2, Request::Get(key("b")), "2:[-]");
    bench.check(1, Request::Add(key("n"), 5), "1:5");
    bench.check(2, Request::Add(key("n"), -7), "2:-2");
    bench.check(2, Request::Get(key("n")), "2:[-2]");
    bench.check(1, Request::Check(keys("a n")), "1:true");
    bench.check(1, Request::Check(keys("a x")), "1:false");
    bench.check(1, Request::Check(vec![]), "1:true");
    bench.check(1, compare_set("k", "", "v"), "1:v");
    bench.check(1, compare_set("k", "x", "w"), "1:v");
    bench.check(1, compare_set("k", "v", "w"), "1:w");
    bench.check(1, compare_set("k2", "x", "v"), "1:x?");
    bench.check(1, Request::Append(key("k"), b"tail".to_vec()), "");
    bench.check(1, Request::Append(key("k3"), b"".to_vec()), "");
    bench.check(1, Request::MultiGet(keys("k k2 k3")), "1:[wtail,-,]");
    bench.check(1, Request::MultiSet(vec![(key("m"), b"x".to_vec()), (key("m"), b"y".to_vec())]), "");
    bench.check(1, Request::NumKeys, "1:5");
    bench.check(1, Request::ListKeys, "1:a,k,k3,m,n");
    bench.check(1, Request::Delete(key("m")), "1:1");
    bench.check(1, Request::Delete(key("m")), "1:0");
    bench.check(1, Request::Ping(9), "1:pong 9");
}

#[test]
fn a_number_is_read_as_torch_reads_it_and_never_wraps_around() {
    let mut bench = Bench::new();
    for (value, sum) in
        [("12", "1:13"), (" \n+12x", "1:13"), ("-1", "1:0"), ("9223372036854775806", "1:9223372036854775807")]
    {
        bench.check(1, set("n", value), "");
        bench.check(1, Request::Add(key("n"), 1), sum);
    }
    assert_eq!(
        bench.ask(1, Request::Add(key("n"), 1)),
        Err(Refusal::Overflow { key: "n".into(), amount: 1 })
    );
    for value in ["", "x", "-", "9223372036854775808"] {
        bench.check(1, set("n", value), "");
        assert_eq!(bench.ask(1, Request::Add(key("n"), 1)), Err(Refusal::NotANumber { key: "n".into() }));
    }
}

#[test]
fn who_waits_is_woken_once_by_the_last_of_its_keys() {
    let mut bench = Bench::new();
    bench.check(1, Request::Wait(keys("a b b c")), "");
    bench.check(2, Request::Wait(keys("a")), "");
    bench.check(3, set("c", ""), "");
    bench.check(3, set("a", ""), "2:stop");
    // Coming again does not count twice.
    bench.check(3, set("a", ""), "");
    bench.check(3, Request::Delete(key("a")), "3:1");
    bench.check(3, Request::Add(key("b"), 1), "1:stop 3:1");
    bench.check(3, set("b", ""), "");
    bench.check(1, Request::Wait(keys("b c")), "1:stop");
    bench.check(1, Request::Wait(vec![]), "1:stop");
    assert!(bench.store.waits.is_empty() && bench.store.waiters.is_empty());
}

#[test]
fn every_way_to_make_a_key_wakes_and_a_comparison_that_fails_does_not() {
    let makers = [
        set("k", "1"),
        Request::MultiSet(vec![(key("k"), vec![])]),
        Request::Append(key("k"), b"x".to_vec()),
        compare_set("k", "", "1"),
        push("k", "1"),
    ];
    for maker in makers {
        let mut bench = Bench::new();
        bench.check(1, Request::Wait(keys("k")), "");
        bench.check(2, compare_set("k", "other", "1"), "2:other?");
        assert!(bench.ask(2, maker.clone()).unwrap().starts_with("1:stop"), "{maker:?}");
    }
}

#[test]
fn a_wait_ends_with_its_cancellation_and_with_its_client() {
    let mut bench = Bench::new();
    bench.check(1, Request::Wait(keys("a b")), "");
    bench.check(2, Request::Wait(keys("b")), "");
    assert_eq!(bench.ask(1, Request::Wait(keys("c"))), Err(Refusal::SecondWait));
    // Other requests are answered meanwhile, as torch does.
    bench.check(1, Request::NumKeys, "1:0");
    bench.check(1, Request::CancelWait, "1:cancelled");
    bench.check(1, Request::CancelWait, "1:cancelled");
    bench.store.leave(Client(2));
    bench.check(3, Request::MultiSet(vec![(key("a"), vec![]), (key("b"), vec![])]), "");
    bench.check(1, Request::Wait(keys("later never")), "");
    bench.check(3, Request::Set(key("later"), vec![]), "");
    bench.check(4, Request::Barrier(key("barrier"), 2), "");
    let mut waiting: Vec<_> = bench.store.waiting(4).collect();
    waiting.sort_by_key(|wait| wait.client);
    let waiting: Vec<_> = waiting.iter().map(|w| (w.client.0, w.keys.clone(), w.missing, w.since)).collect();
    // What has come is not shown, but a barrier is, though its key is there.
    assert_eq!(waiting, [(1, vec![&key("never")], 1, NOW), (4, vec![&key("barrier")], 1, NOW)]);
}

#[test]
fn a_queue_gives_its_values_in_turn_and_wakes_one_waiter_for_each() {
    let mut bench = Bench::new();
    for client in 1..4 {
        bench.check(client, Request::Wait(keys("q")), "");
    }
    bench.check(9, push("q", "x"), "1:stop");
    bench.check(9, push("q", "y"), "2:stop");
    bench.check(9, Request::QueueLen(key("q")), "9:2");
    bench.check(9, Request::Check(keys("q")), "9:true");
    bench.check(9, Request::NumKeys, "9:0");
    bench.check(1, Request::QueuePop(key("q")), "1:2 x");
    bench.check(2, Request::QueuePop(key("q")), "2:1 y");
    bench.check(2, Request::QueuePop(key("q")), "2:0 -");
    bench.check(2, Request::Check(keys("q")), "2:false");
    bench.check(9, push("q", "z"), "3:stop");
    bench.check(3, Request::Wait(keys("q other")), "");
    bench.check(9, set("other", ""), "3:stop");
}

#[test]
fn a_value_in_a_queue_is_not_used_up_by_one_who_waits_for_more() {
    let mut bench = Bench::new();
    bench.check(1, Request::Wait(keys("q other")), "");
    bench.check(2, Request::Wait(keys("q")), "");
    bench.check(9, push("q", "x"), "2:stop");
    bench.check(9, push("q", "y"), "");
    bench.check(9, set("other", ""), "1:stop");
}

#[test]
fn a_barrier_opens_when_all_have_come() {
    let mut bench = Bench::new();
    bench.check(1, Request::Barrier(key("b"), 3), "");
    bench.check(2, Request::Barrier(key("b"), 3), "");
    bench.check(9, Request::Get(key("b")), "9:[2]");
    bench.check(3, Request::Barrier(key("b"), 3), "1:stop 2:stop 3:stop");
    // As with torch, a barrier that was passed is open.
    bench.check(1, Request::Barrier(key("b"), 3), "1:stop");
    bench.check(1, Request::Barrier(key("one"), 1), "1:stop");
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let limits = Limits { held_bytes_max: 10_000, value_bytes_max: 2000, ..Limits::default() };
    let mut bench = Bench::with(limits);
    let big = "x".repeat(2000);
    for n in 0..4 {
        bench.check(1, set(&format!("k{n}"), &big), "");
    }
    let held = bench.budget.held_bytes();
    assert!((8000..10_000).contains(&held));
    for request in [
        set("more", &big),
        push("q", &big),
        compare_set("more", "", &big),
        Request::MultiSet(vec![(key("a"), vec![0; 500]), (key("b"), vec![0; 1500])]),
        Request::Wait(keys(&"key ".repeat(20))),
    ] {
        assert!(matches!(bench.ask(1, request), Err(Refusal::Full { .. })));
        assert_eq!((bench.budget.held_bytes(), bench.store.len()), (held, 4));
    }
    assert!(matches!(
        bench.ask(1, Request::Append(key("k0"), vec![0])),
        Err(Refusal::ValueTooLong { bytes: 2001, max: 2000 })
    ));
    // Replacing takes its place, and removing makes room.
    bench.check(1, Request::Delete(key("k0")), "1:1");
    bench.check(1, set("k1", &big), "");
    for n in 1..4 {
        bench.check(1, Request::Delete(key(&format!("k{n}"))), "1:1");
    }
    assert_eq!(bench.budget.held_bytes(), 0);
}

#[test]
fn nothing_is_held_for_clients_and_queues_that_are_gone() {
    let mut bench = Bench::new();
    bench.check(1, Request::Wait(keys("a b c")), "");
    bench.check(2, push("q", "x"), "");
    bench.check(2, Request::QueuePop(key("q")), "2:1 x");
    bench.store.leave(Client(1));
    assert_eq!(bench.budget.held_bytes(), 0);
    assert!(bench.store.waiters.is_empty() && bench.store.queues.is_empty());
}

#[test]
fn keys_are_shown_without_the_clients_slash_and_what_cannot_be_printed() {
    for (key, expected) in [
        (&b"/default_pg/0//cpu//0/2"[..], "default_pg/0//cpu//0/2"),
        (b"init/", "init/"),
        (b"/a\0\n\xff", "a\\x00\\n\\xff"),
    ] {
        assert_eq!(shown(key), expected);
    }
    assert_eq!(shown(&[b'k'; 200]).chars().count(), 121);
}
