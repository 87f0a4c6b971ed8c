//! The body of an answer, whose bytes are counted until they are on their way.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::Response;
use http_body::{Frame, SizeHint};
use tonic::body::Body;

use super::share::{Place, Refused, SMALL_BYTES};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body with its place. The place is held until the body and all of its bytes are gone.
pub(super) struct Counted<A> {
    inner: A,
    place: Arc<Place>,
    /// What the first look at the body gave.
    first: Poll<Option<Result<Frame<Bytes>, BoxError>>>,
}

impl<A> Counted<A>
where
    A: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    A::Error: Into<BoxError>,
{
    /// Counts an answer. One that is there as a whole and for which there is no room is refused instead, before anything of
    /// it is sent.
    pub fn answer(answer: Response<A>, place: Arc<Place>) -> Result<Response<Body>, Refused> {
        let (parts, mut inner) = answer.into_parts();
        // Whoever sends it looks again, and is woken.
        let first = Pin::new(&mut inner).poll_frame(&mut Context::from_waker(Waker::noop()));
        let first = match first {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(Ok(counted(frame, &place)?))),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        };
        Ok(Response::from_parts(parts, Body::new(Self { inner, place, first })))
    }
}

/// Counts a frame until its bytes are gone.
fn counted(frame: Frame<Bytes>, place: &Arc<Place>) -> Result<Frame<Bytes>, Refused> {
    let bytes = match frame.into_data() {
        Ok(bytes) => bytes,
        Err(trailers) => return Ok(trailers),
    };
    place.charge(bytes.len())?;
    // A small message lies in a buffer of some kilobytes, which would be held as long.
    let bytes = if bytes.len() < SMALL_BYTES { Bytes::copy_from_slice(&bytes) } else { bytes };
    Ok(Frame::data(Bytes::from_owner(Unread { bytes, place: place.clone() })))
}

/// Bytes that are counted until they are dropped.
struct Unread {
    bytes: Bytes,
    place: Arc<Place>,
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.place.read(self.bytes.len());
    }
}

impl<A> http_body::Body for Counted<A>
where
    A: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    A::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let first = std::mem::replace(&mut self.first, Poll::Pending);
        if first.is_ready() {
            return first;
        }
        if self.place.is_ahead(context.waker()) {
            return Poll::Pending;
        }
        match std::task::ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            Some(Ok(frame)) => Poll::Ready(Some(counted(frame, &self.place).map_err(Into::into))),
            Some(Err(error)) => Poll::Ready(Some(Err(error.into()))),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        // A refusal has no body: its status ends the stream with the headers, or clients miss the trailers.
        match &self.first {
            Poll::Ready(first) => first.is_none(),
            Poll::Pending => self.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
