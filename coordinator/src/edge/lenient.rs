//! Lets gRPC's C core call by a Unix socket: C++, Python, Ruby and PHP name the socket's path in `:authority`, with its
//! slashes as `%2F`, which our HTTP/2 library refuses as no name of a host.
//!
//! The name of a socket is used for nothing. So each `%` in it becomes a `-` as the bytes pass by: nothing changes its
//! length, and nothing else is touched. What is encoded by Huffman's code is left alone; the C core uses none there.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// Bytes with which HTTP/2 begins.
const PREFACE_BYTES: usize = 24;
const FRAME_HEAD_BYTES: usize = 9;
/// Types of frames that hold fields, and flags of the first.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
/// The field, and its number in HPACK's static table. The C core spells it out.
const AUTHORITY_NAME: &[u8] = b":authority";
const AUTHORITY: usize = 1;

/// A connection over a Unix socket.
#[derive(Debug)]
pub(crate) struct Lenient<C> {
    connection: C,
    frames: Frames,
}

impl<C> Lenient<C> {
    pub fn new(connection: C) -> Self {
        Self { connection, frames: Frames::new() }
    }
}

/// Where in the stream of frames we are.
#[derive(Debug)]
struct Frames {
    at: At,
    fields: Fields,
}

#[derive(Debug)]
enum At {
    /// Bytes that are passed over, and what follows them.
    Skip {
        left: usize,
        then: Next,
    },
    Head {
        bytes: [u8; FRAME_HEAD_BYTES],
        len: usize,
    },
    /// The length of a frame's padding, which is at its end.
    PadLength {
        left: usize,
        priority: bool,
    },
    Fields {
        left: usize,
        padding: usize,
    },
}

#[derive(Clone, Copy, Debug)]
enum Next {
    Frame,
    Fields { left: usize, padding: usize },
}

impl Frames {
    fn new() -> Self {
        Self { at: At::Skip { left: PREFACE_BYTES, then: Next::Frame }, fields: Fields::Start }
    }

    /// Rewrites what has come.
    fn pass(&mut self, mut bytes: &mut [u8]) {
        loop {
            match &mut self.at {
                At::Skip { left: 0, then: Next::Frame } => {
                    self.at = At::Head { bytes: [0; FRAME_HEAD_BYTES], len: 0 };
                }
                At::Skip { left: 0, then: Next::Fields { left, padding } } => {
                    self.at = At::Fields { left: *left, padding: *padding };
                }
                At::Fields { left: 0, padding } => {
                    self.at = At::Skip { left: *padding, then: Next::Frame };
                }
                At::Head { bytes: head, len: FRAME_HEAD_BYTES } => self.at = after_head(*head),
                At::Skip { .. } | At::Fields { .. } | At::Head { .. } | At::PadLength { .. }
                    if bytes.is_empty() =>
                {
                    return;
                }
                At::Skip { left, .. } => {
                    let passed = bytes.len().min(*left);
                    *left -= passed;
                    bytes = &mut bytes[passed..];
                }
                At::Head { bytes: head, len } => {
                    head[*len] = bytes[0];
                    *len += 1;
                    bytes = &mut bytes[1..];
                }
                At::PadLength { left, priority } => {
                    let padding = usize::from(bytes[0]);
                    self.at = fields(*left - 1, padding, *priority);
                    bytes = &mut bytes[1..];
                }
                At::Fields { left, .. } => {
                    let here = bytes.len().min(*left);
                    *left -= here;
                    let (now, rest) = bytes.split_at_mut(here);
                    for byte in now {
                        self.fields.pass(byte);
                    }
                    bytes = rest;
                }
            }
        }
    }
}

/// Returns what follows the head of a frame.
fn after_head(head: [u8; FRAME_HEAD_BYTES]) -> At {
    let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let (kind, flags) = (head[3], head[4]);
    match kind {
        HEADERS if flags & PADDED != 0 && len > 0 => {
            At::PadLength { left: len, priority: flags & PRIORITY != 0 }
        }
        HEADERS => fields(len, 0, flags & PRIORITY != 0),
        CONTINUATION => fields(len, 0, false),
        _ => At::Skip { left: len, then: Next::Frame },
    }
}

/// Returns the rest of a frame with fields. What does not add up is passed over: the library refuses it.
fn fields(len: usize, padding: usize, priority: bool) -> At {
    let before = if priority { PRIORITY_BYTES } else { 0 };
    match len.checked_sub(before + padding) {
        Some(left) => At::Skip { left: before, then: Next::Fields { left, padding } },
        None => At::Skip { left: len, then: Next::Frame },
    }
}

/// Where in the fields we are (RFC 7541, section 6). They go on over frames.
#[derive(Clone, Copy, Debug)]
enum Fields {
    Start,
    /// The rest of a number that concerns nobody here.
    Number,
    /// The rest of the number of a field's name.
    NameNumber,
    StringHead {
        of: Text,
    },
    /// The rest of a string's length.
    StringLength {
        of: Text,
        len: usize,
        shift: u32,
        plain: bool,
    },
    String {
        of: Text,
        left: usize,
        plain: bool,
    },
}

/// What a string is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    /// A name, and how many of its bytes are those of `:authority`.
    Name {
        alike: usize,
    },
    Value,
    Authority,
}

