//! Outgoing direction of a stream: the body of a request, or heads and body of an answer. Knows no frames.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use wsproxy_proto::tunnel::{
    code::Code,
    event::End,
    frame::{Head, Reset},
    headers::Headers,
    lane::SendError,
};

use super::shared::{Shared, State};

/// Outgoing direction of one stream. It belongs to one task at a time: only the task that polled last is woken.
///
/// Bound: the lane queues at most 32 KiB of a stream, within its credit. The writer keeps the rest of one piece.
///
/// Dropping a writer before [`Self::finish`] resets the stream as [`Code::Cancelled`], unless the peer takes no more.
#[derive(Debug)]
pub struct StreamWriter {
    shared: Arc<Shared>,
    number: u32,
    /// Whether the direction has its end, so that dropping the writer changes nothing.
    is_finished: bool,
    /// Part of the last piece that the lane did not take.
    rest: Bytes,
}

/// Reason why a stream takes nothing of its writer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The stream has ended.
    #[error("the stream has ended: {0:?}")]
    Ended(End),
    /// The peer takes no more of this body. The other direction goes on.
    #[error("the peer takes no more of the body")]
    Stopped,
    /// The call may not come now: a head behind a head, a body without one, anything behind the end, or a piece while
    /// a part of the last one waits.
    #[error("the call is out of order")]
    Order,
    /// The head or the trailers are larger than the peer takes.
    #[error("the head is too large")]
    HeadTooLarge,
}

impl StreamWriter {
    pub(super) const fn new(shared: Arc<Shared>, number: u32, is_finished: bool) -> Self {
        Self { shared, number, is_finished, rest: Bytes::new() }
    }

    /// Returns the number of the stream, for logs.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Sends a head of an agent: perhaps one with status 100, then the final one.
    ///
    /// # Errors
    /// [`WriteError`]. After [`WriteError::HeadTooLarge`] a smaller head may be sent.
    pub fn send_head(&mut self, head: &Head<'_>) -> Result<(), WriteError> {
        self.call(|state, number| state.core.send_head(number, head))?;
        self.is_finished |= head.end;
        Ok(())
    }

    /// Returns whether the lane has all of the last piece, so that the next one may be put.
    ///
    /// # Errors
    /// [`WriteError::Ended`], [`WriteError::Stopped`].
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        let Self { shared, number, rest, .. } = self;
        let number = *number;
        shared.call(|state| {
            if rest.is_empty() {
                let gone = gone(state, number);
                return Poll::Ready(gone.map_or(Ok(()), Err));
            }
            if let Err(error) = state.core.put(number, rest) {
                *rest = Bytes::new();
                return Poll::Ready(Err(write_error(error, state, number)));
            }
            if rest.is_empty() {
                return Poll::Ready(Ok(()));
            }
            state.slot(number).wait_writer(cx);
            Poll::Pending
        })
    }

    /// Waits until the lane has all of the last piece.
    ///
    /// # Errors
    /// As [`Self::poll_ready`].
    pub async fn ready(&mut self) -> Result<(), WriteError> {
        poll_fn(|cx| self.poll_ready(cx)).await
    }

    /// Puts a piece of the body. Behind [`Self::poll_ready`] it has no bound but that of the caller.
    ///
    /// # Errors
    /// [`WriteError`]; the piece is dropped.
    pub fn put(&mut self, mut piece: Bytes) -> Result<(), WriteError> {
        if !self.rest.is_empty() {
            return Err(WriteError::Order);
        }
        self.call(|state, number| state.core.put(number, &mut piece))?;
        self.rest = piece;
        Ok(())
    }

    /// Puts a piece, and waits until the lane has all of it.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn write(&mut self, piece: Bytes) -> Result<(), WriteError> {
        if !self.rest.is_empty() {
            self.ready().await?;
        }
        self.put(piece)?;
        if self.rest.is_empty() { Ok(()) } else { self.ready().await }
    }

    /// Finishes the body, of which the lane has all pieces.
    ///
    /// # Errors
    /// [`WriteError`]; the body is not finished.
    pub fn finish(&mut self) -> Result<(), WriteError> {
        self.finish_by(|state, number| state.core.finish(number))
    }

    /// Finishes the body with trailers.
    ///
    /// # Errors
    /// As [`Self::finish`]; [`WriteError::HeadTooLarge`].
    pub fn finish_with_trailers(&mut self, trailers: Headers<'_>) -> Result<(), WriteError> {
        self.finish_by(|state, number| state.core.finish_with_trailers(number, trailers))
    }

    /// Returns the reason once the peer takes no more of the body. Behind the end of the body it waits for the stream's
    /// end.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<WriteError> {
        if self.is_finished {
            return self.poll_ended(cx).map(WriteError::Ended);
        }
        let number = self.number;
        self.shared.call(|state| {
            if let Some(error) = gone(state, number) {
                return Poll::Ready(error);
            }
            state.slot(number).wait_writer(cx);
            Poll::Pending
        })
    }

    /// Waits as [`Self::poll_gone`] does: for a client that left while the writer has nothing to write.
    pub async fn gone(&mut self) -> WriteError {
        poll_fn(|cx| self.poll_gone(cx)).await
    }

    /// Returns the one end of the stream, whether or not the peer takes more.
    pub fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let number = self.number;
        self.shared.call(|state| {
            let slot = state.slot(number);
            if let Some(end) = slot.end() {
                return Poll::Ready(end.clone());
            }
            slot.wait_writer(cx);
            Poll::Pending
        })
    }

    /// Waits for the one end of the stream, as [`Self::poll_ended`] does.
    pub async fn ended(&mut self) -> End {
        poll_fn(|cx| self.poll_ended(cx)).await
    }

    /// Resets the stream, both directions of it.
    pub fn reset(mut self, reset: &Reset<'_>) {
        self.is_finished = true;
        self.shared.call(|state| state.core.reset(self.number, reset));
    }

    fn finish_by(
        &mut self,
        finish: impl FnOnce(&mut State, u32) -> Result<(), SendError>,
    ) -> Result<(), WriteError> {
        if !self.rest.is_empty() {
            return Err(WriteError::Order);
        }
        self.call(finish)?;
        self.is_finished = true;
        Ok(())
    }

    fn call(
        &self,
        change: impl FnOnce(&mut State, u32) -> Result<(), SendError>,
    ) -> Result<(), WriteError> {
        self.shared.call(|state| {
            let changed = change(state, self.number);
            changed.map_err(|error| write_error(error, state, self.number))
        })
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.shared.call(|state| {
            if !self.is_finished && !state.slot(self.number).is_stopped {
                state.core.reset(self.number, &Reset::new(Code::Cancelled));
            }
            state.release_writer(self.number);
        });
    }
}

/// Returns the reason why a body that is not finished gets no further.
fn gone(state: &mut State, number: u32) -> Option<WriteError> {
    let slot = state.slot(number);
    match slot.end() {
        // The peer needed no more of the body for the stream to be complete.
        Some(End::Complete) | None if slot.is_stopped => Some(WriteError::Stopped),
        end => end.cloned().map(WriteError::Ended),
    }
}

fn write_error(error: SendError, state: &mut State, number: u32) -> WriteError {
    match error {
        SendError::Gone => gone(state, number).unwrap_or(WriteError::Order),
        SendError::Stopped => WriteError::Stopped,
        SendError::Order => WriteError::Order,
        SendError::HeadTooLarge => WriteError::HeadTooLarge,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_small() {
        assert!(size_of::<StreamWriter>() <= 48);
    }
}
