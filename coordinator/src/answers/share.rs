//! How many calls and unread bytes each caller has, and all together.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// Calls of all readers that wait for an answer or have one that is not read. Each costs some kilobytes.
const CALLS_MAX: usize = 16_384;
/// Those of one caller: three others find room whatever one does.
const CALLER_CALLS_MAX: usize = CALLS_MAX / 4;
/// Lists of all readers that wait for their turn or are not read. They are not part of the calls: who
/// asks for very many can still ask for one job.
const LISTS_MAX: usize = 1024;
/// Those of one caller.
const CALLER_LISTS_MAX: usize = LISTS_MAX / 4;
/// Open streams of all readers: each costs a task, a queue and up to [`STREAM_AHEAD_BYTES`] that are not read.
const STREAMS_MAX: usize = 4096;
/// Those of one caller.
const CALLER_STREAMS_MAX: usize = STREAMS_MAX / 4;
/// Logs of jobs that all readers follow: what nodes send ahead for each, and what of it is not read, is 128 KiB at most
/// (`grpc/logs.rs`), so together 64 MiB.
const LOGS_MAX: usize = 512;
/// Those of one caller.
const CALLER_LOGS_MAX: usize = LOGS_MAX / 2;
/// Bytes of answers that all readers have not read.
const UNREAD_BYTES_MAX: usize = 64 << 20;
/// Those of one caller: some twenty of the largest lists.
const CALLER_UNREAD_BYTES_MAX: usize = UNREAD_BYTES_MAX / 4;
/// An answer that is not larger is given whatever is unread, for the number of calls bounds it: who has left lists unread
/// can still ask for one job.
pub(super) const SMALL_BYTES: usize = 4 << 10;
/// Largest list. It is not made unless it fits, for making it costs much more than refusing it.
const LIST_BYTES_MAX: usize = 4 << 20;
/// Bytes that a stream may have unread before it is held up. One message goes in any case.
const STREAM_AHEAD_BYTES: usize = 32 << 10;

/// Largest piece of a stream that is bounded by the number of streams alone: more than logs and most jobs need.
const STREAM_MESSAGE_BYTES: usize = 128 << 10;

/// Who has a share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Caller {
    /// The Unix socket. Its share is its own, and not part of what all others have together.
    Socket,
    /// An identity, as audit lines name it.
    Known(Arc<str>),
    /// An address from which calls come without an identity.
    Peer(Option<IpAddr>),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket => f.write_str("the Unix socket"),
            Self::Known(name) => f.write_str(name),
            Self::Peer(Some(address)) => address.fmt(f),
            Self::Peer(None) => f.write_str("this address"),
        }
    }
}

/// What a call is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One answer, small as a rule.
    Call,
    /// One answer, of up to some megabytes.
    List,
    /// Answers for as long as the caller reads them.
    Stream,
    /// The same, of logs: nodes send them ahead.
    Logs,
}

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error(
        "{count} calls of {who} wait for an answer or have one that is not read, the most that are served; read the answers, \
         or try again later"
    )]
    Calls { who: String, count: usize },
    #[error(
        "{count} lists of {who} wait or are not read, the most that are served; read them, or try again later"
    )]
    Lists { who: String, count: usize },
    #[error("{count} streams of {who} are open, the most that are served; end some, or try again later")]
    Streams { who: String, count: usize },
    #[error("{count} logs are being read by {who}, the most that are served; end some, or try again later")]
    Logs { who: String, count: usize },
    #[error(
        "answers of {bytes} bytes to {who} are not read, and at most {max} may be; read them, ask for smaller pages, or try \
         again later"
    )]
    Unread { who: String, bytes: usize, max: usize },
}

impl Refused {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Calls { .. } | Self::Lists { .. } => "TOO_MANY_CALLS",
            Self::Streams { .. } | Self::Logs { .. } => "TOO_MANY_STREAMS",
            Self::Unread { .. } => "TOO_MUCH_UNREAD",
        }
    }
}

/// What somebody has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    calls: usize,
    lists: usize,
    streams: usize,
    logs: usize,
    /// Of answers that are no streams.
    unread: usize,
}

#[derive(Debug, Default)]
struct Usages {
    /// Of all but the Unix socket.
    all: Usage,
    /// Of each that has something: there are never more of them than calls and streams.
    callers: HashMap<Caller, Usage>,
}

