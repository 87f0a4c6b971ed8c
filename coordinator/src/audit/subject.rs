//! Which object a call is about: read from the beginning of its request as that passes by, so that it
//! is known of every call, also of one that is refused; or told by the handler, which makes it.

use std::io::Read;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use flate2::read::GzDecoder;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::body::Body;
use tonic::{Request, Status};

use super::locked;

/// Bytes of a request that are looked at: the object is its first field.
const HEAD_BYTES_MAX: usize = 1024;
/// Bytes before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// Longest name that is kept.
const NAME_CHARS_MAX: usize = 256;
/// Time that a refused call's request gets to come: its client has sent it by then.
const REFUSED_WITHIN: Duration = Duration::from_millis(200);

/// What a method's object is, and by which fields of its request it is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The handler tells it, or there is none.
    Told(&'static str),
    /// A field of the request.
    Field(&'static str, &'static [u32]),
}

/// The object of one call. Cheap to clone; handlers find it among the request's extensions.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    kind: Kind,
    found: Arc<Mutex<Found>>,
}

#[derive(Debug, Default)]
struct Found {
    head: Vec<u8>,
    told: Option<String>,
}

/// Tells the audit which object a call has made.
pub(crate) fn tell<T>(request: &Request<T>) -> impl FnOnce(&str) + use<T> {
    let subject = request.extensions().get::<Subject>().cloned();
    move |name| {
        if let Some(subject) = subject {
            locked(&subject.found).told = Some(name.to_owned());
        }
    }
}

impl Subject {
    pub fn new(kind: Kind) -> Self {
        Self { kind, found: Arc::default() }
    }

    /// Returns the request with its beginning being noted.
    pub fn noted(&self, body: Body) -> Body {
        Body::new(Noted { body, subject: self.clone() })
    }

    /// Reads the beginning of a request that goes no further.
    pub async fn read(&self, body: Body) {
        let mut body = Noted { body, subject: self.clone() };
        let reading = async {
            while locked(&self.found).head.len() < HEAD_BYTES_MAX
                && let Some(Ok(_)) = body.frame().await
            {}
        };
        tokio::time::timeout(REFUSED_WITHIN, reading).await.ok();
    }

    /// Returns the object as it is written, such as `job:k3v9x2ma`.
    pub fn object(&self) -> Option<String> {
        let found = locked(&self.found);
        let (kind, name) = match self.kind {
            Kind::Told(kind) => (kind, found.told.clone()?),
            Kind::Field(kind, path) => (kind, field(&found.head, path)?),
        };
        let name: String = name.chars().take(NAME_CHARS_MAX).collect();
        // Nodes that are shut out are named so already.
        let is_whole = name.starts_with(crate::access::NODE_PREFIX);
        Some(if is_whole { name } else { format!("{kind}:{name}") })
    }
}

/// Returns a string of a message by the numbers of its fields, from as much of it as is there.
fn field(head: &[u8], path: &[u32]) -> Option<String> {
    let (prefix, message) = head.split_at_checked(PREFIX_BYTES)?;
    let mut unpacked = Vec::new();
    let mut head = match prefix[0] {
        0 => message,
        1 => {
            // As much as can be unpacked of a beginning.
            GzDecoder::new(message).take(HEAD_BYTES_MAX as u64).read_to_end(&mut unpacked).ok();
            &unpacked[..]
        }
        _ => return None,
    };
    let (last, outer) = path.split_last()?;
    for tag in outer {
        head = bytes_of(head, *tag)?;
    }
    let name = String::from_utf8(bytes_of(head, *last)?.to_vec()).ok()?;
    (!name.is_empty()).then_some(name)
}

fn bytes_of(mut message: &[u8], wanted: u32) -> Option<&[u8]> {
    while message.has_remaining() {
        let (tag, wire) = decode_key(&mut message).ok()?;
        if tag == wanted && wire == WireType::LengthDelimited {
            let length = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
            return Some(message.get(..length).unwrap_or(message));
        }
        skip_field(wire, tag, &mut message, DecodeContext::default()).ok()?;
    }
    None
}

/// A request's body whose beginning is noted.
struct Noted {
    body: Body,
    subject: Subject,
}

impl http_body::Body for Noted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            let mut found = locked(&self.subject.found);
            let room = HEAD_BYTES_MAX.saturating_sub(found.head.len());
            found.head.extend_from_slice(&data[..data.len().min(room)]);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::read::GzEncoder;
    use muster_proto::v1;
    use prost::Message;

    use super::*;

    fn framed(message: &impl Message) -> Vec<u8> {
        let bytes = message.encode_to_vec();
        let mut framed = vec![0];
        framed.extend((bytes.len() as u32).to_be_bytes());
        framed.extend(bytes);
        framed
    }

    #[test]
    fn the_object_is_read_from_what_has_come() {
        let id = "k3v9x2ma".to_owned();
        let cancel =
            v1::CancelJobRequest { job_id: id.clone(), reason: "x".repeat(5000), ..Default::default() };
        let framed = framed(&cancel);
        assert_eq!(field(&framed, &[1]), Some(id), "whole");
        assert_eq!(field(&framed[..HEAD_BYTES_MAX], &[1]).as_deref(), Some("k3v9x2ma"), "its beginning");
        assert_eq!(field(&framed[..HEAD_BYTES_MAX], &[3]), None);
        let message = cancel.encode_to_vec();
        let mut packed = GzEncoder::new(message.as_slice(), Compression::fast());
        let mut bytes = vec![1, 0, 0, 0, 0];
        packed.read_to_end(&mut bytes).unwrap();
        assert_eq!(field(&bytes, &[1]).as_deref(), Some("k3v9x2ma"), "compressed");
        assert_eq!(field(&bytes[..bytes.len() - 12], &[1]).as_deref(), Some("k3v9x2ma"), "its beginning");
        for junk in
            [&b""[..], b"\x01\0\0\0\x02\x0a\0", b"\0\0\0\0\x05\xff\xff\xff\xff\xff", b"\0\0\0\0\x02\x0a\xff"]
        {
            assert_eq!(field(junk, &[1]), None, "{junk:?}");
        }
    }
}
