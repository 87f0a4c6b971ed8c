//! Keys, queues and who waits for them: one request in, replies out. No I/O, no clock.
//!
//! It does what torch's own server does, but for what the crate lists: where torch wakes a client without what it
//! waits for, or undercounts, this does not.

use std::collections::hash_map::Entry as Place;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::limits::{Budget, Hold, Limits, Value};
use crate::refusal::Refusal;
use crate::reply::Reply;
use crate::wire::{Key, Request};

/// Memory of one entry of a table beside its bytes, about, so that a million empty values are not held for nothing.
const ENTRY_BYTES: usize = 160;

/// A connection, by a number that is not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client(pub u64);

/// To whom, and what.
pub type Replies = Vec<(Client, Reply)>;

/// The state of one store.
#[derive(Debug)]
pub struct Store {
    limits: Limits,
    budget: Budget,
    values: HashMap<Key, Entry>,
    queues: HashMap<Key, Queue>,
    /// Who waits for a key, in the order in which they came.
    waiters: HashMap<Key, VecDeque<Client>>,
    waits: HashMap<Client, Wait>,
}

#[derive(Debug)]
struct Entry {
    value: Value,
    /// Of the key.
    _hold: Hold,
}

#[derive(Debug)]
struct Queue {
    items: VecDeque<(Value, Hold)>,
    /// Of the key.
    _hold: Hold,
}

#[derive(Debug)]
struct Wait {
    /// Those that were not there when it began; one may be named twice.
    keys: Vec<Key>,
    /// How many of them have not come since.
    missing: usize,
    since: Duration,
    _hold: Hold,
}

/// A wait that goes on, for people to see.
#[derive(Clone, Debug)]
pub struct Waiting<'a> {
    /// Who waits.
    pub client: Client,
    /// The first of the keys that have not come, at most as many as were asked for.
    pub keys: Vec<&'a Key>,
    /// How many have not.
    pub missing: usize,
    /// When it began, on the clock of [`Store::step`].
    pub since: Duration,
}

impl Store {
    /// An empty one.
    pub fn new(limits: Limits, budget: Budget) -> Self {
        let (values, queues) = Default::default();
        Self { limits, budget, values, queues, waiters: HashMap::new(), waits: HashMap::new() }
    }

    /// Does what a client asks, and says what to whom. An error is a reason to disconnect the client. `now` is any
    /// clock that does not go back.
    pub fn step(
        &mut self,
        now: Duration,
        from: Client,
        request: Request,
        replies: &mut Replies,
    ) -> Result<(), Refusal> {
        let reply = match request {
            // Checked before it came here.
            Request::Validate(_) => return Ok(()),
            Request::Ping(number) => Reply::Pong(number),
            Request::Set(key, value) => {
                let value = Value::new(&self.budget, value)?;
                return self.put(&key, value, replies);
            }
            Request::MultiSet(pairs) => return self.multi_set(pairs, replies),
            Request::Append(key, more) => return self.append(&key, more, replies),
            Request::CompareSet(key, expected, desired) => {
                Reply::Compared(self.compare_set(&key, expected, desired, replies)?)
            }
            Request::Get(key) => Reply::Values(vec![self.get(&key)]),
            Request::MultiGet(keys) => Reply::Values(keys.iter().map(|key| self.get(key)).collect()),
            Request::Add(key, amount) => Reply::Number(self.add(&key, amount, replies)?),
            Request::Check(keys) => Reply::Ready(keys.iter().all(|key| self.has(key))),
            Request::Wait(keys) => {
                let missing: Vec<Key> = keys.into_iter().filter(|key| !self.has(key)).collect();
                if !missing.is_empty() {
                    return self.wait(now, from, missing);
                }
                Reply::StopWaiting
            }
            Request::CancelWait => {
                self.leave(from);
                Reply::WaitCanceled
            }
            Request::Barrier(key, world) => {
                self.may_wait(from)?;
                if self.arrive(&key)? < world {
                    return self.wait(now, from, vec![key]);
                }
                self.wake(&key, replies);
                Reply::StopWaiting
            }
            Request::NumKeys => Reply::Number(self.values.len() as i64),
            Request::ListKeys => Reply::Keys(self.values.keys().cloned().collect()),
            Request::Delete(key) => Reply::Number(i64::from(self.values.remove(&key).is_some())),
            Request::QueuePush(key, value) => return self.queue_push(&key, value, replies),
            Request::QueuePop(key) => self.queue_pop(key),
            Request::QueueLen(key) => {
                Reply::Number(self.queues.get(&key).map_or(0, |queue| queue.items.len() as i64))
            }
        };
        replies.push((from, reply));
        Ok(())
    }

