//! Calls of the tasks that streams belong to: requests, heads, bytes, ends. Knows no frame that comes in.

use bytes::Bytes;

use super::{
    Lane,
    stream::{Consumer, Phase, Stream},
};
use crate::tunnel::{
    STREAM_MAX,
    code::Code,
    direction::{Accepted, OutOfOrder},
    event::{End, Event},
    frame::{EncodeError, Frame, HEADER_BYTES, Head, Open, Reset, StreamFrame},
    headers::{Headers, SharedHeaders},
    memory::Chunk,
};

/// Result of [`Lane::take`].
#[derive(Debug)]
pub enum Taken {
    /// Bytes in the order of the stream.
    Bytes(Chunk),
    /// There is nothing yet. [`Event::Readable`] tells when there is.
    Pending,
    /// The body came to its clean end. Told once.
    End,
    /// The body came to its clean end, and these trailers stand behind it. Told once.
    Trailers(SharedHeaders),
    /// The stream has failed, as its [`Event::Ended`] said; or it was stopped, or told its end before.
    Gone,
}

/// Reason why a gateway cannot open a stream on this lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The peer's HELLO has not come yet, or this side is the agent.
    #[error("the lane is not ready")]
    NotReady,
    /// GOAWAY was sent or came, or the lane is over.
    #[error("the lane takes no further streams")]
    Draining,
    /// The agent takes no more streams at once.
    #[error("the lane is full")]
    Full,
    /// The process has no memory for another stream. [`Lane::slowest`] names one to end.
    #[error("the process has no memory for a stream")]
    Overloaded,
    /// The head is larger than the agent takes.
    #[error("the head is too large")]
    HeadTooLarge,
    /// The method or the path is invalid.
    #[error("the head is invalid")]
    Invalid,
}

/// Reason why a stream takes no frame of this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The stream has ended.
    #[error("the stream has ended")]
    Gone,
    /// The peer takes no more of this body. The stream goes on.
    #[error("the peer takes no more of the body")]
    Stopped,
    /// The frame may not come now, such as a head after another one; or its status is none.
    #[error("the frame is out of order")]
    Order,
    /// The head or the trailers are larger than the peer takes.
    #[error("the head is too large")]
    HeadTooLarge,
}

impl From<OutOfOrder> for SendError {
    fn from(_: OutOfOrder) -> Self {
        Self::Order
    }
}

impl From<EncodeError> for SendError {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::TooLarge => Self::HeadTooLarge,
            EncodeError::Invalid => Self::Order,
        }
    }
}

impl Lane {
    /// Opens a stream, and returns its number. Its body may be put at once.
    ///
    /// The stream with the last number makes the lane say GOAWAY.
    ///
    /// # Errors
    /// [`OpenError`]; the lane is then as before.
    pub fn open(&mut self, now: u64, open: &Open<'_>) -> Result<u32, OpenError> {
        let Some(peer) = self.peer.filter(|_| self.is_of_gateway()) else {
            return Err(OpenError::NotReady);
        };
        // Odd numbers only.
        let number = (self.last_opened + 1) | 1;
        if self.is_over || self.is_draining || number > STREAM_MAX {
            return Err(OpenError::Draining);
        }
        if self.streams.len() >= peer.streams_max as usize {
            return Err(OpenError::Full);
        }
        let mut head = Vec::with_capacity(HEADER_BYTES + open.payload_bytes());
        match Frame::Stream(number, StreamFrame::Open(*open)).encode(&mut head) {
            Ok(()) if head.len() - HEADER_BYTES <= peer.head_bytes_max as usize => {}
            Ok(()) | Err(EncodeError::TooLarge) => return Err(OpenError::HeadTooLarge),
            Err(EncodeError::Invalid) => return Err(OpenError::Invalid),
        }
        let share = self.memory.place().ok_or(OpenError::Overloaded)?;
        let mut stream = Stream::of_gateway(now, open, head, peer.window, share);
        self.schedule.join(number, &mut stream.list);
        self.streams.insert(number, stream);
        self.last_opened = number;
        if number == STREAM_MAX {
            self.go_away(Code::Restarting, self.config.drain_ms);
        }
        Ok(number)
    }

    /// Answers with a head: of status 100, which is to be `end: false` and comes before the final one, or final.
    ///
    /// # Errors
    /// [`SendError`]. After [`SendError::HeadTooLarge`] a smaller head may be sent.
    pub fn send_head(&mut self, number: u32, head: &Head<'_>) -> Result<(), SendError> {
        let head_bytes_max = self.peer_head_bytes_max();
        let stream = self.sending_stream(number)?;
        // A head with status 100 has no headers, so that at most one large head waits.
        let headers = if head.status == 100 { Headers::default() } else { head.headers };
        let head = Head { headers, ..*head };
        let at = stream.head.len();
        stream.head.reserve(HEADER_BYTES + head.payload_bytes());
        Frame::Stream(number, StreamFrame::Head(head)).encode(&mut stream.head)?;
        let is_too_large = stream.head.len() - at - HEADER_BYTES > head_bytes_max;
        let accepted = if is_too_large {
            Err(SendError::HeadTooLarge)
        } else {
            stream.outgoing.head(head.status, head.end, stream.is_upgrade).map_err(SendError::from)
        };
        if accepted != Ok(Accepted::Counts) {
            stream.head.truncate(at);
        }
        if accepted? == Accepted::Dropped {
            return Err(SendError::Stopped);
        }
        if head.end {
            stream.sending.close();
        }
        self.join(number);
        Ok(())
    }

