//! A file that the commands print to, behind a queue with a thread of its own: a reader that pauses, or has gone,
//! neither ends nor delays whoever prints.
//!
//! The file itself stays as it is: programs that share it, such as ranks, do not expect it to be
//! non-blocking.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::writer::{Print, Sink, Target, Writer, gap_text, lines};

/// Bytes that may wait for the reader: some thousands of lines, and little memory.
pub(super) const HELD_BYTES_MAX: usize = 1 << 20;
/// Bytes that may wait before something that is soon drawn again: a reader that is there takes them at once.
const PASSING_HELD_BYTES_MAX: usize = 8 << 10;

/// Prints that wait, and who writes them.
pub(super) struct Queue {
    state: Mutex<State>,
    /// Something changed, for threads.
    changed: Condvar,
    /// Bytes that were taken from here so far, for tasks.
    taken: watch::Sender<u64>,
}

struct State {
    waiting: VecDeque<Print>,
    held_bytes: usize,
    /// Lines left out since the last print that was taken in.
    lost_lines: u64,
    /// The first error of each target, of which whoever needs an answer is told.
    failed: [Option<(ErrorKind, String)>; 2],
    /// Words about lines that were left out.
    gap: fn(u64) -> String,
    /// Nothing is being written.
    is_idle: bool,
    /// Used in place of the thread where the system has none to give.
    direct: Option<Writer>,
}

