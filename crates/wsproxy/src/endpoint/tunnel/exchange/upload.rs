//! Body of a request on its way to a stream. Knows no head.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Frame, Incoming};
use wsproxy_conn::lane::{StreamWriter, WriteError};
use wsproxy_proto::tunnel::{code::Code as ResetCode, frame::Reset, headers::HeaderBlock};

use crate::endpoint::tunnel::{
    access::Access,
    deadlines::Progress,
    headers::trailers,
    refusal::{Code, Refusal},
};

/// Body of a request.
pub struct Upload {
    body: Incoming,
    max: u64,
    read: u64,
    passes_trailers: bool,
    /// Bytes that were read, for another attempt.
    kept: Kept,
    /// Trailers that were read.
    trailers: Option<HeaderBlock>,
    is_at_end: bool,
}

/// End of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uploaded {
    /// The whole body was put into the stream.
    Whole,
    /// The upstream wants no more of the body.
    Stopped,
    /// The stream has ended.
    StreamEnded,
    /// The body is larger than the limit; the stream was reset.
    TooLarge,
    /// The client left, or its body is malformed; the stream was reset.
    ClientLeft,
}

impl Upload {
    /// Takes the body of a request. `max`: its largest length in bytes; 0: no limit.
    ///
    /// # Errors
    /// `body_too_large`: the request says so itself.
    pub fn new(body: Incoming, headers: &HeaderMap, max: usize) -> Result<Self, Refusal> {
        let max = if max == 0 { u64::MAX } else { max as u64 };
        if body.size_hint().lower() > max {
            return Err(Refusal::new(Code::BodyTooLarge));
        }
        let passes_trailers = trailers::are_accepted(headers);
        let (kept, trailers) = (Kept(Some(Vec::new())), None);
        Ok(Self { body, max, read: 0, passes_trailers, kept, trailers, is_at_end: false })
    }

    /// Returns whether another attempt can begin at the beginning of the body.
    pub(super) const fn is_whole(&self) -> bool {
        self.kept.0.is_some()
    }

    /// Returns whether the last part of the body was read, for another instance.
    pub(in crate::endpoint::tunnel) fn has_ended(&self) -> bool {
        let has_kept = self.kept.0.as_ref().is_some_and(|kept| !kept.is_empty());
        !has_kept && self.trailers.is_none() && (self.is_at_end || self.body.is_end_stream())
    }

    /// Returns the next part of the body, for another instance. The body is not whole any more then.
    pub(in crate::endpoint::tunnel) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Uploaded>>> {
        if let Some(kept) = self.kept.0.take()
            && !kept.is_empty()
        {
            return Poll::Ready(Some(Ok(Frame::data(kept.into()))));
        }
        if let Some(block) = self.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers::of_answer(block.headers())))));
        }
        if self.is_at_end {
            return Poll::Ready(None);
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            None => {
                self.is_at_end = true;
                Poll::Ready(None)
            }
            Some(Err(_)) => Poll::Ready(Some(Err(Uploaded::ClientLeft))),
            Some(Ok(frame)) => {
                self.is_at_end = frame.is_trailers();
                self.read += frame.data_ref().map_or(0, |piece| piece.len() as u64);
                let is_too_large = self.read > self.max;
                Poll::Ready(Some(if is_too_large { Err(Uploaded::TooLarge) } else { Ok(frame) }))
            }
        }
    }

    /// Puts the body into a stream, from its beginning, until it is whole, the stream takes no more, or `left`.
    pub(super) async fn run(
        mut self,
        mut stream: StreamWriter,
        (progress, access): (&Progress, &Access),
        left: impl Future<Output = ()>,
    ) -> (Self, Uploaded) {
        let ended = {
            let put = self.put(&mut stream, (progress, access));
            tokio::select! {
                biased;
                put = put => put,
                () = left => Err(Uploaded::ClientLeft),
            }
        };
        let uploaded = ended.err().unwrap_or(Uploaded::Whole);
        if matches!(uploaded, Uploaded::TooLarge | Uploaded::ClientLeft) {
            stream.reset(&Reset::new(ResetCode::Cancelled));
        }
        (self, uploaded)
    }

    async fn put(
        &mut self,
        stream: &mut StreamWriter,
        (progress, access): (&Progress, &Access),
    ) -> Result<(), Uploaded> {
        if let Some(kept) = self.kept.0.as_deref().filter(|kept| !kept.is_empty()) {
            stream.write(Bytes::copy_from_slice(kept)).await.map_err(ended)?;
        }
        while !self.is_at_end {
            // The stream may end while the client sends nothing. One that ends while it sends is found by the next write.
            let frame = tokio::select! {
                biased;
                frame = self.body.frame() => frame,
                gone = stream.gone() => return Err(ended(gone)),
            };
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|_| Uploaded::ClientLeft)?;
            progress.note();
            match frame.into_data() {
                Ok(piece) => {
                    self.read += piece.len() as u64;
                    if self.read > self.max {
                        return Err(Uploaded::TooLarge);
                    }
                    self.kept.push(&piece);
                    access.received(piece.len());
                    stream.write(piece).await.map_err(ended)?;
                    progress.note();
                }
                Err(frame) => {
                    let block = frame.into_trailers().ok().filter(|_| self.passes_trailers);
                    self.trailers = block.map(|block| trailers::of_request(&block));
                }
            }
        }
        self.is_at_end = true;
        let finished = match &self.trailers {
            Some(block) => stream.finish_with_trailers(block.headers()),
            None => stream.finish(),
        };
        finished.map_err(ended)
    }
}

/// Beginning of a body; `None`: more than [`KEPT_BYTES_MAX`] were read, and nothing is kept.
///
/// Bound: [`KEPT_BYTES_MAX`]. The bytes are copied, since a small piece would keep the whole buffer that it came in.
struct Kept(Option<Vec<u8>>);

impl Kept {
    fn push(&mut self, piece: &[u8]) {
        let Some(kept) = &mut self.0 else { return };
        let length = kept.len() + piece.len();
        if length > KEPT_BYTES_MAX {
            self.0 = None;
            return;
        }
        if length > kept.capacity() {
            let capacity = length.max(2 * kept.capacity()).min(KEPT_BYTES_MAX);
            kept.reserve_exact(capacity - kept.len());
        }
        kept.extend_from_slice(piece);
    }
}

fn ended(error: WriteError) -> Uploaded {
    match error {
        WriteError::Stopped => Uploaded::Stopped,
        WriteError::Ended(_) | WriteError::Order | WriteError::HeadTooLarge => {
            Uploaded::StreamEnded
        }
    }
}

/// Upper bound of the bytes of a body that are kept until its answer begins.
const KEPT_BYTES_MAX: usize = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_take_no_more_memory_than_their_bytes() {
        let mut kept = Kept(Some(Vec::new()));
        for n in 0..KEPT_BYTES_MAX {
            kept.push(&[n as u8]);
        }
        let whole = kept.0.as_ref().unwrap();
        assert_eq!((whole.len(), whole.capacity()), (KEPT_BYTES_MAX, KEPT_BYTES_MAX));
        assert!(whole.iter().enumerate().all(|(n, byte)| *byte == n as u8));
        kept.push(b"x");
        assert!(kept.0.is_none());
        kept.push(b"x");
        assert!(kept.0.is_none());
    }
}
