//! Batches for the socket: control frames first, then the streams in turn. Knows no socket.

use super::{Lane, control::put, stream::Stream};
use crate::tunnel::{
    event::Event,
    frame::{Frame, GoAway, HEADER_BYTES, StreamFrame, data_header},
    sending::Next,
};

/// Room that is left in a batch for the frames of streams. The first one always fits, so that neither control frames
/// nor its own size can keep it back for ever.
struct Room {
    start: usize,
    streams_start: usize,
}

impl Room {
    const fn fits(&self, out: &[u8], bytes: usize) -> bool {
        out.len() == self.streams_start || out.len() - self.start + bytes <= BATCH_BYTES_MAX
    }
}

/// Result of a stream's turn.
enum Turn {
    /// It wrote a frame or more.
    Wrote,
    /// It has nothing to write.
    Empty,
    /// Its next frame goes into the next batch.
    NoRoom,
}

impl Lane {
    /// Returns whether [`Self::write_batch`] may have something to write.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.control.is_empty() || self.schedule.first().is_some()
    }

    /// Appends the payload of one binary message to `out`: at most [`BATCH_BYTES_MAX`], or control frames and one head
    /// of more. Returns whether there was anything to write.
    pub fn write_batch(&mut self, now: u64, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        if let Some((code, drain_ms)) = self.control.write(now, out) {
            // Streams that were opened behind the first GOAWAY were dropped.
            let last_stream = *self.went_away.get_or_insert(self.last_opened);
            put(Frame::GoAway(GoAway { last_stream, code, drain_ms }), out);
        }
        // Others wait for the next batch, behind which the streams have had a turn.
        let is_room = |out: &[u8]| out.len() - start + RESET_BYTES_MAX <= CONTROL_BYTES_MAX;
        while is_room(out) && self.control.write_refusal(out) {}
        while let Some(number) = self.control.first_due()
            && is_room(out)
        {
            self.control.end_due();
            if let Some(stream) = self.streams.get_mut(&number) {
                write_control(number, stream, out);
                self.settle(number);
            }
        }
        let room = Room { start, streams_start: out.len() };
        while let Some(number) = self.schedule.first() {
            let Some(stream) = self.streams.get_mut(&number) else { break };
            let turn = write_turn(number, stream, &room, out);
            if matches!(turn, Turn::NoRoom) {
                break;
            }
            self.schedule.end_turn(&mut stream.list, matches!(turn, Turn::Empty));
            if matches!(turn, Turn::Wrote) {
                stream.written_at = now;
                if stream.has_control() {
                    self.control.due(number, &mut stream.is_due);
                }
                if stream.sending.wakes_producer() {
                    self.events.push_back(Event::Writable(number));
                }
                self.settle(number);
            }
        }
        out.len() > start
    }
}

/// Appends RESET and CREDIT of a stream.
fn write_control(number: u32, stream: &mut Stream, out: &mut Vec<u8>) {
    stream.is_due = false;
    out.append(&mut stream.reset);
    if stream.grants() {
        let credit = stream.receiving.grant();
        put(Frame::Stream(number, StreamFrame::Credit(credit)), out);
    }
}

/// Appends the head of a stream, one DATA frame and its trailers, as far as there are any.
fn write_turn(number: u32, stream: &mut Stream, room: &Room, out: &mut Vec<u8>) -> Turn {
    let mut turn = Turn::Empty;
    if !stream.head.is_empty() {
        if !room.fits(out, stream.head.len()) {
            return Turn::NoRoom;
        }
        out.append(&mut stream.head);
        stream.head = Vec::new();
        stream.is_opened = true;
        turn = Turn::Wrote;
    }
    let mut next = stream.sending.next();
    if let Some(Next::Data(length, flag)) = next {
        if !room.fits(out, HEADER_BYTES + length) {
            return Turn::NoRoom;
        }
        data_header(number, length, flag, out);
        stream.sending.write(Next::Data(length, flag), out);
        turn = Turn::Wrote;
        next = stream.sending.next();
    }
    if let Some(Next::Trailers(length)) = next {
        if !room.fits(out, length) {
            return Turn::NoRoom;
        }
        stream.sending.write(Next::Trailers(length), out);
        turn = Turn::Wrote;
    }
    turn
}

/// Upper bound of a batch, in bytes. Where a head does not fit in, it is the last frame behind control frames.
pub const BATCH_BYTES_MAX: usize = 64 << 10;

/// Upper bound of the control frames in a batch, in bytes.
const CONTROL_BYTES_MAX: usize = 16 << 10;

/// Upper bound of RESET with its header, and of CREDIT, in bytes.
const RESET_BYTES_MAX: usize = HEADER_BYTES + 7 + crate::tunnel::frame::MESSAGE_BYTES_MAX + 12;
