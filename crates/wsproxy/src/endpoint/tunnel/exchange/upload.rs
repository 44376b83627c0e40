//! Body of a request on its way to a stream. Knows no head.

use std::{
    collections::VecDeque,
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
    /// Pieces that were read, for another attempt; `None`: they were too many.
    kept: Option<Vec<Bytes>>,
    /// The same pieces, on their way to another instance.
    again: VecDeque<Bytes>,
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
        let (kept, again, trailers) = (Some(Vec::new()), VecDeque::new(), None);
        Ok(Self { body, max, read: 0, passes_trailers, kept, again, trailers, is_at_end: false })
    }

    /// Returns whether another attempt can begin at the beginning of the body.
    pub(super) const fn is_whole(&self) -> bool {
        self.kept.is_some()
    }

    /// Returns the next part of the body, for another instance. The body is not whole any more then.
    pub(in crate::endpoint::tunnel) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Uploaded>>> {
        if let Some(kept) = self.kept.take() {
            self.again = kept.into();
        }
        if let Some(piece) = self.again.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(piece))));
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
        for piece in self.kept.clone().unwrap_or_default() {
            stream.write(piece).await.map_err(ended)?;
        }
        while !self.is_at_end {
            // The stream may end while the client sends nothing.
            let frame = tokio::select! {
                biased;
                gone = stream.gone() => return Err(ended(gone)),
                frame = self.body.frame() => frame,
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
                    self.keep(&piece);
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

    /// Keeps a piece for another attempt, unless there are too many bytes.
    fn keep(&mut self, piece: &Bytes) {
        if self.read > KEPT_BYTES_MAX {
            self.kept = None;
        } else if let Some(kept) = &mut self.kept {
            kept.push(piece.clone());
        }
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
const KEPT_BYTES_MAX: u64 = 32 << 10;
