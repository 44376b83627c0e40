//! Incoming direction of a stream: heads and body of an answer, or the body of a request. Knows no frames.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use wsproxy_proto::tunnel::{
    code::Code,
    event::{Answer, End},
    frame::{Reset, Source},
    headers::SharedHeaders,
    lane::Taken,
};

use super::shared::Shared;
use crate::clock;

/// Incoming direction of one stream. It belongs to one task at a time: only the task that polled last is woken.
///
/// Credit is granted as bytes are taken. Dropping a reader before the end of its body gives the bytes up at once: of
/// an answer the stream is reset as [`Code::Cancelled`], of a request the peer is told to stop.
#[derive(Debug)]
pub struct StreamReader {
    shared: Arc<Shared>,
    number: u32,
    if_dropped: IfDropped,
    /// Whether the clean end of the body was told.
    is_done: bool,
}

/// Consequence of dropping a reader before the end of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IfDropped {
    /// The stream is reset.
    Reset,
    /// The peer is told to send no more.
    Stop,
}

/// Part of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// Bytes, never none.
    Data(Bytes),
    /// Clean end, with trailers.
    Trailers(SharedHeaders),
    /// Clean end.
    End,
}

impl StreamReader {
    pub(super) const fn new(
        shared: Arc<Shared>,
        number: u32,
        if_dropped: IfDropped,
        is_done: bool,
    ) -> Self {
        Self { shared, number, if_dropped, is_done }
    }

    /// Returns the number of the stream, for logs.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Waits for the next head of an answer: one with status 100 if it comes, then the final one.
    ///
    /// # Errors
    /// The stream ended without it.
    pub async fn head(&mut self) -> Result<Answer, End> {
        poll_fn(|cx| self.poll_head(cx)).await
    }

    /// Returns the next head, as [`Self::head`] does. Behind the final head it waits for the stream's end.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Answer, End>> {
        let number = self.number;
        let head = self.shared.call(|state| {
            let slot = state.slot(number);
            if std::mem::take(&mut slot.has_continue) {
                return Poll::Ready(Ok(go_on()));
            }
            if let Some(answer) = slot.take_answer() {
                return Poll::Ready(Ok(answer));
            }
            if let Some(end) = slot.end() {
                return Poll::Ready(Err(end.clone()));
            }
            slot.wait_reader(cx);
            Poll::Pending
        });
        if let Poll::Ready(Ok(answer)) = &head {
            self.is_done |= answer.end;
        }
        head
    }

    /// Waits for the next part of the body.
    ///
    /// # Errors
    /// The stream ended, and the body is not whole.
    pub async fn read(&mut self) -> Result<Received, End> {
        poll_fn(|cx| self.poll_read(cx)).await
    }

    /// Returns the next part of the body, as [`Self::read`] does. Behind the end it is [`Received::End`].
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Received, End>> {
        if self.is_done {
            return Poll::Ready(Ok(Received::End));
        }
        let number = self.number;
        let received = self.shared.call(|state| match state.core.take(clock::now().0, number) {
            Taken::Bytes(chunk) => Poll::Ready(Ok(Received::Data(Bytes::from_owner(chunk)))),
            Taken::Trailers(trailers) => Poll::Ready(Ok(Received::Trailers(trailers))),
            Taken::End => Poll::Ready(Ok(Received::End)),
            Taken::Pending => {
                state.slot(number).wait_reader(cx);
                Poll::Pending
            }
            Taken::Gone if state.slot(number).is_bodyless => Poll::Ready(Ok(Received::End)),
            Taken::Gone => Poll::Ready(Err(state.end_of(number))),
        });
        self.is_done |= matches!(received, Poll::Ready(Ok(Received::Trailers(_) | Received::End)));
        received
    }

    /// Resets the stream, both directions of it.
    pub fn reset(mut self, reset: &Reset<'_>) {
        self.is_done = true;
        self.shared.call(|state| state.core.reset(self.number, reset));
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.shared.call(|state| {
            if !self.is_done {
                match self.if_dropped {
                    IfDropped::Reset => {
                        state.core.reset(self.number, &Reset::new(Code::Cancelled));
                    }
                    IfDropped::Stop => state.core.stop(self.number),
                }
            }
            state.release_reader(self.number);
        });
    }
}

/// Returns the head with status 100, which has no headers.
fn go_on() -> Answer {
    Answer { end: false, status: 100, source: Source::Upstream, headers: SharedHeaders::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_is_small() {
        assert!(size_of::<StreamReader>() <= 16);
    }
}