    /// Puts bytes of a body: as many from the front of `bytes` as there is room and credit for. Where a rest stays in
    /// `bytes`, [`Event::Writable`] tells when to put it.
    ///
    /// # Errors
    /// [`SendError::Gone`], [`SendError::Stopped`]: the producer can end. [`SendError::Order`]: no head was sent, or the
    /// body is finished.
    pub fn put(&mut self, number: u32, bytes: &mut Bytes) -> Result<(), SendError> {
        let stream = self.sending_stream(number)?;
        if stream.outgoing.data(false)? == Accepted::Dropped {
            return Err(SendError::Stopped);
        }
        stream.sending.put(bytes);
        self.join(number);
        Ok(())
    }

    /// Finishes a body. A rest that could not be put is not to be finished over: it would be lost.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn finish(&mut self, number: u32) -> Result<(), SendError> {
        let stream = self.sending_stream(number)?;
        if stream.outgoing.data(true)? == Accepted::Dropped {
            return Err(SendError::Stopped);
        }
        stream.sending.finish();
        self.join(number);
        Ok(())
    }

    /// Finishes a body with trailers.
    ///
    /// # Errors
    /// As [`Self::put`], and [`SendError::HeadTooLarge`]: the body is not finished.
    pub fn finish_with_trailers(
        &mut self,
        number: u32,
        trailers: Headers<'_>,
    ) -> Result<(), SendError> {
        let head_bytes_max = self.peer_head_bytes_max();
        let stream = self.sending_stream(number)?;
        let mut frame = Vec::new();
        Frame::Stream(number, StreamFrame::Trailers(trailers)).encode(&mut frame)?;
        if frame.len() - HEADER_BYTES > head_bytes_max {
            return Err(SendError::HeadTooLarge);
        }
        if stream.outgoing.trailers()? == Accepted::Dropped {
            return Err(SendError::Stopped);
        }
        stream.sending.finish_with_trailers(frame);
        self.join(number);
        Ok(())
    }

    /// Takes received bytes for the consumer of a stream, or learns that there are none.
    pub fn take(&mut self, now: u64, number: u32) -> Taken {
        let Some(stream) = self.streams.get_mut(&number) else { return Taken::Gone };
        if stream.consumer == Consumer::Done {
            return Taken::Gone;
        }
        let taken = match stream.receiving.take(&mut stream.share) {
            Some(chunk) => {
                stream.taken_at = now;
                Taken::Bytes(chunk)
            }
            None if stream.incoming.is_ended() => {
                stream.consumer = Consumer::Done;
                match stream.trailers.take() {
                    Some(block) => Taken::Trailers(SharedHeaders::of_valid(block)),
                    None => Taken::End,
                }
            }
            None => {
                stream.consumer = Consumer::Waits;
                self.grow(number);
                return Taken::Pending;
            }
        };
        if stream.grants() {
            self.control.due(number, &mut stream.is_due);
        }
        self.settle(number);
        taken
    }

    /// Widens the window of a stream whose consumer waits, where its sender waits as well.
    pub(super) fn grow(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        let was_growing = stream.share.is_growing();
        stream.receiving.grow(&mut stream.share);
        if !was_growing && stream.share.is_growing() {
            self.grown.push(number);
        }
        if stream.grants() {
            self.control.due(number, &mut stream.is_due);
        }
    }

    /// Ends the direction towards this side: the consumer of the stream takes no more. The peer is told, unless it has
    /// sent everything. The other direction goes on.
    pub fn stop(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if stream.phase == Phase::Open && !stream.incoming.is_ended() {
            stream.incoming.stop();
            let stop = Reset { stop: true, ..Reset::new(Code::None) };
            super::control::put(Frame::Stream(number, StreamFrame::Reset(stop)), &mut stream.reset);
            if stream.is_opened {
                self.control.due(number, &mut stream.is_due);
            }
        }
        stream.abandon();
        self.settle(number);
    }

    /// Ends a stream in both directions, whatever its state. Its end is told by [`Event::Ended`], unless it was told
    /// before. The lane says by itself whether a head was sent; `stop` of `reset` does not count.
    pub fn reset(&mut self, number: u32, reset: &Reset<'_>) {
        let Some(stream) = self.streams.get(&number) else { return };
        let head_sent =
            !self.is_of_gateway() && stream.outgoing.has_head() && stream.head.is_empty();
        let reset = Reset { stop: false, head_sent, ..*reset };
        self.reset_here(number, Frame::Stream(number, StreamFrame::Reset(reset)), reset.code);
    }

    /// Returns an open stream whose direction from here is judged next.
    fn sending_stream(&mut self, number: u32) -> Result<&mut Stream, SendError> {
        let stream = self.streams.get_mut(&number);
        stream.filter(|stream| stream.phase == Phase::Open).ok_or(SendError::Gone)
    }

    fn peer_head_bytes_max(&self) -> usize {
        self.peer.map_or(0, |peer| peer.head_bytes_max as usize)
    }

    /// Gives a stream its turns, if it has something to write.
    pub(super) fn join(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if !stream.head.is_empty() || stream.sending.next().is_some() {
            self.schedule.join(number, &mut stream.list);
        }
    }

    /// Ends all streams that the agent never accepted.
    pub(super) fn end_above(&mut self, last_stream: u32, code: Code) {
        let above = |(number, stream): (&u32, &Stream)| {
            (*number > last_stream).then_some((*number, stream.phase))
        };
        let mut above: Vec<_> = self.streams.iter().filter_map(above).collect();
        above.sort_unstable_by_key(|(number, _)| *number);
        for (number, phase) in above {
            if phase == Phase::Open {
                self.events.push_back(Event::Ended(number, End::GoneAway(code)));
            }
            if phase != Phase::Closed {
                self.forget(number);
            }
        }
    }
}
