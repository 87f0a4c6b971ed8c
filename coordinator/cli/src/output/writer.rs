//! How prints are written: in pieces that stay whole, each line one stream's, and gaps said where they are.

use std::io::{self, ErrorKind, Write};
use std::time::Duration;

/// What a print costs beside its bytes, so that empty ones are bounded too.
const HELD_BYTES_EACH: usize = 64;
/// Bytes written at once. Pipes take so many in one piece (PIPE_BUF): what ranks write to the same pipe cannot
/// come between them.
pub(super) const WRITE_BYTES_MAX: usize = 4096;
/// Pause before a file is tried again that another program has made non-blocking.
const FULL_PAUSE: Duration = Duration::from_millis(10);

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Stdout,
    Stderr,
}

/// Where bytes go in the end.
pub(super) type Sink = Box<dyn FnMut(Target, &[u8]) -> io::Result<usize> + Send>;

/// Whose text a print is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Whole lines of ours.
    Own,
    /// Bytes that nothing is added to.
    Raw,
    /// Text of one stream among several, which may end within a line.
    Stream(u64),
}

/// Something to be written.
pub(super) struct Print {
    pub target: Target,
    source: Source,
    /// Stands before the text where that begins a line.
    head: Vec<u8>,
    pub bytes: Vec<u8>,
    /// Lines left out just before it.
    pub lost_lines: u64,
}

impl Print {
    pub fn own(target: Target, bytes: Vec<u8>) -> Self {
        Self { target, source: Source::Own, head: Vec::new(), bytes, lost_lines: 0 }
    }

    pub fn raw(target: Target, bytes: Vec<u8>) -> Self {
        Self { source: Source::Raw, ..Self::own(target, bytes) }
    }

    pub fn stream(target: Target, stream: u64, head: Vec<u8>, bytes: Vec<u8>) -> Self {
        Self { source: Source::Stream(stream), head, ..Self::own(target, bytes) }
    }

    /// Returns the room that it takes.
    pub fn cost(&self) -> usize {
        self.bytes.len() + self.head.len() + HELD_BYTES_EACH
    }
}

/// Writes print after print.
pub(super) struct Writer {
    sink: Sink,
    /// The last line has its end.
    is_at_start: bool,
    /// Whose line it is.
    last: Source,
    /// Lines that could not be written, such as to a disk that is full.
    lost_lines: u64,
}

impl Writer {
    pub fn new(sink: Sink) -> Self {
        Self { sink, is_at_start: true, last: Source::Own, lost_lines: 0 }
    }

    pub fn print(&mut self, print: &Print, gap: fn(u64) -> String, taken: impl Fn(usize)) -> io::Result<()> {
        let lost_lines = print.lost_lines + self.lost_lines;
        let words = if lost_lines > 0 { gap(lost_lines) } else { String::new() };
        if !words.is_empty() {
            let end = if self.is_at_start { "" } else { "\n" };
            let said = self.write(Target::Stderr, format!("{end}{words}\n").as_bytes(), &taken);
            if said.is_err() {
                self.lost_lines = lost_lines + lines(&print.bytes);
                return said;
            }
            self.lost_lines = 0;
        }
        let mut bytes = print.bytes.as_slice();
        let whole;
        // A line that somebody else has left open is nobody's to go on with.
        let is_open = !self.is_at_start && print.source != Source::Raw;
        let is_cut = is_open && print.source != self.last;
        if !bytes.is_empty() && (is_cut || self.is_at_start && !print.head.is_empty()) {
            let end = if is_cut { &b"\n"[..] } else { &[] };
            whole = [end, &print.head, bytes].concat();
            bytes = &whole;
        }
        self.last = print.source;
        let written = self.write(print.target, bytes, &taken);
        if written.is_err() {
            self.lost_lines += lines(&print.bytes);
        }
        written
    }

    fn write(&mut self, target: Target, mut bytes: &[u8], taken: &impl Fn(usize)) -> io::Result<()> {
        while !bytes.is_empty() {
            match (self.sink)(target, &bytes[..piece(bytes)]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.is_at_start = bytes[written - 1] == b'\n';
                    bytes = &bytes[written..];
                    taken(written);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(FULL_PAUSE),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Bytes of the next write: whole lines, if there is one among so many.
fn piece(bytes: &[u8]) -> usize {
    if bytes.len() <= WRITE_BYTES_MAX {
        return bytes.len();
    }
    let most = &bytes[..WRITE_BYTES_MAX];
    most.iter().rposition(|byte| *byte == b'\n').map_or(WRITE_BYTES_MAX, |last| last + 1)
}

/// Counts lines, the last one even without its end.
pub(super) fn lines(bytes: &[u8]) -> u64 {
    bytes.split_inclusive(|byte| *byte == b'\n').count() as u64
}

/// Says in words how many lines were left out.
pub(super) fn gap_text(lines: u64) -> String {
    format!("muster: {lines} lines were left out here, which nothing had read in time")
}

/// Writes to the files of this process, without buffers or locks that others could hold.
pub(super) fn to_process() -> Sink {
    let open = |descriptor: io::Result<std::os::fd::OwnedFd>| descriptor.ok().map(std::fs::File::from);
    let mut out = open(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned());
    let mut err = open(std::os::fd::AsFd::as_fd(&io::stderr()).try_clone_to_owned());
    Box::new(move |target, bytes| {
        let file = if target == Target::Stdout { &mut out } else { &mut err };
        file.as_mut().map_or(Err(ErrorKind::BrokenPipe.into()), |file| file.write(bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_ends_at_the_end_of_a_line() {
        let text = [b"a\n".repeat(10), b"b".repeat(2 * WRITE_BYTES_MAX)].concat();
        assert_eq!(piece(&text), 20);
        assert_eq!(piece(&text[20..]), WRITE_BYTES_MAX);
        assert_eq!(piece(b"a\nb"), 3);
    }
}