/// The counts, shared. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers(Arc<Mutex<Usages>>);

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Usages> {
        // Each change is whole before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call until its place is dropped.
    pub(super) fn enter(&self, caller: Caller, kind: Kind) -> Result<Place, Refused> {
        let mut usages = self.lock();
        let (own, all) = usages.of(&caller);
        match kind {
            Kind::List => {
                let who = over(&caller, [(own.lists, CALLER_LISTS_MAX), (all.lists, LISTS_MAX)], 1);
                who.map_or(Ok(()), |(who, count, _)| Err(Refused::Lists { who, count }))?;
            }
            Kind::Call => {
                let who = over(&caller, [(own.calls, CALLER_CALLS_MAX), (all.calls, CALLS_MAX)], 1);
                who.map_or(Ok(()), |(who, count, _)| Err(Refused::Calls { who, count }))?;
            }
            Kind::Logs => {
                let who = over(&caller, [(own.logs, CALLER_LOGS_MAX), (all.logs, LOGS_MAX)], 1);
                who.map_or(Ok(()), |(who, count, _)| Err(Refused::Logs { who, count }))?;
            }
            Kind::Stream => {
                let who = over(&caller, [(own.streams, CALLER_STREAMS_MAX), (all.streams, STREAMS_MAX)], 1);
                who.map_or(Ok(()), |(who, count, _)| Err(Refused::Streams { who, count }))?;
            }
        }
        usages.change(&caller, |usage| match kind {
            Kind::Call => usage.calls += 1,
            Kind::List => usage.lists += 1,
            Kind::Stream => usage.streams += 1,
            Kind::Logs => usage.logs += 1,
        });
        drop(usages);
        Ok(Place { answers: self.clone(), caller, kind, own: Mutex::default() })
    }
}

/// Returns who would have more than may be, how much there is and how much there may be.
fn over(caller: &Caller, [own, all]: [(usize, usize); 2], more: usize) -> Option<(String, usize, usize)> {
    if own.0 + more > own.1 {
        Some((caller.to_string(), own.0, own.1))
    } else if all.0 + more > all.1 {
        Some(("all callers".to_owned(), all.0, all.1))
    } else {
        None
    }
}

impl Usages {
    fn of(&self, caller: &Caller) -> (Usage, Usage) {
        let own = self.callers.get(caller).copied().unwrap_or_default();
        (own, if *caller == Caller::Socket { Usage::default() } else { self.all })
    }

    fn change(&mut self, caller: &Caller, change: impl Fn(&mut Usage)) {
        let own = self.callers.entry(caller.clone()).or_default();
        change(own);
        if *own == Usage::default() {
            self.callers.remove(caller);
        }
        if *caller != Caller::Socket {
            change(&mut self.all);
        }
    }
}

/// A call's place among all.
#[derive(Debug)]
pub(crate) struct Place {
    answers: Answers,
    caller: Caller,
    kind: Kind,
    own: Mutex<Own>,
}

/// What one call has.
#[derive(Debug, Default)]
struct Own {
    unread: usize,
    /// Wakes a stream that is held up.
    waker: Option<Waker>,
}

impl Place {
    /// Refuses a large answer before it is made, while the caller has left others unread.
    pub(super) fn check_unread(&self) -> Result<(), Refused> {
        self.check(&self.answers.lock(), LIST_BYTES_MAX)
    }

    fn check(&self, usages: &Usages, bytes: usize) -> Result<(), Refused> {
        let (own, all) = usages.of(&self.caller);
        let bounds = [(own.unread, CALLER_UNREAD_BYTES_MAX), (all.unread, UNREAD_BYTES_MAX)];
        match over(&self.caller, bounds, bytes) {
            // What is over by itself is no more than a message can have.
            Some((_, 0, _)) | None => Ok(()),
            Some((who, bytes, max)) => Err(Refused::Unread { who, bytes, max }),
        }
    }

    /// Counts bytes until they are taken off with [`Place::read`].
    pub(super) fn charge(&self, bytes: usize) -> Result<(), Refused> {
        if self.is_shared(bytes) {
            let mut usages = self.answers.lock();
            if bytes > SMALL_BYTES {
                self.check(&usages, bytes)?;
            }
            usages.change(&self.caller, |usage| usage.unread += bytes);
        }
        self.own().unread += bytes;
        Ok(())
    }

    /// Whether bytes are part of what may be unread together. Those of streams are bounded by the number of streams, unless a
    /// single message is very large.
    fn is_shared(&self, bytes: usize) -> bool {
        !self.is_stream() || bytes > STREAM_MESSAGE_BYTES
    }