impl Text {
    /// Takes note of a byte, and changes it where it must.
    fn pass(self, byte: &mut u8, is_plain: bool) -> Self {
        match self {
            Self::Name { alike } if is_plain && AUTHORITY_NAME.get(alike) == Some(byte) => {
                Self::Name { alike: alike + 1 }
            }
            // A longer name, or another one.
            Self::Name { .. } => Self::Name { alike: usize::MAX },
            Self::Authority if is_plain && *byte == b'%' => {
                *byte = b'-';
                self
            }
            Self::Value | Self::Authority => self,
        }
    }
}

impl Fields {
    fn pass(&mut self, byte: &mut u8) {
        let more = *byte & 0x80 != 0;
        *self = match *self {
            Self::Start => start(*byte),
            Self::Number if more => Self::Number,
            Self::Number => Self::Start,
            Self::NameNumber if more => Self::NameNumber,
            Self::NameNumber => Self::StringHead { of: Text::Value },
            Self::StringHead { of } => {
                let (plain, len) = (!more, usize::from(*byte & 0x7f));
                match len {
                    0x7f => Self::StringLength { of, len, shift: 0, plain },
                    0 => after_string(of),
                    left => Self::String { of, left, plain },
                }
            }
            Self::StringLength { of, len, shift, plain } => {
                let part = usize::from(*byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX);
                let len = len.saturating_add(part);
                let shift = shift.saturating_add(7);
                if more {
                    Self::StringLength { of, len, shift, plain }
                } else {
                    Self::String { of, left: len, plain }
                }
            }
            Self::String { of, left, plain } => {
                let of = of.pass(byte, plain);
                match left {
                    0 | 1 => after_string(of),
                    left => Self::String { of, left: left - 1, plain },
                }
            }
        };
    }
}

/// Returns what follows the first byte of a field.
fn start(byte: u8) -> Fields {
    let literal = |mask: u8| match usize::from(byte & mask) {
        0 => Fields::StringHead { of: Text::Name { alike: 0 } },
        AUTHORITY => Fields::StringHead { of: Text::Authority },
        number if number == usize::from(mask) => Fields::NameNumber,
        _ => Fields::StringHead { of: Text::Value },
    };
    match byte {
        0x40..=0x7f => literal(0x3f),
        // A field that has been said before, or a new size of the table, with a number of several bytes.
        0xff | 0x3f => Fields::Number,
        0x80..=0xfe | 0x20..=0x3e => Fields::Start,
        0..=0x1f => literal(0x0f),
    }
}

fn after_string(of: Text) -> Fields {
    match of {
        Text::Name { alike } if alike == AUTHORITY_NAME.len() => Fields::StringHead { of: Text::Authority },
        Text::Name { .. } => Fields::StringHead { of: Text::Value },
        Text::Value | Text::Authority => Fields::Start,
    }
}

impl<C: Connected> Connected for Lenient<C> {
    type ConnectInfo = C::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.connection.connect_info()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Lenient<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.connection).poll_read(context, buffer));
        self.frames.pass(&mut buffer.filled_mut()[before..]);
        Poll::Ready(read)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Lenient<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(context, slices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFACE: &[u8; PREFACE_BYTES] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = (payload.len() as u32).to_be_bytes();
        let head = [len[1], len[2], len[3], kind, flags, 0, 0, 0, 1];
        [&head, payload].concat()
    }

    fn literal(first: u8, value: &str) -> Vec<u8> {
        [&[first, value.len() as u8], value.as_bytes()].concat()
    }

    /// A call as the C core makes it, with the authority's value.
    fn call(authority: &str) -> Vec<u8> {
        let named = |name: &str, value: &str| [literal(0x40, name), literal(0, value)[1..].to_vec()].concat();
        let fields = [
            // :scheme http, :method POST, both of the static table.
            &[0x86, 0x83][..],
            &literal(0x44, "/a%2Fb"),
            &literal(0x41, authority),
            &named(":authority", authority),
            &named(":authorit", "%"),
            &named(":authority-", "%"),
            &named("x%", ":authority%"),
            &[0x3f, 0xe1, 0x1f],
            // A number of a name that takes two bytes.
            &[0x7f, 0x05, 1, b'%'],
        ]
        .concat();
        let (first, rest) = fields.split_at(13);
        let padded = [&[3][..], &[0; PRIORITY_BYTES], first, b"%%%"].concat();
        [
            &PREFACE[..],
            &frame(4, 0, b"%%%%%%"),
            &frame(HEADERS, PADDED | PRIORITY, &padded),
            &frame(CONTINUATION, 4, rest),
            &frame(0, 1, b"\0\0\0\0\x01%"),
        ]
        .concat()
    }

    #[test]
    fn a_percent_sign_is_replaced_in_the_authority_and_nowhere_else() {
        let (said, expected) = (call("%2Fdir%2Fmuster.sock"), call("-2Fdir-2Fmuster.sock"));
        for piece in [1, 2, 7, 64, said.len()] {
            let mut bytes = said.clone();
            let mut frames = Frames::new();
            for part in bytes.chunks_mut(piece) {
                frames.pass(part);
            }
            assert_eq!(bytes, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_does_not_add_up_is_passed_on() {
        let junk: Vec<u8> = (0..4096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut longest = vec![0x41, 0x7f];
        longest.extend([0xff; 40]);
        for payload in [&junk[..], &longest, &[], &[0xff; 64]] {
            for (kind, flags) in [(HEADERS, 0xff), (HEADERS, 0), (CONTINUATION, 4), (0, 0)] {
                let mut bytes = [&PREFACE[..], &frame(kind, flags, payload), b"\0\0\x01"].concat();
                let len = bytes.len();
                Frames::new().pass(&mut bytes);
                assert_eq!(bytes.len(), len);
            }
        }
    }
}