impl Queue {
    /// Starts the thread that writes.
    pub fn start(sink: Sink) -> Arc<Self> {
        let state = State {
            waiting: VecDeque::new(),
            held_bytes: 0,
            lost_lines: 0,
            failed: [None, None],
            gap: gap_text,
            is_idle: true,
            direct: None,
        };
        let queue = Self { state: Mutex::new(state), changed: Condvar::new(), taken: watch::channel(0).0 };
        let queue = Arc::new(queue);
        let sink = Arc::new(Mutex::new(Some(sink)));
        let (served, given) = (queue.clone(), sink.clone());
        let thread = std::thread::Builder::new().name("output".to_owned()).spawn(move || {
            let sink = given.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(sink) = sink {
                served.serve(Writer::new(sink));
            }
        });
        if thread.is_err() {
            let sink = sink.lock().unwrap_or_else(PoisonError::into_inner).take();
            queue.state().direct = sink.map(Writer::new);
        }
        queue
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets how lines that are left out are spoken of.
    pub fn set_gap(&self, gap: fn(u64) -> String) {
        self.state().gap = gap;
    }

    /// Takes a print if there is room, and counts its lines otherwise. Never waits.
    pub fn offer(&self, print: Print) {
        let mut state = self.state();
        if let Err(print) = self.take_in(&mut state, print) {
            state.lost_lines += lines(&print.bytes);
        }
    }

    /// Takes a print unless the reader pauses. For what is soon drawn again.
    pub fn offer_passing(&self, print: Print) {
        let mut state = self.state();
        if state.held_bytes < PASSING_HELD_BYTES_MAX {
            self.take_in(&mut state, print).ok();
        }
    }

    /// Takes a print once there is room; this thread waits. The error is that of an earlier one.
    pub fn put(&self, mut print: Print) -> io::Result<()> {
        let mut state = self.state();
        loop {
            state.failed(print.target)?;
            match self.take_in(&mut state, print) {
                Ok(()) => return Ok(()),
                Err(back) => print = back,
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The same, for a task.
    pub async fn send(&self, mut print: Print) -> io::Result<()> {
        let mut taken = self.taken.subscribe();
        loop {
            taken.borrow_and_update();
            {
                let mut state = self.state();
                state.failed(print.target)?;
                match self.take_in(&mut state, print) {
                    Ok(()) => return Ok(()),
                    Err(back) => print = back,
                }
            }
            // The sender is here.
            taken.changed().await.ok();
        }
    }

    /// Waits until a print of so many bytes would be taken, or refused for good.
    pub async fn room(&self, target: Target, bytes: usize) {
        let mut taken = self.taken.subscribe();
        loop {
            taken.borrow_and_update();
            {
                let state = self.state();
                if state.has_room(bytes) || state.failed(target).is_err() {
                    return;
                }
            }
            taken.changed().await.ok();
        }
    }

    /// Waits until all is written, or nothing of it was for `pause_max`. Tells whether all was; the error is
    /// that of standard output.
    pub async fn drain(&self, pause_max: Duration) -> io::Result<bool> {
        let mut taken = self.taken.subscribe();
        loop {
            taken.borrow_and_update();
            {
                let state = self.state();
                if state.is_done() {
                    return state.failed(Target::Stdout).map(|()| true);
                }
            }
            if tokio::time::timeout(pause_max, taken.changed()).await.is_err() {
                return Ok(false);
            }
        }
    }

    /// Waits so long at most, on this thread.
    pub fn drain_here(&self, most: Duration) {
        let state = self.state();
        drop(self.changed.wait_timeout_while(state, most, |state| !state.is_done()));
    }

    /// Returns bytes that wait.
    pub fn held_bytes(&self) -> usize {
        self.state().held_bytes
    }

    /// Returns bytes that were written so far.
    pub fn taken_bytes(&self) -> u64 {
        *self.taken.borrow()
    }

    /// Gives the print back if there is no room.
    fn take_in(&self, state: &mut State, mut print: Print) -> Result<(), Print> {
        if !state.has_room(print.bytes.len()) {
            return Err(print);
        }
        print.lost_lines = std::mem::take(&mut state.lost_lines);
        if let Some(mut writer) = state.direct.take() {
            writer.print(&print, state.gap, |_| ()).unwrap_or_else(|error| state.fail(print.target, &error));
            state.direct = Some(writer);
            return Ok(());
        }
        state.held_bytes += print.cost();
        state.waiting.push_back(print);
        self.changed.notify_all();
        Ok(())
    }

    fn serve(&self, mut writer: Writer) {
        loop {
            let (print, gap) = {
                let mut state = self.state();
                loop {
                    if let Some(print) = state.next() {
                        state.is_idle = false;
                        break (print, state.gap);
                    }
                    state.is_idle = true;
                    self.changed.notify_all();
                    self.taken.send_modify(|_| ());
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let written = writer.print(&print, gap, |bytes| {
                self.taken.send_modify(|taken| *taken += bytes as u64);
            });
            let mut state = self.state();
            state.held_bytes = state.held_bytes.saturating_sub(print.cost());
            if let Err(error) = written {
                state.fail(print.target, &error);
            }
            drop(state);
            self.changed.notify_all();
            self.taken.send_modify(|_| ());
        }
    }
}

impl State {
    /// The next print; at the end of them, one that says what was left out.
    fn next(&mut self) -> Option<Print> {
        if self.waiting.is_empty() && self.lost_lines > 0 {
            let mut gap = Print::raw(Target::Stderr, Vec::new());
            gap.lost_lines = std::mem::take(&mut self.lost_lines);
            return Some(gap);
        }
        self.waiting.pop_front()
    }

    /// One that is larger than all the room there is waits until it is alone.
    fn has_room(&self, bytes: usize) -> bool {
        self.held_bytes == 0 || self.held_bytes + bytes <= HELD_BYTES_MAX
    }

    fn is_done(&self) -> bool {
        self.is_idle && self.waiting.is_empty() && self.lost_lines == 0
    }

    fn fail(&mut self, target: Target, error: &io::Error) {
        self.failed[target as usize].get_or_insert_with(|| (error.kind(), error.to_string()));
    }

    fn failed(&self, target: Target) -> io::Result<()> {
        match &self.failed[target as usize] {
            Some((kind @ ErrorKind::BrokenPipe, _)) => Err((*kind).into()),
            Some((_, text)) => Err(io::Error::other(text.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::writer::WRITE_BYTES_MAX;
    use super::*;

    /// A reader that takes a write each time it is told to, or refuses it.
    fn paused() -> (Arc<Queue>, mpsc::Sender<io::Result<()>>, mpsc::Receiver<String>) {
        let (permit, permits) = mpsc::channel::<io::Result<()>>();
        let (written, seen) = mpsc::channel();
        let queue = Queue::start(Box::new(move |target, bytes| {
            permits.recv().unwrap_or(Ok(()))?;
            written.send(format!("{target:?} {}", String::from_utf8_lossy(bytes))).ok();
            Ok(bytes.len())
        }));
        (queue, permit, seen)
    }

    #[test]
    fn lines_that_nobody_reads_are_counted_where_they_are_missing() {
        let (queue, permit, seen) = paused();
        let big = vec![b'x'; HELD_BYTES_MAX];
        queue.offer(Print::own(Target::Stdout, big.clone()));
        for number in 0..3 {
            queue.offer(Print::own(Target::Stderr, format!("{number}\n").into_bytes()));
        }
        for _ in 0..big.len().div_ceil(WRITE_BYTES_MAX) {
            permit.send(Ok(())).unwrap();
            assert!(seen.recv().unwrap().starts_with("Stdout xxx"));
        }
        drop(permit);
        // It is said even if nothing comes after it.
        assert_eq!(seen.recv().unwrap(), format!("Stderr \n{}\n", gap_text(3)));
        queue.offer(Print::own(Target::Stderr, b"again\n".to_vec()));
        assert_eq!(seen.recv().unwrap(), "Stderr again\n");
    }

    #[test]
    fn a_disk_that_is_full_loses_lines_until_it_is_not() {
        let (queue, permit, seen) = paused();
        let full = || Err(io::Error::from(ErrorKind::StorageFull));
        for result in [full(), full(), Ok(()), Ok(())] {
            permit.send(result).unwrap();
        }
        for text in ["a\nb\n", "c\n", "d\n"] {
            queue.offer(Print::own(Target::Stderr, text.into()));
        }
        assert_eq!(seen.recv().unwrap(), format!("Stderr {}\n", gap_text(3)));
        assert_eq!(seen.recv().unwrap(), "Stderr d\n");
        assert!(
            queue.put(Print::own(Target::Stderr, b"x".to_vec())).is_err(),
            "whoever needs an answer gets it"
        );
    }

    #[test]
    fn a_line_is_of_one_stream() {
        let (queue, permit, seen) = paused();
        drop(permit);
        let out = |stream, text: &str| {
            queue.offer(Print::stream(Target::Stdout, stream, format!("[{stream}]:").into(), text.into()));
        };
        out(0, "asks: ");
        out(0, "yes");
        out(1, "10%");
        out(0, " and no\n");
        out(1, "20%\n");
        queue.offer(Print::raw(Target::Stdout, b"half".to_vec()));
        queue.offer(Print::own(Target::Stderr, b"ours\n".to_vec()));
        let text: Vec<String> = seen.iter().take(7).collect();
        let text: Vec<&str> = text.iter().map(|text| text.split_once(' ').unwrap().1).collect();
        let expected = "[0]:asks: yes\n[1]:10%\n[0]: and no\n[1]:20%\nhalf\nours\n";
        assert_eq!(text.concat(), expected);
    }

    #[tokio::test]
    async fn tasks_wait_for_room_and_for_the_end() {
        let (queue, permit, _seen) = paused();
        queue.offer(Print::own(Target::Stdout, vec![b'x'; HELD_BYTES_MAX]));
        let sent = queue.send(Print::raw(Target::Stdout, b"y\n".to_vec()));
        tokio::pin!(sent);
        let none = Duration::from_millis(1);
        assert!(tokio::time::timeout(none, &mut sent).await.is_err(), "there is no room yet");
        assert!(!queue.drain(none).await.unwrap(), "nothing is read");
        drop(permit);
        sent.await.unwrap();
        assert!(queue.drain(Duration::from_mins(1)).await.unwrap());
    }
}
