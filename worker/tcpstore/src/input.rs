//! The bytes of one client, as requests.

use crate::limits::{Budget, Hold, Limits};
use crate::refusal::Refusal;
use crate::wire::{Found, MAGIC, Request, Scan, parse};

/// Memory that a connection keeps for its next request, in bytes: most are shorter.
const KEPT_BYTES: usize = 1 << 10;

/// What a client has sent and what of it is not answered. Its memory grows with the bytes that come in, never by what
/// a length says.
#[derive(Debug)]
pub struct Input {
    limits: Limits,
    pending: Vec<u8>,
    /// Bytes of it that are requests already given out.
    taken: usize,
    scan: Option<Scan>,
    /// What the request needs at least, from its first byte.
    needed: usize,
    validated: bool,
    hold: Hold,
}

impl Input {
    /// Of a client that has said nothing.
    pub fn new(limits: Limits, budget: &Budget) -> Result<Self, Refusal> {
        let hold = budget.hold(0)?;
        Ok(Self { limits, pending: Vec::new(), taken: 0, scan: None, needed: 0, validated: false, hold })
    }

    /// Takes bytes from the client.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.tidy();
        let length = self.pending.len() + bytes.len();
        if length > self.pending.capacity() {
            // Twice as much each time, but no more than the request is known to need.
            let doubled = (2 * self.pending.capacity()).min(self.needed);
            let capacity = length.max(doubled);
            self.hold.resize(capacity)?;
            self.pending.reserve_exact(capacity - self.pending.len());
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    /// The next request, if it is there as a whole. The first must be the validation, which is checked here.
    pub fn take(&mut self) -> Result<Option<Request>, Refusal> {
        let bytes = &self.pending[self.taken..];
        let Some(query) = bytes.first() else {
            // A long request is not kept until the next comes.
            self.tidy();
            return Ok(None);
        };
        if !self.validated && *query != 0 {
            return Err(Refusal::NotValidated(*query));
        }
        let scan = match &mut self.scan {
            Some(scan) => scan,
            None => self.scan.insert(Scan::new(*query)?),
        };
        match scan.look(bytes, &self.limits)? {
            Found::AtLeast(needed) => {
                self.needed = needed;
                Ok(None)
            }
            Found::Whole(end) => {
                let request = bytes.get(..end).and_then(parse).ok_or(Refusal::UnknownQuery(*query))?;
                (self.scan, self.needed, self.taken) = (None, 0, self.taken + end);
                match request {
                    Request::Validate(_) if self.validated => return Err(Refusal::ValidatedTwice),
                    Request::Validate(MAGIC) => self.validated = true,
                    Request::Validate(number) => return Err(Refusal::WrongMagic(number)),
                    _ => {}
                }
                Ok(Some(request))
            }
        }
    }

    /// Whether the first request was the validation.
    pub fn is_validated(&self) -> bool {
        self.validated
    }

    fn tidy(&mut self) {
        if self.taken == self.pending.len() {
            self.pending.clear();
            if self.pending.capacity() > KEPT_BYTES {
                self.pending = Vec::new();
                // Less than before always fits.
                self.hold.resize(0).ok();
            }
        } else if self.taken > 0 {
            self.pending.drain(..self.taken);
        }
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(limits: Limits) -> Input {
        Input::new(limits, &Budget::new(limits.held_bytes_max)).unwrap()
    }

    fn encoded(requests: &[Request]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for request in requests {
            request.encode(&mut bytes);
        }
        bytes
    }

    fn all_kinds() -> Vec<Request> {
        let key = |text: &str| crate::Key::from(text.as_bytes());
        vec![
            Request::Validate(MAGIC),
            Request::Ping(7),
            Request::Set(key("/a"), b"1".to_vec()),
            Request::CompareSet(key("/a"), b"1".to_vec(), vec![]),
            Request::Get(key("")),
            Request::Add(key("/n"), -3),
            Request::Check(vec![key("/a"), key("/b")]),
            Request::Wait(vec![]),
            Request::NumKeys,
            Request::Delete(key("/a")),
            Request::Append(key("/a"), b"more".to_vec()),
            Request::MultiGet(vec![key("/a")]),
            Request::MultiSet(vec![(key("/a"), b"x".to_vec()), (key("/b"), vec![0; 5000])]),
            Request::CancelWait,
            Request::QueuePush(key("/q"), b"1".to_vec()),
            Request::QueuePop(key("/q")),
            Request::QueueLen(key("/q")),
            Request::ListKeys,
            Request::Barrier(key("/barrier"), 4),
        ]
    }

    #[test]
    fn every_query_is_read_in_whatever_pieces_it_comes() {
        let requests = all_kinds();
        let bytes = encoded(&requests);
        for piece in [1, 2, 3, 7, 64, 1000, bytes.len()] {
            let mut input = input(Limits::default());
            let mut read = Vec::new();
            for piece in bytes.chunks(piece) {
                input.push(piece).unwrap();
                while let Some(request) = input.take().unwrap() {
                    read.push(request);
                }
            }
            assert_eq!(read, requests);
        }
    }

    #[test]
    fn a_session_cut_off_anywhere_gives_the_requests_before_the_cut() {
        let requests = all_kinds();
        let bytes = encoded(&requests);
        for cut in 0..bytes.len() {
            let mut input = input(Limits::default());
            input.push(&bytes[..cut]).unwrap();
            let mut count = 0;
            while let Some(request) = input.take().unwrap() {
                assert_eq!(request, requests[count]);
                count += 1;
            }
            assert!(encoded(&requests[..count]).len() <= cut);
            assert!(encoded(&requests[..=count]).len() > cut);
        }
    }

    #[test]
    fn a_length_is_refused_before_anything_is_kept_for_it() {
        let limits = Limits { request_bytes_max: 100 << 10, keys_per_request_max: 64, ..Limits::default() };
        let long = |bytes: u64| bytes.to_le_bytes();
        let head = encoded(&[Request::Validate(MAGIC)]);
        let table: Vec<(Vec<u8>, Refusal)> = vec![
            ([&[3][..], &long(u64::MAX)].concat(), Refusal::KeyTooLong { bytes: u64::MAX, max: 8 << 10 }),
            ([&[3][..], &long(8193)].concat(), Refusal::KeyTooLong { bytes: 8193, max: 8 << 10 }),
            (
                [&[1][..], &long(1), b"k", &long(1 << 62)].concat(),
                Refusal::ValueTooLong { bytes: 1 << 62, max: 64 << 20 },
            ),
            (
                [&[1][..], &long(1), b"k", &long(100 << 10)].concat(),
                Refusal::RequestTooLong { bytes: 18 + (100 << 10), max: 100 << 10 },
            ),
            ([&[6][..], &long(65)].concat(), Refusal::TooManyKeys { keys: 65, max: 64 }),
            ([&[11][..], &long(u64::MAX)].concat(), Refusal::TooManyKeys { keys: u64::MAX, max: 64 }),
            (vec![19], Refusal::UnknownQuery(19)),
            (head.clone(), Refusal::ValidatedTwice),
        ];
        for (bytes, refusal) in table {
            let mut input = input(limits);
            input.push(&head).unwrap();
            input.take().unwrap();
            input.push(&bytes).unwrap();
            assert_eq!(input.take().unwrap_err(), refusal);
            assert!(input.pending.capacity() < 1000);
        }
    }

    #[test]
    fn who_does_not_begin_with_the_validation_is_refused() {
        for (bytes, refusal) in [
            (&b"GET / HTTP/1.1\r\n"[..], Refusal::NotValidated(b'G')),
            (&[0, 1, 2, 3, 4], Refusal::WrongMagic(0x0403_0201)),
            (&[13, 1, 0, 0, 0], Refusal::NotValidated(13)),
        ] {
            let mut input = input(Limits::default());
            input.push(bytes).unwrap();
            assert_eq!(input.take().unwrap_err(), refusal);
            assert!(!input.is_validated());
        }
    }

    #[test]
    fn half_a_request_is_held_in_the_budget_and_no_more_than_came_in() {
        let budget = Budget::new(1 << 20);
        let limits = Limits { held_bytes_max: 1 << 20, ..Limits::default() };
        let mut input = Input::new(limits, &budget).unwrap();
        input.push(&encoded(&[Request::Validate(MAGIC)])).unwrap();
        assert!(input.take().unwrap().is_some());
        input.push(&[&[1][..], &1_u64.to_le_bytes(), b"k", &(3_u64 << 20).to_le_bytes()].concat()).unwrap();
        assert!(input.take().unwrap().is_none());
        assert!(budget.held_bytes() < 100, "{}", budget.held_bytes());
        let refused = (0..400).find_map(|_| input.push(&[0; 10_000]).err());
        assert!(matches!(refused, Some(Refusal::Full { .. })), "{refused:?}");
        drop(input);
        assert_eq!(budget.held_bytes(), 0);
    }
}
