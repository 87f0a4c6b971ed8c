//! The decoder of this crate for the fuzzer and the property tests: what clients send, through the store to the
//! replies. In no build that is shipped.

use std::time::Duration;

use muster_decoders::Decoder;

use crate::limits::{Budget, Limits};
use crate::reply::Outbox;
use crate::store::{Client, Replies, Store};
use crate::wire::{Key, MAGIC, Request};
use crate::{Input, Refusal};

/// Every decoder of this crate.
pub const DECODERS: [Decoder; 1] =
    [Decoder { name: "tcpstore_session", decode: session, samples: session_samples }];

/// So little that inputs reach every limit.
const LIMITS: Limits = Limits {
    connections_max: 4,
    key_bytes_max: 64,
    value_bytes_max: 512,
    keys_per_request_max: 32,
    request_bytes_max: 1024,
    held_bytes_max: 8 << 10,
    handshake_max: Duration::from_secs(1),
};

/// What a client sends, whole and in pieces: it is read as the same, nothing beyond the limits is ever held, each
/// request is answered as often as its kind is, and when the client is gone only values are left.
fn session(bytes: &[u8]) {
    let budget = Budget::new(LIMITS.held_bytes_max);
    let (whole, ended) = requests(bytes, bytes.len().max(1), &budget);
    for piece in [1, 7] {
        let (pieces, other) = requests(bytes, piece, &budget);
        // A limit may be met a piece earlier or later, but for that they are the same.
        let is_full = |end: &Option<Refusal>| matches!(end, Some(Refusal::Full { .. }));
        assert!(is_full(&ended) || is_full(&other) || (pieces == whole && other == ended));
    }
    assert_eq!(budget.held_bytes(), 0, "a client that is gone holds nothing");
    let mut again = Vec::new();
    for request in &whole {
        request.encode(&mut again);
    }
    assert!(bytes.starts_with(&again), "a request that was read is the same when it is sent");
    let mut store = Store::new(LIMITS, budget.clone());
    for (number, request) in whole.into_iter().enumerate() {
        let (from, mut replies) = (Client(number as u64 % 3), Replies::new());
        let answers = usize::from(has_reply(&request));
        let waits = store.waiting(1).count();
        match store.step(Duration::ZERO, from, request, &mut replies) {
            Ok(()) => {
                let own = replies.iter().filter(|(client, _)| *client == from).count();
                let begun = usize::from(store.waiting(1).any(|waiting| waiting.client == from));
                assert!(own + begun >= answers, "whoever is to be answered is, or waits");
                assert!(replies.len() <= answers + waits);
            }
            Err(refusal) => {
                assert!(!refusal.to_string().is_empty(), "a refusal says why");
                store.leave(from);
            }
        }
        let mut outbox = Outbox::new(&budget).expect("room for nothing");
        for (_, reply) in &replies {
            // A reply may be too long for what is free.
            outbox.push(reply).ok();
        }
        assert!(budget.held_bytes() <= LIMITS.held_bytes_max);
    }
    (0..3).for_each(|client| store.leave(Client(client)));
    assert_eq!(store.waiting(1).count(), 0);
    drop(store);
    assert_eq!(budget.held_bytes(), 0);
}

fn requests(bytes: &[u8], piece: usize, budget: &Budget) -> (Vec<Request>, Option<Refusal>) {
    let mut input = Input::new(LIMITS, budget).expect("room for nothing");
    let mut read = Vec::new();
    for piece in bytes.chunks(piece) {
        if let Err(refusal) = input.push(piece) {
            return (read, Some(refusal));
        }
        loop {
            match input.take() {
                Ok(Some(request)) => read.push(request),
                Ok(None) => break,
                Err(refusal) => return (read, Some(refusal)),
            }
        }
    }
    (read, None)
}

fn has_reply(request: &Request) -> bool {
    !matches!(
        request,
        Request::Validate(_)
            | Request::Set(..)
            | Request::MultiSet(_)
            | Request::Append(..)
            | Request::QueuePush(..)
    )
}

fn session_samples() -> Vec<Vec<u8>> {
    let key = |text: &str| Key::from(text.as_bytes());
    let keys = || vec![key("/a"), key("/b"), key("/q")];
    let all = vec![
        Request::Validate(MAGIC),
        Request::Ping(7),
        Request::Wait(keys()),
        Request::Set(key("/a"), b"12".to_vec()),
        Request::CompareSet(key("/b"), vec![], b"1".to_vec()),
        Request::QueuePush(key("/q"), b"1".to_vec()),
        Request::Get(key("/a")),
        Request::Add(key("/a"), -3),
        Request::Check(keys()),
        Request::NumKeys,
        Request::Append(key("/a"), vec![b'x'; 100]),
        Request::MultiGet(keys()),
        Request::MultiSet(vec![(key("/a"), b"x".to_vec()), (key("/b"), vec![0; 200])]),
        Request::Barrier(key("/barrier"), 2),
        Request::Barrier(key("/barrier"), 2),
        Request::CancelWait,
        Request::Delete(key("/a")),
        Request::QueuePop(key("/q")),
        Request::QueueLen(key("/q")),
        Request::ListKeys,
    ];
    let encode = |requests: &[Request]| {
        let mut bytes = Vec::new();
        for request in requests {
            request.encode(&mut bytes);
        }
        bytes
    };
    let singles = all.iter().skip(1).map(|one| encode(&[Request::Validate(MAGIC), one.clone()]));
    singles.chain([encode(&all)]).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn decoders_hold_what_they_promise() {
        muster_decoders::check(&super::DECODERS);
    }
}