    fn is_stream(&self) -> bool {
        match self.kind {
            Kind::Call | Kind::List => false,
            Kind::Stream | Kind::Logs => true,
        }
    }

    /// Takes bytes off that the connection has taken, or that are dropped with it.
    pub(super) fn read(&self, bytes: usize) {
        if self.is_shared(bytes) {
            self.answers.lock().change(&self.caller, |usage| usage.unread -= bytes);
        }
        let mut own = self.own();
        own.unread -= bytes;
        let waker = own.waker.take();
        drop(own);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether a stream is to be held up until more of it is read; then `waker` is woken when it is.
    pub(super) fn is_ahead(&self, waker: &Waker) -> bool {
        let mut own = self.own();
        let is_ahead = self.is_stream() && own.unread >= STREAM_AHEAD_BYTES;
        if is_ahead {
            own.waker = Some(waker.clone());
        }
        is_ahead
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let kind = self.kind;
        self.answers.lock().change(&self.caller, |usage| match kind {
            Kind::Call => usage.calls -= 1,
            Kind::List => usage.lists -= 1,
            Kind::Stream => usage.streams -= 1,
            Kind::Logs => usage.logs -= 1,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> Caller {
        Caller::Peer(Some([10, 0, 0, last].into()))
    }

    /// Places that one caller gets before it is refused, and how it is refused.
    fn fill(answers: &Answers, caller: &Caller, kind: Kind) -> (Vec<Place>, Refused) {
        let mut places = Vec::new();
        loop {
            match answers.enter(caller.clone(), kind) {
                Ok(place) => places.push(place),
                Err(refused) => return (places, refused),
            }
        }
    }

    #[test]
    fn each_caller_has_a_share_and_the_socket_has_its_own() {
        let table = [
            (Kind::Call, CALLER_CALLS_MAX, CALLS_MAX),
            (Kind::List, CALLER_LISTS_MAX, LISTS_MAX),
            (Kind::Stream, CALLER_STREAMS_MAX, STREAMS_MAX),
            (Kind::Logs, CALLER_LOGS_MAX, LOGS_MAX),
        ];
        for (kind, share, most) in table {
            let answers = Answers::default();
            let callers = (most / share) as u8;
            let mut all: Vec<_> = (1..=callers).map(|last| fill(&answers, &peer(last), kind)).collect();
            assert!(all.iter().all(|(places, _)| places.len() == share), "{kind:?}");
            let words = all[0].1.to_string();
            assert!(words.contains("10.0.0.1") && words.contains(&share.to_string()), "{words}");
            let refused = answers.enter(peer(5), kind).unwrap_err().to_string();
            assert!(refused.contains("all callers"), "{refused}");
            let (own, _) = fill(&answers, &Caller::Socket, kind);
            assert_eq!(own.len(), share, "{kind:?}");
            all.pop();
            answers.enter(peer(5), kind).unwrap();
            drop((all, own));
            let left = answers.lock();
            assert!(left.callers.is_empty() && left.all == Usage::default(), "{left:?}");
        }
    }

    #[test]
    fn who_has_all_the_lists_it_may_have_can_still_ask_for_one_job() {
        let answers = Answers::default();
        let lists = fill(&answers, &peer(1), Kind::List);
        answers.enter(peer(1), Kind::Call).unwrap();
        drop(lists);
    }

    #[test]
    fn who_leaves_lists_unread_gets_small_answers_still() {
        let answers = Answers::default();
        let list = answers.enter(peer(1), Kind::List).unwrap();
        list.charge(CALLER_UNREAD_BYTES_MAX).unwrap();
        let next = answers.enter(peer(1), Kind::List).unwrap();
        let refused = next.check_unread().unwrap_err();
        assert_eq!(next.charge(SMALL_BYTES + 1), Err(refused.clone()));
        assert!(refused.to_string().contains(&CALLER_UNREAD_BYTES_MAX.to_string()), "{refused}");
        next.charge(SMALL_BYTES).unwrap();
        answers.enter(peer(2), Kind::List).unwrap().check_unread().unwrap();
        // Refused before it is made, and not after.
        list.read(LIST_BYTES_MAX);
        assert!(next.check_unread().is_err());
        next.read(SMALL_BYTES);
        list.read(CALLER_UNREAD_BYTES_MAX - LIST_BYTES_MAX);
        next.check_unread().unwrap();
    }
}