    /// Forgets what a client waits for: it cancels, or is gone.
    pub fn leave(&mut self, client: Client) {
        let Some(wait) = self.waits.remove(&client) else { return };
        for key in wait.keys {
            if let Place::Occupied(mut place) = self.waiters.entry(key) {
                place.get_mut().retain(|other| *other != client);
                if place.get().is_empty() {
                    place.remove();
                }
            }
        }
    }

    /// What goes on waiting, each with so many keys at most.
    pub fn waiting(&self, keys_max: usize) -> impl Iterator<Item = Waiting<'_>> {
        self.waits.iter().map(move |(client, wait)| {
            let mut keys: Vec<&Key> =
                wait.keys.iter().filter(|key| !self.has(key)).take(keys_max.min(wait.missing)).collect();
            if keys.is_empty() {
                // The counter of a barrier is there from the first who arrives.
                keys.extend(wait.keys.first());
            }
            Waiting { client: *client, keys, missing: wait.missing, since: wait.since }
        })
    }

    /// Keys with a value, as the clients count them.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether no key has a value.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<Value> {
        self.values.get(key).map(|entry| entry.value.clone())
    }

    fn has(&self, key: &Key) -> bool {
        self.values.contains_key(key) || self.queues.contains_key(key)
    }

    fn put(&mut self, key: &Key, value: Value, replies: &mut Replies) -> Result<(), Refusal> {
        self.store(key.clone(), value)?;
        self.wake(key, replies);
        Ok(())
    }

    fn store(&mut self, key: Key, value: Value) -> Result<(), Refusal> {
        match self.values.entry(key) {
            Place::Occupied(mut place) => place.get_mut().value = value,
            Place::Vacant(place) => {
                let hold = self.budget.hold(place.key().len() + ENTRY_BYTES)?;
                place.insert(Entry { value, _hold: hold });
            }
        }
        Ok(())
    }

    /// All or nothing; torch sets those before the one that it refuses.
    fn multi_set(&mut self, pairs: Vec<(Key, Vec<u8>)>, replies: &mut Replies) -> Result<(), Refusal> {
        let room = self.budget.hold(pairs.iter().map(|(key, _)| key.len() + ENTRY_BYTES).sum())?;
        let pairs: Vec<(Key, Value)> = (pairs.into_iter())
            .map(|(key, value)| Ok((key, Value::new(&self.budget, value)?)))
            .collect::<Result<_, Refusal>>()?;
        drop(room);
        pairs.into_iter().try_for_each(|(key, value)| self.put(&key, value, replies))
    }

    fn append(&mut self, key: &Key, more: Vec<u8>, replies: &mut Replies) -> Result<(), Refusal> {
        let Some(entry) = self.values.get_mut(key) else {
            let value = Value::new(&self.budget, more)?;
            return self.put(key, value, replies);
        };
        let (bytes, max) = (entry.value.len() + more.len(), self.limits.value_bytes_max);
        if bytes > max {
            return Err(Refusal::ValueTooLong { bytes: bytes as u64, max });
        }
        entry.value.append(&more)?;
        self.wake(key, replies);
        Ok(())
    }

    fn compare_set(
        &mut self,
        key: &Key,
        expected: Vec<u8>,
        desired: Vec<u8>,
        replies: &mut Replies,
    ) -> Result<Result<Value, Vec<u8>>, Refusal> {
        let sets = match self.values.get(key) {
            Some(entry) if *entry.value != *expected => return Ok(Ok(entry.value.clone())),
            // Torch's servers give back what was expected, though the key has no value.
            None if !expected.is_empty() => return Ok(Err(expected)),
            Some(_) | None => Value::new(&self.budget, desired)?,
        };
        self.put(key, sets.clone(), replies)?;
        Ok(Ok(sets))
    }

    fn add(&mut self, key: &Key, amount: i64, replies: &mut Replies) -> Result<i64, Refusal> {
        let sum = self.count(key, amount)?;
        let value = Value::new(&self.budget, sum.to_string().into_bytes())?;
        self.put(key, value, replies)?;
        Ok(sum)
    }

    /// What a counter would be with so much more.
    fn count(&self, key: &Key, amount: i64) -> Result<i64, Refusal> {
        let Some(entry) = self.values.get(key) else { return Ok(amount) };
        let before = whole_number(&entry.value).ok_or_else(|| Refusal::NotANumber { key: shown(key) })?;
        before.checked_add(amount).ok_or_else(|| Refusal::Overflow { key: shown(key), amount })
    }

    /// Counts one more at a barrier, which wakes nobody.
    fn arrive(&mut self, key: &Key) -> Result<i64, Refusal> {
        let sum = self.count(key, 1)?;
        let value = Value::new(&self.budget, sum.to_string().into_bytes())?;
        self.store(key.clone(), value)?;
        Ok(sum)
    }

    fn queue_push(&mut self, key: &Key, value: Vec<u8>, replies: &mut Replies) -> Result<(), Refusal> {
        let value = Value::new(&self.budget, value)?;
        let hold = self.budget.hold(ENTRY_BYTES)?;
        let queue = match self.queues.entry(key.clone()) {
            Place::Occupied(place) => place.into_mut(),
            Place::Vacant(place) => {
                let hold = self.budget.hold(place.key().len() + ENTRY_BYTES)?;
                place.insert(Queue { items: VecDeque::new(), _hold: hold })
            }
        };
        queue.items.push_back((value, hold));
        // One value is for one of those who wait, the first.
        while let Some(first) = self.waiters.get_mut(key).and_then(VecDeque::pop_front) {
            if self.came(first, replies) {
                break;
            }
        }
        if self.waiters.get(key).is_some_and(VecDeque::is_empty) {
            self.waiters.remove(key);
        }
        Ok(())
    }

    fn queue_pop(&mut self, key: Key) -> Reply {
        let Place::Occupied(mut place) = self.queues.entry(key) else { return Reply::Popped(0, None) };
        let items = &mut place.get_mut().items;
        let count = items.len();
        let first = items.pop_front().map(|(value, _)| value);
        if items.is_empty() {
            place.remove();
        }
        Reply::Popped(count, first)
    }

    fn may_wait(&self, client: Client) -> Result<(), Refusal> {
        if self.waits.contains_key(&client) { Err(Refusal::SecondWait) } else { Ok(()) }
    }

    fn wait(&mut self, now: Duration, client: Client, keys: Vec<Key>) -> Result<(), Refusal> {
        self.may_wait(client)?;
        let hold = self.budget.hold(keys.iter().map(|key| key.len() + ENTRY_BYTES).sum())?;
        for key in &keys {
            self.waiters.entry(key.clone()).or_default().push_back(client);
        }
        self.waits.insert(client, Wait { missing: keys.len(), keys, since: now, _hold: hold });
        Ok(())
    }

    /// The key came for all who wait for it.
    fn wake(&mut self, key: &Key, replies: &mut Replies) {
        // Nobody waits for most keys.
        if self.waiters.is_empty() {
            return;
        }
        for client in self.waiters.remove(key).unwrap_or_default() {
            self.came(client, replies);
        }
    }

    /// One of a client's keys came, once; whether it was the last.
    fn came(&mut self, client: Client, replies: &mut Replies) -> bool {
        let Place::Occupied(mut place) = self.waits.entry(client) else { return false };
        place.get_mut().missing -= 1;
        if place.get().missing > 0 {
            return false;
        }
        place.remove();
        replies.push((client, Reply::StopWaiting));
        true
    }
}

/// As C++'s `stoll` reads it, and therefore torch: spaces, a sign, digits; what follows does not matter.
fn whole_number(bytes: &[u8]) -> Option<i64> {
    let text = bytes.trim_ascii_start();
    let sign = usize::from(text.first().is_some_and(|byte| matches!(byte, b'+' | b'-')));
    let digits = text[sign..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..sign + digits]).ok()?.parse().ok()
}

/// A key for people, without the slash that each client puts before it, and not too long.
pub fn shown(key: &[u8]) -> String {
    const SHOWN_BYTES_MAX: usize = 120;
    let key = key.strip_prefix(b"/").unwrap_or(key);
    let head = key.get(..SHOWN_BYTES_MAX).unwrap_or(key);
    let more = if head.len() < key.len() { "…" } else { "" };
    format!("{}{more}", head.escape_ascii())
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
